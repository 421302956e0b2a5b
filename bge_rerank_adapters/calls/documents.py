"""Documents as callers pass them, and the text of each, found without importing any host."""

from collections.abc import Mapping
from typing import Any, Protocol

from bge_rerank_adapters.errors import InputTypeError

TEXT_NAMES = ("text", "content", "page_content")
"""The keys under which a mapping may have its text."""

_ADVICE = (
    f"give its text, or an object with one: a mapping with exactly one of {', '.join(TEXT_NAMES)}, "
    "a Document of LangChain, a node of LlamaIndex or a hit of Milvus"
)
# LlamaIndex' MetadataMode.EMBED, which is a str.
_EMBED = "embed"


class HasPageContent(Protocol):
    """A document of LangChain."""

    page_content: str


class HasGetContent(Protocol):
    """A node of LlamaIndex, with or without a score."""

    def get_content(self, metadata_mode: Any = ...) -> str:
        """Return the text after the metadata that the mode selects."""
        ...


DocumentLike = str | Mapping[Any, Any] | HasPageContent | HasGetContent
"""A text, or an object with one: a dict, a Milvus hit, a LangChain document, a LlamaIndex node."""


def text_of(document: object, *, name: str) -> str:
    """Return the text of a document.

    Args:
        document: A text; a mapping with exactly one of `TEXT_NAMES`; a hit of pymilvus, whose
            `entity` is such a mapping; a document of LangChain; or a node of LlamaIndex, which is
            read as for an embedding.
        name: Its name in errors.

    Raises:
        InputTypeError: It is something else, or has more than one text.
    """
    if isinstance(document, str):
        return document
    if isinstance(document, Mapping):
        return _text_of_mapping(document, name=name)
    found = _text_of_object(document)
    if not isinstance(found, str):
        raise InputTypeError(f"{name} must be a str, got {kind(document)}; {_ADVICE}.")
    return found


def is_one_document(value: object) -> bool:
    """Return whether a value is a single document that is not a `str`."""
    if isinstance(value, Mapping):
        return len(_texts_of_mapping(value)) == 1
    return isinstance(_text_of_object(value), str)


def kind(value: Any) -> str:
    """Return a value's type for an error, with its repr if that is short."""
    shown = repr(value)
    return type(value).__name__ if len(shown) > 40 else f"{type(value).__name__} ({shown})"


def _text_of_mapping(document: Mapping[Any, Any], *, name: str) -> str:
    texts = _texts_of_mapping(document)
    if len(texts) != 1:
        has = " and ".join(texts) or "none of them"
        raise InputTypeError(
            f"{name} must be a str, or have exactly one of {', '.join(TEXT_NAMES)}, but this "
            f"{type(document).__name__} has {has}; give the text that is meant."
        )
    [(found, text)] = texts.items()
    if not isinstance(text, str):
        raise InputTypeError(f"The {found} of {name} must be a str, got {kind(text)}.")
    return text


def _texts_of_mapping(document: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a mapping's entries under `TEXT_NAMES`, or those of a hit's `entity`."""
    texts = {name: document[name] for name in TEXT_NAMES if _has(document, name)}
    fields = document.get("entity")
    if texts or not isinstance(fields, Mapping):
        return texts
    return {name: fields[name] for name in TEXT_NAMES if _has(fields, name)}


def _has(mapping: Mapping[Any, Any], name: str) -> bool:
    return name in mapping and mapping[name] is not None


def _text_of_object(document: object) -> object:
    if isinstance(document, type):
        return None
    node = getattr(document, "node", document)
    # Objects of other libraries have one of these methods; only LlamaIndex' nodes have both.
    if hasattr(node, "get_content") and hasattr(node, "get_metadata_str"):
        return node.get_content(metadata_mode=_EMBED)
    return getattr(document, "page_content", None)
