"""An experiment's numbers, as objects, as a table and as files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bge_rerank_adapters.calls.trec import (
    FIRST_STAGE,
    Run,
    check_file_names,
    file_name,
    make_folder,
    write_run,
)
from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.evaluation.collection import Collection
from bge_rerank_adapters.evaluation.metrics import NDCG, Comparison, Metrics, compare, measure
from bge_rerank_adapters.evaluation.scored import Scored
from bge_rerank_adapters.evaluation.view import answer, to_html, to_text

_DEPTHS = (1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 500, 1000)


class Report:
    """What reranking changed on a collection.

    Attributes:
        collection: What was searched.
        first_stage: The documents that were reranked, in the order they came.
        scored: What each engine said of them.
        depth: The most documents that a query had.
        before: The first stage's metrics.
        after: Each engine's metrics, by its name.
        first_stage_name: What tables and pictures call the first stage.
    """

    def __init__(
        self,
        collection: Collection,
        first_stage: Run,
        scored: Sequence[Scored],
        *,
        first_stage_name: str = FIRST_STAGE,
    ) -> None:
        """Measure what was scored; the arguments are the attributes of the same names."""
        self.collection, self.first_stage, self.scored = collection, first_stage, list(scored)
        self.first_stage_name = first_stage_name
        self.depth = max(map(len, first_stage.values()), default=0)
        self.before = self._measure(first_stage)
        self.after = {each.name: self._measure(each.run(first_stage)) for each in self.scored}

    def _measure(self, run: Run) -> Metrics:
        return measure(self.collection.judgements, run, recall_at=sorted({10, max(self.depth, 10)}))

    def __getitem__(self, name: str) -> Scored:
        """Return what the engine of a name said.

        Raises:
            SettingsError: There is none of that name.
        """
        for each in self.scored:
            if each.name == name:
                return each
        names = ", ".join(each.name for each in self.scored)
        raise SettingsError(f"There is no engine {name!r} in this report; there are {names}.")

    def comparison(self, name: str, *, metric: str = NDCG) -> Comparison:
        """Return whether an engine changed a metric of the first stage."""
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

    def answer(self, name: str) -> str:
        """Return in a sentence whether reranking with an engine helps, with its interval."""
        return answer(self, name)

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
        """Return a plain dict for the first stage and each engine; pandas makes a table of them.

        Times are in milliseconds for a query, `p_value` is of nDCG@10 against the first stage.
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

    def __str__(self) -> str:
        """Return the answers and the table in plain columns."""
        return to_text(self)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text("Report(...)" if cycle else str(self))

    def _repr_html_(self) -> str:
        return to_html(self)

    def save(self, folder: str | Path) -> list[Path]:
        """Write `report.json`, `per-query.jsonl` and TREC runs of first stage and engines.

        Args:
            folder: Where to; it is made if need be, files of the same names are replaced.

        Returns:
            The files written.

        Raises:
            SettingsError: The folder cannot be made, or two engines' files would be one.
        """
        check_file_names(each.name for each in self.scored)
        target = make_folder(folder)
        report = target / "report.json"
        report.write_text(json.dumps(self.to_records(), indent=1) + "\n", encoding="utf-8")
        queries = target / "per-query.jsonl"
        lines = [json.dumps(record) + "\n" for record in self.per_query()]
        queries.write_text("".join(lines), encoding="utf-8")
        runs = {FIRST_STAGE: self.first_stage}
        runs |= {each.name: each.run(self.first_stage) for each in self.scored}
        paths = []
        for name, run in runs.items():
            paths.append(target / f"{file_name(name)}.trec")
            write_run(paths[-1], run, tag=file_name(name))
        return [report, queries, *paths]


def best_threshold(relevant: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Return the score threshold with the highest F1, and that F1.

    Args:
        relevant: Scores of relevant documents.
        other: Scores of all others.

    Returns:
        The threshold, inclusive, and F1 in [0, 1]; the highest threshold of equals. `(1.0, 0.0)`
        where nothing is relevant.
    """
    best, best_f1 = 1.0, 0.0
    kept = right = 0
    labelled = sorted([(-score, False) for score in other] + [(-score, True) for score in relevant])
    for place, (negative, is_relevant) in enumerate(labelled):
        kept += 1
        right += is_relevant
        if place + 1 < len(labelled) and labelled[place + 1][0] == negative:
            continue  # equal scores are kept together
        f1 = 2 * right / (kept + len(relevant))
        if f1 > best_f1:
            best, best_f1 = -negative, f1
    return best, best_f1
