"""The scores of one engine for a first stage's documents."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from bge_rerank_adapters.calls.trec import Run, best_first


@dataclass(frozen=True, slots=True)
class Scored:
    """The scores of one engine for a first stage's documents.

    Attributes:
        name: The engine's name in reports.
        engine: The engine's `repr`, with its model, device and dtype.
        logits: For each query the logits of its documents, best first; scores, if the engine gives
            no logits.
        scores: For each query the scores of its documents, in [0, 1].
        seconds: For each query the time of its reranking.
        truncated: How many pairs had their document cut.
        queries_truncated: How many queries were cut.
        depth_seconds: The median seconds of a query by number of candidates; empty if not timed.
    """

    name: str
    engine: str
    logits: Run
    scores: Run
    seconds: dict[str, float]
    truncated: int
    queries_truncated: int = 0
    depth_seconds: dict[int, float] = field(default_factory=dict)

    @classmethod
    def from_rows(
        cls, name: str, rows: Iterable[dict[str, Any]], timed: Iterable[dict[str, Any]] = ()
    ) -> "Scored":
        """Return the scores from the rows of all queries and of the timed ones."""
        kept = list(rows)
        return cls(
            name=name,
            engine=kept[-1]["engine"] if kept else "",
            logits=_by_document(kept, "logits"),
            scores=_by_document(kept, "scores"),
            seconds={row["query"]: row["seconds"] for row in kept},
            truncated=sum(row["truncated"] for row in kept),
            queries_truncated=sum(row["query_truncated"] for row in kept),
            depth_seconds=_medians(timed),
        )

    @property
    def passages(self) -> int:
        """How many pairs were scored."""
        return sum(map(len, self.logits.values()))

    @property
    def passages_per_s(self) -> float:
        """Scored pairs per second; 0 without pairs."""
        total = sum(self.seconds.values())
        return self.passages / total if total else 0.0

    def latency_s(self, part: float = 0.5) -> float:
        """Return a quantile of the queries' times in seconds; 0.5 is the median."""
        times = sorted(self.seconds.values())
        if len(times) < 2:
            return times[0] if times else 0.0
        if part == 0.5:
            return statistics.median(times)
        return times[max(math.ceil(part * len(times)) - 1, 0)]

    def run(self, first_stage: Run, *, depth: int | None = None) -> Run:
        """Return the ranking with only `depth` documents of each query reranked.

        The others follow in the first stage's order, with lower scores.

        Args:
            first_stage: The documents that were scored, best first.
            depth: How many documents of each query are reranked; `None` is all.
        """
        ranking: Run = {}
        for query, found in first_stage.items():
            logits = self.logits[query]
            best = best_first({name: logits[name] for name in islice(found, depth)})
            lowest = min(best.values(), default=0.0)
            rest = islice(found, len(best), None)
            ranking[query] = best | {
                name: lowest - place for place, name in enumerate(rest, start=1)
            }
        return ranking


def _by_document(rows: Iterable[dict[str, Any]], name: str) -> Run:
    return {row["query"]: dict(zip(row["documents"], row[name], strict=True)) for row in rows}


def _medians(timed: Iterable[dict[str, Any]]) -> dict[int, float]:
    times: defaultdict[int, list[float]] = defaultdict(list)
    for row in timed:
        for depth, seconds in row["seconds"].items():
            times[int(depth)].append(seconds)
    return {depth: statistics.median(times[depth]) for depth in sorted(times)}
