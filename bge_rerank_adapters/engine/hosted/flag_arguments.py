"""Arguments of FlagEmbedding's constructors, which milvus-model has taken over."""

import numbers
from collections.abc import Sequence
from dataclasses import dataclass

from bge_rerank_adapters.errors import SettingsError

Devices = str | int | Sequence[str | int] | None


@dataclass(frozen=True, slots=True)
class Instruction:
    """An instruction before a text, as in FlagEmbedding (`abc/inference/AbsReranker.py`).

    Attributes:
        instruction: `None` for none.
        template: Format string with two fields: the instruction and the text.
        engine_default: The instruction that the engine adds if its setting is `None`.
        in_engine: Whether the engine must add this instruction, whatever it is.
    """

    instruction: str | None
    template: str
    engine_default: str | None = None
    in_engine: bool = False

    def __post_init__(self) -> None:
        """Refuse a template that would drop a text."""
        fields = ("\ue000instruction", "\ue000text")
        try:
            # A template with a single field would silently drop the text.
            filled = self.template.format(*fields)
            cause = None
        except (IndexError, KeyError, ValueError, AttributeError) as error:
            filled, cause = "", error
        if not all(field in filled for field in fields):
            raise SettingsError(
                f"An instruction format needs two fields, like '{{}}{{}}', got {self.template!r}."
            ) from cause
        if self.in_engine and not filled.endswith(fields[1]):
            raise SettingsError(
                'With query_truncation_side="left" the query must end query_instruction_format, '
                f"like '{{}}{{}}', got {self.template!r}."
            )

    @property
    def setting(self) -> str | None:
        """The value for the engine's setting: empty if `apply` adds the instruction."""
        if self.in_engine and self.instruction is not None:
            return self._put_before("")
        plain = self.instruction is None or self.template == "{}{}"
        return None if plain and self.instruction == self.engine_default else ""

    def apply(self, text: str) -> str:
        """Return a text for the engine, with the instruction unless the engine adds it."""
        if self.instruction is None or self.in_engine or self.setting is None:
            return text
        return self._put_before(text)

    def _put_before(self, text: str) -> str:
        # A format from a shell may have a backslash and an "n" for a new line.
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
        SettingsError: It is not a whole number of at least 1.
    """
    if not is_whole(value) or value < 1:  # type: ignore[operator]
        raise SettingsError(f"batch_size must be at least 1, got {value!r}.")


def is_whole(value: object) -> bool:
    """Return whether a value is a whole number, numpy's included."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _one_device(value: object) -> str:
    text = str(value)
    return f"cuda:{text}" if text.isdecimal() else text
