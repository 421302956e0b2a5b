"""Divides large calls into parts, so that a device scores one while the next is tokenised."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

TextPair = tuple[str, str]


class Part(NamedTuple):
    """Some of the pairs of a call.

    Attributes:
        pairs: n pairs.
        indices: The first index of each pair in the caller's list.
    """

    pairs: Sequence[TextPair]
    indices: Sequence[int]

    def name(self, name: Callable[[int], str]) -> Callable[[int], str]:
        """Convert a function that names the caller's pairs to one that names those of this part."""
        return lambda index: name(self.indices[index])


def parts_of(pairs: Sequence[TextPair], max_pairs: int) -> list[Part]:
    """Return the pairs of a call in parts.

    Args:
        pairs: n >= 1 pairs.
        max_pairs: Maximum number of pairs of a part. A call with no more pairs is one part as it
            is. In larger calls repeated pairs are taken once, so that equal pairs have equal
            logits.
    """
    if len(pairs) <= max_pairs:
        return [Part(pairs, range(len(pairs)))]
    firsts: dict[TextPair, int] = {}
    for index, pair in enumerate(pairs):
        firsts.setdefault(pair, index)
    distinct, indices = list(firsts), list(firsts.values())
    return [
        Part(distinct[start : start + max_pairs], indices[start : start + max_pairs])
        for start in range(0, len(distinct), max_pairs)
    ]
