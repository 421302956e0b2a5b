"""What a reranking adds to the metadata of a host's document."""

from bge_rerank_adapters.calls.ranking import RankedDocument

ADDED_METADATA = (
    "relevance_score",
    "retrieval_index",
    "relevance_truncated",
    "relevance_query_truncated",
    "relevance_span_start",
    "relevance_span_end",
)
"""The names of all that is added; an earlier reranking of the same document may have left some."""


def added_metadata(
    ranked: RankedDocument, *, start: int, length: int
) -> dict[str, float | int | bool]:
    """Return what a reranking adds to a document's metadata, flat and ready for JSON.

    Args:
        ranked: The document's result.
        start: Where the text that users know begins in the text that was scored.
        length: How many characters it has.

    Returns:
        Score and index; `True` where the document, or the query, was cut; and with windows the
        first character of the best one and the one behind it, both the same where nothing of the
        text that users know is in it.
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
