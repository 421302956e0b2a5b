"""Reads entries of a `config.json` of the expected type, as transformers 5 demands it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bge_rerank_adapters.errors import CheckpointError

_MISSING = object()


@dataclass(frozen=True, slots=True)
class Entries:
    """The entries of a `config.json`, or of an object in it.

    Each method returns an entry, or the default if there is none, and raises `CheckpointError` if
    the entry is of another type or range, or if it is missing without a default.

    Attributes:
        values: The entries by name.
        path: The path of the `config.json`.
        inside: The name of the object in it that holds the entries; `""` for the file itself.
    """

    values: Mapping[str, Any]
    path: Path
    inside: str = ""

    def whole(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """Return a whole number of at least `least`."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.refusal(name, f"a whole number of at least {least}")
        return value

    def optional_whole(self, name: str, default: int | None = None) -> int | None:
        """Return a whole number of at least 1; `None` if the entry is null."""
        if self.values.get(name, default) is None:
            return None
        return self.whole(name, default)

    def number(self, name: str, default: float | None = None, *, above: float = -math.inf) -> float:
        """Return a finite number above `above`."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refusal(name, "a number")
        if not (math.isfinite(value) and value > above):
            least = "" if above == -math.inf else f" above {above:g}"
            raise self.refusal(name, f"a finite number{least}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.refusal(name, "true or false")
        return value

    def text(self, name: str, default: str) -> str:
        """Return a string."""
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self.refusal(name, "a string")
        return value

    def within(self, name: str) -> "Entries":
        """Return the entries of an object, none if it is missing or null."""
        value = self.values.get(name)
        if not isinstance(value, dict | None):
            raise self.refusal(name, "an object or null")
        return Entries(value or {}, self.path, name)

    def refusal(self, name: str, wanted: str) -> CheckpointError:
        """Return the error for an entry that is not what is wanted."""
        full = f"{self.inside}.{name}" if self.inside else name
        given = f"got {self.values[name]!r}" if name in self.values else "and is missing"
        return CheckpointError(
            f"{self.path}: {full} must be {wanted}, {given}; copy or download the config.json that "
            "came with the weights."
        )

    def _value(self, name: str, default: object) -> Any:
        return self.values.get(name, _MISSING if default is None else default)
