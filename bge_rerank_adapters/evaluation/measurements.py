"""An experiment's numbers: metrics, comparisons, scores and times."""

from collections.abc import Sequence
from typing import Any

from bge_rerank_adapters.calls.trec import Run
from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.evaluation.collection import Collection
from bge_rerank_adapters.evaluation.metrics import NDCG, Comparison, Metrics, compare, measure
from bge_rerank_adapters.evaluation.result_files import FIRST_STAGE
from bge_rerank_adapters.evaluation.scored import Scored

_DEPTHS = (1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 500, 1000)


class Measurements:
    """What reranking changed on a collection.

    Attributes:
        collection: The collection.
        first_stage: The documents that were reranked, in the first stage's order.
        scored: The scores of each engine.
        depth: The maximum number of documents of a query.
        before: The first stage's metrics.
        after: Each engine's metrics, by its name.
        first_stage_name: The name of the first stage in tables and pictures.
    """

    def __init__(
        self,
        collection: Collection,
        first_stage: Run,
        scored: Sequence[Scored],
        *,
        first_stage_name: str = FIRST_STAGE,
    ) -> None:
        """Compute the metrics; the arguments are the attributes of the same names."""
        self.collection, self.first_stage, self.scored = collection, first_stage, list(scored)
        self.first_stage_name = first_stage_name
        self.depth = max(map(len, first_stage.values()), default=0)
        self.before = self._measure(first_stage)
        self.after = {each.name: self._measure(each.run(first_stage)) for each in self.scored}

    def _measure(self, run: Run) -> Metrics:
        return measure(self.collection.judgements, run, recall_at=sorted({10, max(self.depth, 10)}))

    def __getitem__(self, name: str) -> Scored:
        """Return the scores of an engine.

        Raises:
            SettingsError: There is no engine of that name.
        """
        for each in self.scored:
            if each.name == name:
                return each
        names = ", ".join(each.name for each in self.scored)
        raise SettingsError(f"There is no engine {name!r} in this report; there are {names}.")

    def comparison(self, name: str, *, metric: str = NDCG) -> Comparison:
        """Return how an engine changed a metric of the first stage."""
        return compare(self.before, self.after[self[name].name], metric=metric)

    def depths(self) -> list[int]:
        """Return some numbers of candidates up to all there are, for `by_depth`."""
        return [depth for depth in _DEPTHS if depth < self.depth] + [self.depth]

    def by_depth(self, name: str, *, metric: str = NDCG) -> dict[int, float]:
        """Return a metric for several numbers of reranked candidates, from one scoring."""
        scored = self[name]
        judgements = self.collection.judgements
        return {
            depth: measure(judgements, scored.run(self.first_stage, depth=depth)).mean[metric]
            for depth in self.depths()
        }

    def gain_by_depth(self, name: str, *, metric: str = NDCG) -> dict[int, Comparison]:
        """Return what `comparison` returns, for several numbers of reranked candidates."""
        scored, judgements = self[name], self.collection.judgements
        return {
            depth: compare(
                self.before,
                measure(judgements, scored.run(self.first_stage, depth=depth)),
                metric=metric,
            )
            for depth in sorted({*self.depths(), *scored.depth_seconds})
        }

    def scores(self, name: str) -> tuple[list[float], list[float]]:
        """Return the scores of relevant documents and of all others, each in [0, 1]."""
        relevant: list[float] = []
        other: list[float] = []
        for query, found in self[name].scores.items():
            grades = self.collection.judgements[query]
            for document, score in found.items():
                (relevant if grades.get(document, 0) > 0 else other).append(score)
        return relevant, other

    def to_records(self) -> list[dict[str, Any]]:
        """Return a plain dict for the first stage and each engine, as pandas takes them.

        Times are in milliseconds for a query; `p_value` is of nDCG@10 against the first stage.
        """
        records: list[dict[str, Any]] = [{"engine": FIRST_STAGE, **self.before.mean}]
        for each in self.scored:
            test = self.comparison(each.name)
            records.append(
                {
                    "engine": each.name,
                    **self.after[each.name].mean,
                    "gain": test.difference,
                    "p_value": test.p_value,
                    "better": test.better,
                    "worse": test.worse,
                    "latency_ms": 1000 * each.latency_s(),
                    "latency_p95_ms": 1000 * each.latency_s(0.95),
                    "passages_per_s": each.passages_per_s,
                    "truncated": each.truncated,
                    "queries_truncated": each.queries_truncated,
                }
            )
        return records

    def per_query(self) -> list[dict[str, Any]]:
        """Return a plain dict for each query: each metric before, and after each engine."""
        records = []
        for query in self.collection.queries:
            record: dict[str, Any] = {"query": query}
            for name, metrics in [(FIRST_STAGE, self.before), *self.after.items()]:
                record[name] = {metric: of[query] for metric, of in metrics.per_query.items()}
            records.append(record)
        return records
