"""Checks of single settings: each returns the value as it is kept, or raises `SettingsError`."""

import math
import numbers
import os
from collections.abc import Callable
from typing import Any

from bge_rerank_adapters.errors import SettingsError

Check = Callable[[str, object], Any]
"""Takes a setting's name, for the message, and the value that was given."""


def optional(check: Check) -> Check:
    """Return a check that also allows `None`."""
    return lambda name, value: None if value is None else check(name, value)


def text(name: str, value: object) -> str:
    """Check a text that must not be empty; a path is one."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value.strip():
        raise SettingsError(f"{name} must be a non-empty str or a path, got {value!r}.")
    return value


def any_text_or_none(name: str, value: object) -> str | None:
    """Check a text that is put beside another one: it may be empty."""
    if not isinstance(value, str | None):
        raise SettingsError(f"{name} must be a str or None, got {value!r}.")
    return value


def secret(name: str, value: object) -> str | None:
    """Check a secret, which no message shows."""
    if not isinstance(value, str | None):
        raise SettingsError(f"{name} must be a str or None, got a {type(value).__name__}.")
    return value


def header_secret(name: str, value: object) -> str | None:
    """Check a secret that goes into an HTTP header, where other characters break the request."""
    key = secret(name, value)
    if key is not None and (not key or not key.isprintable() or " " in key):
        raise SettingsError(
            f"{name} must be one or more characters without spaces, line ends or control "
            "characters; a key that was read from a file often ends with one. What was given is "
            "not shown, since it is a secret."
        )
    return key


def flag(name: str, value: object) -> bool:
    """Check a truth value; numbers are refused."""
    if not isinstance(value, bool):
        raise SettingsError(f"{name} must be True or False, got {value!r}.")
    return value


def at_least(least: int) -> Check:
    """Return a check for whole numbers from `least` on, numpy's among them."""

    def check(name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
            raise SettingsError(
                f"{name} must be a whole number of at least {least}, got {value!r}."
            )
        return int(value)

    return check


count = at_least(1)


def auto_or_count(name: str, value: object) -> int | str:
    """Check `"auto"` or a whole number from 1 on."""
    if isinstance(value, str) and value == "auto":
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise SettingsError(
            f'{name} must be "auto" or a whole number of at least 1, got {value!r}.'
        )
    return int(value)


def above_zero(unit: str) -> Check:
    """Return a check for finite numbers above 0; the message names their unit."""

    def check(name: str, value: object) -> float:
        if not _is_number(value) or not value > 0:  # type: ignore[operator]
            raise SettingsError(f"{name} must be a number of {unit} above 0, got {value!r}.")
        return float(value)  # type: ignore[arg-type]

    return check


seconds = above_zero("seconds")


def zero_or_more(name: str, value: object) -> float:
    """Check a finite number from 0 on."""
    if not _is_number(value) or value < 0:  # type: ignore[operator]
        raise SettingsError(f"{name} must be a number of at least 0, got {value!r}.")
    return float(value)  # type: ignore[arg-type]


def _is_number(value: object) -> bool:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and math.isfinite(value)  # type: ignore[arg-type]


def one_of(*allowed: Any, or_none: bool = False, shown: Callable[[Any], str] = repr) -> Check:
    """Return a check for values of a short list, all of one type; `shown` writes them."""

    def check(name: str, value: object) -> Any:
        if or_none and value is None:
            return None
        # True and 2.0 are equal to numbers that are allowed.
        of_type = isinstance(value, type(allowed[0])) and not isinstance(value, bool)
        if not of_type or value not in allowed:
            choices = ", ".join(map(shown, allowed)) + (", or None" if or_none else "")
            raise SettingsError(f"{name} must be one of {choices}, got {value!r}.")
        return value

    return check
