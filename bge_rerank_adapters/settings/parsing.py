"""Parses settings from command-line options and environment variables."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class TextFormat:
    """How a setting is written as text.

    Attributes:
        read: Parses the text of an environment variable. Its `ValueError` completes a sentence
            that begins with the variable's name.
        option: The type of the command-line option.
        least: Lowest number that the command-line option accepts.
    """

    read: Callable[[str], Any]
    option: Any
    least: int | None = None


def _flag(value: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    try:
        return words[value.strip().lower()]
    except KeyError as error:
        raise ValueError("must be true or false") from error


def _whole(value: str) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise ValueError("must be a whole number") from error


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise ValueError("must be a number") from error


def _texts(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(","))


def _one_or_more(value: str) -> str | tuple[str, ...]:
    texts = _texts(value)
    return texts if len(texts) > 1 else texts[0]


def _wholes(value: str) -> tuple[int, ...]:
    return tuple(_whole(part) for part in value.split(","))


def _auto_or_whole(value: str) -> str | int:
    return value if value == "auto" else _whole(value)


TEXT = TextFormat(str, str)
TEXTS = TextFormat(_texts, str)
ONE_OR_MORE = TextFormat(_one_or_more, str)
FLAG = TextFormat(_flag, bool)
WHOLE = TextFormat(_whole, int, least=0)
COUNT = TextFormat(_whole, int, least=1)
COUNTS = TextFormat(_wholes, list[int], least=1)
AUTO_OR_COUNT = TextFormat(_auto_or_whole, str)
NUMBER = TextFormat(_number, float)
