"""What callers hand over as a query, as documents or as pairs: made plain texts, or refused."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bge_rerank_adapters.errors import InputTypeError


def check_query(query: object) -> str:
    """Return the query as an exact `str`; an empty one is allowed.

    Raises:
        InputTypeError: It is anything else.
    """
    if not isinstance(query, str):
        raise InputTypeError(f"The query must be a str, got {_kind(query)}.")
    return _plain(query)


def check_documents(documents: object) -> list[str]:
    """Return the documents as a new list of exact `str`; an empty list is allowed.

    Raises:
        InputTypeError: They are one string instead of a list of them, cannot be iterated over,
            have no order of their own (a dict, a set, a table), or hold something other than a
            `str`, whose position the message names.
    """
    check_ordered(documents, name="documents", wanted="a list of str")
    if isinstance(documents, str | bytes | bytearray) or not isinstance(documents, Iterable):
        raise InputTypeError(
            f"documents must be a list of str, got {_kind(documents)}; "
            "wrap a single document in a list."
        )
    texts: list[str] = []
    for index, text in enumerate(documents):
        if not isinstance(text, str):
            raise InputTypeError(f"documents[{index}] must be a str, got {_kind(text)}.")
        texts.append(_plain(text))
    return texts


def check_ordered(items: object, *, name: str, wanted: str) -> None:
    """Refuse what iterates over something else than its items, in any order, or over nothing.

    An index into the results of a dict, a set or a table would point nowhere, and what was scored
    would be keys or the names of columns.

    Raises:
        InputTypeError: It is one of these.
    """
    if isinstance(items, Mapping):
        action = "give list(items.values()), or the list that is meant"
    elif isinstance(items, set | frozenset):
        action = "give a list, whose order the results' index can refer to"
    # Of the type: pandas' Series answers to the labels of its index as well.
    elif hasattr(type(items), "columns") or hasattr(type(items), "column_names"):
        action = "give one column as a list, such as df['text'].tolist()"
    # An array without dimensions has the method and yet cannot be iterated over.
    elif getattr(items, "shape", None) == ():
        action = "wrap a single item in a list"
    else:
        return
    raise InputTypeError(f"{name} must be {wanted}, got {_kind(items)}; {action}.")


def check_pairs(pairs: object) -> list[tuple[str, str]]:
    """Return (query, document) pairs as a new list of tuples; an empty list is allowed.

    Raises:
        InputTypeError: The pairs are not a list, or one of them is not two `str`.
    """
    check_ordered(pairs, name="pairs", wanted="a list of (query, document) tuples")
    if isinstance(pairs, str | bytes) or not isinstance(pairs, Iterable):
        raise InputTypeError(
            f"pairs must be a list of (query, document) tuples, got {_kind(pairs)}."
        )
    checked: list[tuple[str, str]] = []
    for index, pair in enumerate(pairs):
        if isinstance(pair, str | bytes) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise InputTypeError(
                f"pairs[{index}] must be a (query, document) tuple, got {_kind(pair)}."
            )
        for name, text in zip(("query", "document"), pair, strict=True):
            if not isinstance(text, str):
                raise InputTypeError(
                    f"The {name} of pairs[{index}] must be a str, got {_kind(text)}."
                )
        checked.append((_plain(pair[0]), _plain(pair[1])))
    return checked


def _plain(text: str) -> str:
    """Return the characters as an exact `str`, the same object where it is one already.

    Of a class of its own a text may compare as equal to another text, and identical documents
    share a score; numpy's would come back in the results.
    """
    # Not str(text), which a class may answer with something else: an enum does, with its name.
    return text if type(text) is str else str.__str__(text)


def _kind(value: Any) -> str:
    """Name a value's type, and its text where that is short."""
    shown = repr(value)
    return type(value).__name__ if len(shown) > 40 else f"{type(value).__name__} ({shown})"
