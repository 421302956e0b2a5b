"""Times queries with fewer candidates."""

import time
from itertools import islice
from typing import Any

from bge_rerank_adapters.calls.ranking import Scorer
from bge_rerank_adapters.calls.trec import Run
from bge_rerank_adapters.evaluation.collection import Collection

# Reranking one candidate changes nothing.
_STEPS = (2, 5, 10, 20, 50, 100, 200, 500)
_QUERIES = 20
"""How many queries are timed: enough for a median, without making a run much longer."""


def steps_below(depth: int) -> list[int]:
    """Return the numbers of candidates below `depth` that are timed."""
    return [step for step in _STEPS if step < depth]


def timed_queries(candidates: Run) -> list[str]:
    """Return the queries to time: evenly spread among those with the most candidates."""
    largest = max(map(len, candidates.values()), default=0)
    full = [query for query, found in candidates.items() if len(found) == largest]
    step = max(len(full) / _QUERIES, 1.0)
    return [full[int(place * step)] for place in range(min(_QUERIES, len(full)))]


def time_query(
    reranker: Scorer, query: str, collection: Collection, candidates: Run
) -> dict[str, Any]:
    """Return the seconds that reranking a query takes, for each number of candidates."""
    found = candidates[query]
    seconds = {}
    # Not timed: it warms up the model and the CPU's caches.
    reranker.rerank(collection.queries[query], [collection.documents[name] for name in found])
    for depth in (*steps_below(len(found)), len(found)):
        texts = [collection.documents[name] for name in islice(found, depth)]
        begin = time.perf_counter()
        reranker.rerank(collection.queries[query], texts)
        # Keys are strings in JSON.
        seconds[str(depth)] = time.perf_counter() - begin
    return {"query": query, "seconds": seconds}
