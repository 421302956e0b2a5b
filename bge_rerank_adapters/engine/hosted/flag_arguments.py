"""Arguments of FlagEmbedding's constructors, which its own users and those of Milvus type."""

import numbers
from collections.abc import Sequence
from dataclasses import dataclass

from bge_rerank_adapters.errors import SettingsError

Devices = str | int | Sequence[str | int] | None


@dataclass(frozen=True, slots=True)
class Instruction:
    """An instruction before a text, in FlagEmbedding's way (`abc/inference/AbsReranker.py`).

    Attributes:
        instruction: `None` for nothing.
        template: With two places: the instruction's and the text's.
        of_the_engine: The one that the engine puts there by itself where its setting is `None`.
        in_engine: Whether the engine is to put this one there, whatever it is.
    """

    instruction: str | None
    template: str
    of_the_engine: str | None = None
    in_engine: bool = False

    def __post_init__(self) -> None:
        """Refuse a template that would drop a text."""
        places = ("\ue000instruction", "\ue000text")
        try:
            # One that has a single place would drop the text without a word.
            filled = self.template.format(*places)
            cause = None
        except (IndexError, KeyError, ValueError, AttributeError) as error:
            filled, cause = "", error
        if not all(place in filled for place in places):
            raise SettingsError(
                f"An instruction format needs two places, like '{{}}{{}}', got {self.template!r}."
            ) from cause
        if self.in_engine and not filled.endswith(places[1]):
            raise SettingsError(
                'With query_truncation_side="left" the query must end query_instruction_format, '
                f"like '{{}}{{}}', got {self.template!r}."
            )

    @property
    def setting(self) -> str | None:
        """The engine's setting: empty where the instruction is put into the text here."""
        if self.in_engine and self.instruction is not None:
            return self._put_before("")
        plain = self.instruction is None or self.template == "{}{}"
        return None if plain and self.instruction == self.of_the_engine else ""

    def apply(self, text: str) -> str:
        """Return a text for the engine, with the instruction unless the engine puts it there."""
        if self.instruction is None or self.in_engine or self.setting is None:
            return text
        return self._put_before(text)

    def _put_before(self, text: str) -> str:
        # Written in a shell, a format has a backslash and an "n" for a new line.
        return self.template.replace("\\n", "\n").format(self.instruction, text)


def engine_devices(value: Devices) -> str | tuple[str, ...]:
    """Return devices as the engine's setting: a number is a CUDA device, `None` chooses one."""
    if value is None:
        return "auto"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(map(_one_device, value))
    return _one_device(value)


def check_batch_size(value: object) -> None:
    """Check a batch size, which is not needed: packs are built by tokens.

    Raises:
        SettingsError: It is no whole number of at least 1.
    """
    if not is_whole(value) or value < 1:  # type: ignore[operator]
        raise SettingsError(f"batch_size must be at least 1, got {value!r}.")


def is_whole(value: object) -> bool:
    """Return whether a value is a whole number, numpy's among them."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _one_device(value: object) -> str:
    text = str(value)
    return f"cuda:{text}" if text.isdecimal() else text
