"""Checks of single settings: each returns the normalised value or raises `SettingsError`."""

import math
import numbers
import os
import re
from collections.abc import Callable
from typing import Any

from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.settings.other_names import dtype_here

DEVICE_TYPES = ("cpu", "cuda", "mps", "xpu", "npu", "hpu", "mtia")
DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")
_DEVICE = re.compile(rf"auto|({'|'.join(DEVICE_TYPES)})(:\d+)?")

Check = Callable[[str, object], Any]
"""Takes a setting's name, for the message, and the value that was given."""


def optional(check: Check) -> Check:
    """Return a check that also allows `None`."""
    return lambda name, value: None if value is None else check(name, value)


def text(name: str, value: object) -> str:
    """Check a non-empty text or path."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value.strip():
        raise SettingsError(f"{name} must be a non-empty str or a path, got {value!r}.")
    return value


def any_text_or_none(name: str, value: object) -> str | None:
    """Check a text that may be empty, or `None`."""
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
    """Return a check for whole numbers of at least `least`, including numpy's."""

    def check(name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
            raise SettingsError(
                f"{name} must be a whole number of at least {least}, got {value!r}."
            )
        return int(value)

    return check


count = at_least(1)


def auto_or_count(name: str, value: object) -> int | str:
    """Check `"auto"` or a whole number of at least 1."""
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
    """Check a finite number of at least 0."""
    if not _is_number(value) or value < 0:  # type: ignore[operator]
        raise SettingsError(f"{name} must be a number of at least 0, got {value!r}.")
    return float(value)  # type: ignore[arg-type]


def _is_number(value: object) -> bool:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and math.isfinite(value)  # type: ignore[arg-type]


def one_of(*allowed: Any, or_none: bool = False, shown: Callable[[Any], str] = repr) -> Check:
    """Return a check for a few allowed values of one type, which messages show by `shown`."""

    def check(name: str, value: object) -> Any:
        if or_none and value is None:
            return None
        # True and 2.0 compare as equal to allowed numbers.
        of_type = isinstance(value, type(allowed[0])) and not isinstance(value, bool)
        if not of_type or value not in allowed:
            choices = ", ".join(map(shown, allowed)) + (", or None" if or_none else "")
            raise SettingsError(f"{name} must be one of {choices}, got {value!r}.")
        return value

    return check


def device(name: str, value: object) -> str | tuple[str, ...]:
    """Check a device, or a list of them."""
    if isinstance(value, list | tuple):
        devices = tuple(_one_device(name, each) for each in value)
        if not devices:
            raise SettingsError(f"{name} must name at least one device, got {value!r}.")
        return devices[0] if len(devices) == 1 else devices
    return _one_device(name, value)


def _one_device(name: str, value: object) -> str:
    text = str(value)
    if not _DEVICE.fullmatch(text):
        raise SettingsError(
            f'{name} {text!r} is not known; use "auto", or one of {", ".join(DEVICE_TYPES)}, '
            'with an index if need be ("cuda:1"), or a list of these.'
        )
    return text


def dtype(name: str, value: object) -> str:
    """Check a dtype, given by name or as torch's own."""
    text = str(value).removeprefix("torch.")
    if text not in DTYPES:
        here = dtype_here(text)
        wrong = "is not known" if here is None else f"is called {here!r} here"
        raise SettingsError(f"{name} {text!r} {wrong}; use one of {', '.join(DTYPES)}.")
    return text


def one_layer(name: str, value: object) -> int:
    """Check the number of a layer, or a list with one, as users of FlagEmbedding give it."""
    if isinstance(value, list | tuple):
        if len(value) != 1:
            raise SettingsError(
                f"{name} must be one layer, or a list of one, got {value!r}; each layer gives "
                "scores of its own, so make an engine for each."
            )
        value = value[0]
    return count(name, value)  # type: ignore[no-any-return]


def layers(name: str, value: object) -> tuple[int, ...]:
    """Check the numbers of one or more layers."""
    given = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not given:
        raise SettingsError(f"{name} must name at least one layer, got {value!r}.")
    return tuple(sorted({count(name, layer) for layer in given}))
