"""Rewrites errors for the command line: options instead of Python's arguments."""

import re

from bge_rerank_adapters.settings import setting_names

_OPTIONS = {*setting_names(), "top_k", "score_threshold"} - {"token"}
_NAME = r"(?<![\w/.'\"-])([a-z]+(?:_[a-z]+)*)"
_GIVEN = re.compile(_NAME + r"=(\"[^\"]*\"|'[^']*'|[\w.:/-]*\w)")
_NAMED = re.compile(_NAME + r"(?![\w/=-])")
# The hub token is not an option, which would be kept in the shell's history.
_TOKEN = (
    "give a token= with the right to read it, or set HF_TOKEN",
    "set HF_TOKEN to one that may read it",
)


def in_shell_words(message: str) -> str:
    """Return a message in which `max_length=256` is `--max-length 256`, and so on.

    Other words stay as they are, also names of options that are English words, such as "model" and
    "device".
    """
    return _NAMED.sub(_named, _GIVEN.sub(_given, message.replace(*_TOKEN)))


def _given(found: re.Match[str]) -> str:
    name, value = found[1], found[2].strip("\"'")
    if name not in _OPTIONS:
        return found[0]
    if value in ("True", "None", "False"):
        return _option(name) if value == "True" else f"no {_option(name)}"
    return f"{_option(name)} {value}"


def _named(found: re.Match[str]) -> str:
    name = found[1]
    return _option(name) if "_" in name and name in _OPTIONS else name


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
