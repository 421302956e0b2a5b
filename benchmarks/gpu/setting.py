"""What a run is about: its device, sizes, checkpoints and texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.texts import read_collection

# DPR's passages for Natural Questions have 100 words (Karpukhin et al. 2020), which are some 140
# tokens. Lengths are spread evenly about that, as passages' lengths differ, from a seventh of it.
PASSAGE_TOKENS = 140
_LEAST_PART = 1 / 7
QUERY_TOKENS = 12


@dataclass(frozen=True, slots=True)
class Setting:
    """What a run is about.

    Attributes:
        device: As `Reranker` takes it.
        small: Whether everything is as small as it can be, to try the program out.
        folder: Where checkpoints are made.
        passage_tokens: Mean number of tokens of a passage.
    """

    device: str
    small: bool
    folder: Path
    passage_tokens: int = PASSAGE_TOKENS

    @property
    def kind(self) -> str:
        """The kind of the device."""
        return self.device.partition(":")[0]

    @property
    def halves(self) -> tuple[str, ...]:
        """The dtypes that figures are of."""
        return ("bfloat16",) if self.small else ("float16", "bfloat16")

    def size(self, full: int, small: int) -> int:
        """Return one of two numbers."""
        return small if self.small else full

    def shape_name(self, name: str) -> str:
        """Return the name of a shape, or that of the small one."""
        return "small" if self.small else name


@cache
def _words() -> list[str]:
    # Every fifth, since passages are overlapping windows of five sentences.
    return " ".join(read_collection(None)[1][::5]).split()


def text_of(tokens: int, number: int) -> str:
    """Return a text of so many words, each of which is one token; another for each number."""
    words = _words()
    start = number * 37 % len(words)
    # A word of its own first, and others from another place: no two texts are the same.
    chosen = [words[(start + place) % len(words)] for place in range(tokens - 1)]
    return " ".join([words[number * 101 % len(words)], *chosen])


def spread_lengths(count: int, mean: int) -> list[int]:
    """Return lengths that are spread evenly about a mean, in an order that is mixed."""
    least = round(mean * _LEAST_PART)
    steps = max(1, count - 1)
    # 7919 is prime, so that every place is met once.
    return [least + 2 * (mean - least) * (place * 7919 % count) // steps for place in range(count)]


def pairs_of(setting: Setting, count: int, *, queries: int = 32) -> list[tuple[str, str]]:
    """Return so many different pairs, of passages whose mean length is the setting's."""
    lengths = spread_lengths(count, setting.passage_tokens)
    return [
        (text_of(QUERY_TOKENS, 10_000 + place % queries), text_of(length, place))
        for place, length in enumerate(lengths)
    ]


def mean(values: Sequence[float]) -> float:
    """Return the mean of some numbers."""
    return sum(values) / len(values)
