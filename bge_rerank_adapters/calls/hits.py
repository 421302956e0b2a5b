"""Hits of a search in Milvus: mappings with an id, a distance and the fields as `entity`."""

from collections.abc import Mapping
from typing import Any

from bge_rerank_adapters.calls.documents import kind
from bge_rerank_adapters.errors import InputTypeError

_WANTED = "hits must be the hits of one query, such as result[0] of MilvusClient.search"


def hits_of_one_query(hits: object) -> list[Any]:
    """Return the hits of one query, given as themselves or as a list with one list of hits.

    Raises:
        InputTypeError: They are neither, or the hits of several queries.
    """
    found = _listed(hits)
    lists = [each for each in found if isinstance(each, list | tuple)]
    if len(lists) > 1:
        raise InputTypeError(f"{_WANTED}, got those of {len(lists)} queries; rerank one by one.")
    return _listed(lists[0]) if lists and len(found) == 1 else found


def text_of_hit(hit: object, field: str, index: int) -> str:
    """Return the text of a hit, from its `entity` if it has one.

    Raises:
        InputTypeError: It is no hit, or has no such text.
    """
    if not isinstance(hit, Mapping):
        raise InputTypeError(f"{_WANTED}; hits[{index}] is no hit but {kind(hit)}.")
    fields = hit.get("entity")
    text = (fields if isinstance(fields, Mapping) else hit).get(field)
    if not isinstance(text, str):
        raise InputTypeError(
            f"hits[{index}] has no text in its field {field!r} ({kind(text)}); search with "
            f"output_fields=[{field!r}], or name the field that has it as text_field."
        )
    return text


def _listed(hits: object) -> list[Any]:
    if isinstance(hits, str | bytes | Mapping) or not hasattr(type(hits), "__iter__"):
        raise InputTypeError(f"{_WANTED}, got {kind(hits)}.")
    # Not `list(hits)`: pymilvus' lists decode some fields in their `__iter__`, which that skips.
    return list(iter(hits))  # type: ignore[call-overload]
