"""Tables of settings: a frozen dataclass in which each field is a row, with its default and check.

A row also has the text for documentation and command-line help, and the setting's text format. Each
is written once: whatever shows or reads settings takes them from `rows`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from textwrap import fill, indent
from typing import Any, TypeVar

from bge_rerank_adapters.settings.checks import Check
from bge_rerank_adapters.settings.parsing import TEXT, TextFormat

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
_LINE_LENGTH = 100
_PLACEHOLDER = re.compile(r"^( *)\*\*\w+: .*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Row:
    """One setting.

    Attributes:
        name: Its name everywhere.
        default: `dataclasses.MISSING` where a value is required.
        check: Returns the normalised value, or raises `SettingsError`.
        text: What it is, in Markdown, without a full stop.
        none: What the default `None` means; empty where that is obvious.
        format: How it is written as text.
        secret: Whether it is left out of reprs, dumps and pickles.
    """

    name: str
    default: Any
    check: Check
    text: str
    none: str = ""
    format: TextFormat = TEXT
    secret: bool = False

    @property
    def sentence(self) -> str:
        """The text with the meaning of `None`, as a sentence."""
        return f"{self.text}{f'; `None` is {self.none}' if self.none else ''}."


def setting(default: T, check: Check, text: str, *, secret: bool = False, **more: Any) -> T:
    """Return a dataclass field that is a row of a table; the parameters are those of `Row`.

    Its declared type is the default's, so that type checkers see a field with a default.
    """
    about = row(check, text, secret=secret, **more)
    return field(default=default, repr=not secret, metadata=about)


def row(check: Check, text: str, **more: Any) -> Mapping[str, Any]:
    """Return the metadata of a dataclass field that is a row."""
    return {"row": {"check": check, "text": text, **more}}


def rows(table: type) -> dict[str, Row]:
    """Return the rows of a table by their names, in order."""
    return {
        each.name: Row(name=each.name, default=each.default, **each.metadata["row"])
        for each in fields(table)
        if "row" in each.metadata
    }


@dataclass(frozen=True)
class Table:
    """Base of settings: checks them when they are made, and serialises them without secrets."""

    def __post_init__(self) -> None:
        """Check and normalise each row."""
        for name, each in rows(type(self)).items():
            object.__setattr__(self, name, each.check(name, getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values, without secrets."""
        names = (each.name for each in rows(type(self)).values() if not each.secret)
        plain = {name: getattr(self, name) for name in names}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in plain.items()
        }

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings without secrets."""
        return partial(type(self), **self.to_dict()), ()


def documented(table: type[T]) -> type[T]:
    """Describe the rows in a table's docstring."""
    table.__doc__ = with_entries(table.__doc__, rows(table).values())
    return table


def documents(table: type) -> Callable[[F], F]:
    """Return a decorator that describes a table's rows in a function's docstring."""

    def decorate(function: F) -> F:
        function.__doc__ = with_entries(function.__doc__, rows(table).values())
        return function

    return decorate


def with_entries(documentation: str | None, shown: Iterable[Row]) -> str | None:
    """Return a docstring with an entry for each row in place of its line that begins with `**`."""

    def entries(found: re.Match[str]) -> str:
        return indent(_entries(shown, width=_LINE_LENGTH - len(found[1])), found[1])

    return documentation and _PLACEHOLDER.sub(entries, documentation)


def _entries(shown: Iterable[Row], *, width: int) -> str:
    return "\n".join(
        fill(
            f"{each.name}: {each.sentence}",
            width,
            subsequent_indent=" " * 4,
            break_on_hyphens=False,
        )
        for each in shown
    )
