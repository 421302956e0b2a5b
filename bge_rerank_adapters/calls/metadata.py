"""Metadata of a host's document: what is scored with its text, and what reranking adds."""

from collections.abc import Iterable, Mapping
from typing import Any

from bge_rerank_adapters.calls.ranked_document import RankedDocument

ADDED_METADATA = (
    "relevance_score",
    "retrieval_index",
    "relevance_truncated",
    "relevance_query_truncated",
    "relevance_span_start",
    "relevance_span_end",
)
"""All keys that may be added; an earlier reranking of the same document may have left some."""


def with_metadata(text: str, metadata: Mapping[str, Any], *, names: Iterable[str]) -> str:
    """Return a text after chosen metadata, each value on a line of its own.

    Args:
        text: The document's text.
        metadata: The document's metadata.
        names: Which of it, in this order; values that are missing or `None` are left out.
    """
    values = (metadata.get(name) for name in names)
    return "\n".join([*(str(value) for value in values if value is not None), text])


def added_metadata(
    ranked: RankedDocument, *, start: int, length: int
) -> dict[str, float | int | bool]:
    """Return the metadata to add to a document, as flat JSON values.

    Args:
        ranked: The document's result.
        start: Where the user's text begins in the text that was scored.
        length: Number of characters of the user's text.

    Returns:
        Score and index; `True` where the document or the query was cut; with windows, start and
        end of the best one within the user's text, which are equal if it has none of that text.
    """
    added: dict[str, float | int | bool] = {
        "relevance_score": float(ranked.score),
        "retrieval_index": int(ranked.index),
    }
    if ranked.truncated:
        added["relevance_truncated"] = True
    if ranked.query_truncated:
        added["relevance_query_truncated"] = True
    if ranked.span is not None:
        first, last = (min(max(place - start, 0), length) for place in ranked.span)
        added |= {"relevance_span_start": first, "relevance_span_end": last}
    return added
