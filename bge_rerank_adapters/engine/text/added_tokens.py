"""Tokens that a checkpoint's other files add to `tokenizer.json`, as transformers adds them.

It follows release 5.23 (`tokenization_utils_tokenizers.py`); 4.44 does the same.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from bge_rerank_adapters.engine.json_files import read_json
from bge_rerank_adapters.errors import CheckpointError

CONFIG = "tokenizer_config.json"
_MAP, _ADDED = "special_tokens_map.json", "added_tokens.json"
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def add_tokens(tokenizer: Tokenizer, folder: Path) -> None:
    """Add the tokens that only other files have.

    A token without an embedding in the model is refused when a text has it.

    Args:
        tokenizer: The content of `tokenizer.json`; changed in place.
        folder: Holds that and the other files.

    Raises:
        CheckpointError: A file is damaged, or two contradict each other.
        ValueError: A token has another id than a file says, or is no text.
        TypeError: An entry is of another type.
    """
    config = read_json(folder / CONFIG)
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    for number, token in _declared(config, folder):
        found = known.get(token.content)
        if found is not None and (number is None or _is_read_alike(found, token)):
            continue
        known[token.content] = token
        add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
        add([token])
        given = tokenizer.token_to_id(token.content)
        if number is not None and given != number:
            raise ValueError(f"the token {token.content!r} has the id {given}, not {number}")
    tokenizer.encode_special_tokens = _splits_special_tokens(config)


def token_of(folder: Path, role: str) -> str | None:
    """Return the token of a role such as `bos_token`, from the tokenizer's config files.

    Raises:
        CheckpointError: They contradict each other.
        KeyError: None names the role.
    """
    named = [
        (name, _text_of(found[role]))
        for name in (CONFIG, _MAP)
        if role in (found := read_json(folder / name))
    ]
    if not named:
        raise KeyError(role)
    if len({text for _, text in named}) > 1:
        told = " and ".join(f"{name} says {text!r}" for name, text in named)
        raise CheckpointError(
            f"{folder}: {told} for the {role}, and releases of transformers differ in which one "
            "counts; write the right one into both."
        )
    return named[0][1]


def content_of(token: Any) -> str:
    """Return a token's text.

    Raises:
        ValueError: There is none.
    """
    found = token["content"] if isinstance(token, dict) else token
    if not isinstance(found, str) or not found:
        raise ValueError(f"a token must be a text that is not empty, got {token!r}")
    return found


def _text_of(token: Any) -> str | None:
    return None if token is None else content_of(token)


def _declared(config: dict[str, Any], folder: Path) -> Iterator[tuple[int | None, AddedToken]]:
    """Yield the tokens that files name, and the ids that they give them."""
    decoder = config.get("added_tokens_decoder") or {}
    for number in sorted(map(int, decoder)):
        entries = dict(decoder[str(number)])
        content = entries.pop("content")
        yield number, AddedToken(content, **{k: v for k, v in entries.items() if k in _FLAGS})
    if not decoder:
        added = read_json(folder / _ADDED)
        for content in sorted(added, key=added.__getitem__):
            yield added[content], AddedToken(content)
    for role in _ROLES:
        if config.get(role) is not None:
            yield None, AddedToken(content_of(config[role]), special=True, normalized=False)
    for name in ("additional_special_tokens", "extra_special_tokens"):
        found = config.get(name) or []
        for each in found.values() if isinstance(found, dict) else found:
            yield None, AddedToken(content_of(each), special=True, normalized=False)


def _is_read_alike(first: AddedToken, second: AddedToken) -> bool:
    return all(getattr(first, flag) == getattr(second, flag) for flag in _FLAGS)


def _splits_special_tokens(config: dict[str, Any]) -> bool:
    """Return whether a text's special tokens are read as any other text."""
    splits = config.get("split_special_tokens", False)
    if not isinstance(splits, bool):
        raise TypeError(f"split_special_tokens must be true or false, got {splits!r}")
    return splits
