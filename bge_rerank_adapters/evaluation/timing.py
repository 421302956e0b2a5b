"""How long a query takes with fewer candidates, measured."""

import time
from itertools import islice
from typing import Any

from bge_rerank_adapters.calls.ranking import Scorer
from bge_rerank_adapters.calls.trec import Run
from bge_rerank_adapters.evaluation.collection import Collection

# One candidate is reranked by nothing.
_STEPS = (2, 5, 10, 20, 50, 100, 200, 500)
_QUERIES = 20
"""Queries that are timed; the median of so many says enough, and the rest of a run stays short."""


def steps_below(depth: int) -> list[int]:
    """Return the numbers of candidates that are timed beside all there are."""
    return [step for step in _STEPS if step < depth]


def timed_queries(candidates: Run) -> list[str]:
    """Return the queries that are timed: of those with most candidates, evenly spread."""
    most = max(map(len, candidates.values()), default=0)
    full = [query for query, found in candidates.items() if len(found) == most]
    step = max(len(full) / _QUERIES, 1.0)
    return [full[int(place * step)] for place in range(min(_QUERIES, len(full)))]


def time_query(
    reranker: Scorer, query: str, collection: Collection, candidates: Run
) -> dict[str, Any]:
    """Return the seconds that reranking a query takes, for each number of candidates."""
    found = candidates[query]
    seconds = {}
    # Not timed: it finds the model warm and the text in the processor's caches for those that are.
    reranker.rerank(collection.queries[query], [collection.documents[name] for name in found])
    for depth in (*steps_below(len(found)), len(found)):
        texts = [collection.documents[name] for name in islice(found, depth)]
        begin = time.perf_counter()
        reranker.rerank(collection.queries[query], texts)
        # JSON has texts alone as names.
        seconds[str(depth)] = time.perf_counter() - begin
    return {"query": query, "seconds": seconds}
