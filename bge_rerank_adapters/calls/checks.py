"""Checks queries, documents and pairs, and returns them as plain texts."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from bge_rerank_adapters.calls.documents import is_one_document, kind, text_of
from bge_rerank_adapters.errors import InputTypeError

T = TypeVar("T")


def check_query(query: object) -> str:
    """Return the query as an exact `str`; an empty one is allowed.

    Raises:
        InputTypeError: It is anything else.
    """
    if not isinstance(query, str):
        raise InputTypeError(f"The query must be a str, got {kind(query)}.")
    return _plain(query)


def check_documents(documents: object) -> list[str]:
    """Return the documents' texts as a new list of exact `str`; an empty list is allowed.

    Raises:
        InputTypeError: As `list_documents`; or one has no text or several, and the message names
            its position.
    """
    return [
        _plain(text_of(document, name=f"documents[{index}]"))
        for index, document in enumerate(list_documents(documents))
    ]


def list_documents(documents: object) -> list[Any]:
    """Return the documents as a new list, without checking each.

    Raises:
        InputTypeError: They are a single document, cannot be iterated over, or have no order (a
            dict, a set, a table).
    """
    # Iterating over a single document of a host would give its fields.
    one = isinstance(documents, str | bytes | bytearray) or is_one_document(documents)
    if not one:
        check_ordered(documents, name="documents", wanted="a list of str")
    if one or not isinstance(documents, Iterable):
        raise InputTypeError(
            f"documents must be a list of str, got {kind(documents)}; "
            "wrap a single document in a list."
        )
    return list(documents)


def check_host_documents(
    documents: object,
    kind: type[T],
    *,
    host: str,
    advice: str,
    name: str = "documents",
    single: tuple[type, ...] = (),
) -> list[T]:
    """Return a host's documents as a new list.

    Args:
        documents: The documents.
        kind: The host's class of a document.
        host: The host's name in errors.
        advice: How to make a document, for errors.
        name: The argument's name in errors.
        single: Other classes of a single document.

    Raises:
        InputTypeError: They are not a list, or one is not of this class; the message says which.
    """
    # A single document may be iterable itself, over its fields.
    if isinstance(documents, (str, bytes, kind, *single)) or not isinstance(documents, Iterable):
        raise InputTypeError(
            f"{name} must be a list of {kind.__name__}, got {type(documents).__name__}; "
            "wrap a single one in a list, and give [] for none."
        )
    found = list(documents)
    for index, each in enumerate(found):
        if not isinstance(each, kind):
            raise InputTypeError(
                f"{name}[{index}] must be a {host} {kind.__name__}, got {type(each).__name__}; "
                f"{advice}."
            )
    return found


def check_ordered(items: object, *, name: str, wanted: str) -> None:
    """Refuse dicts, sets, tables and arrays without dimensions.

    Iterating over them gives keys or column names, has no order that an index could refer to, or
    fails.

    Raises:
        InputTypeError: It is one of these.
    """
    if isinstance(items, Mapping):
        action = "give list(items.values()), or the list that is meant"
    elif isinstance(items, set | frozenset):
        action = "give a list, whose order the results' index can refer to"
    # Ask the type: on an object of pandas' Series, index labels are attributes too.
    elif hasattr(type(items), "columns") or hasattr(type(items), "column_names"):
        action = "give one column as a list, such as df['text'].tolist()"
    # An array without dimensions has __iter__ and yet cannot be iterated over.
    elif getattr(items, "shape", None) == ():
        action = "wrap a single item in a list"
    else:
        return
    raise InputTypeError(f"{name} must be {wanted}, got {kind(items)}; {action}.")


def check_pairs(pairs: object) -> list[tuple[str, str]]:
    """Return (query, document) pairs as a new list of tuples; an empty list is allowed.

    Raises:
        InputTypeError: The pairs are not a list, or one of them is not two `str`.
    """
    check_ordered(pairs, name="pairs", wanted="a list of (query, document) tuples")
    if isinstance(pairs, str | bytes) or not isinstance(pairs, Iterable):
        raise InputTypeError(
            f"pairs must be a list of (query, document) tuples, got {kind(pairs)}."
        )
    checked: list[tuple[str, str]] = []
    for index, pair in enumerate(pairs):
        if isinstance(pair, str | bytes) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise InputTypeError(
                f"pairs[{index}] must be a (query, document) tuple, got {kind(pair)}."
            )
        query, document = pair
        if not isinstance(query, str):
            raise InputTypeError(f"The query of pairs[{index}] must be a str, got {kind(query)}.")
        text = text_of(document, name=f"The document of pairs[{index}]")
        checked.append((_plain(query), _plain(text)))
    return checked


def _plain(text: str) -> str:
    """Return the text as an exact `str`: the same object if it is one already.

    A subclass of `str` may define its own equality, and equal documents share a score. Strings of
    numpy would also come back in the results.
    """
    # Not str(text), which a subclass may override: an enum returns its name.
    return text if type(text) is str else str.__str__(text)
