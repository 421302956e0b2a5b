"""Metrics of a run, as trec_eval computes them, and significance tests."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bge_rerank_adapters.calls.extras import require
from bge_rerank_adapters.calls.trec import Run

NDCG, MRR, MAP = "nDCG@10", "MRR@10", "MAP"
_RR_CUTOFF = 10


@dataclass(frozen=True, slots=True)
class Metrics:
    """A run's metrics, each in [0, 1].

    Attributes:
        per_query: The value of each judged query, by the metric's name.
    """

    per_query: dict[str, dict[str, float]]

    @property
    def mean(self) -> dict[str, float]:
        """Each metric's mean over the judged queries; those without results count as 0."""
        return {
            name: math.fsum(values.values()) / len(values)
            for name, values in self.per_query.items()
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """A paired t-test of two runs on the same queries.

    Attributes:
        difference: Mean of after minus before.
        low: Lower end of its 95% confidence interval.
        high: Upper end.
        p_value: The test's p-value; 1 if there is no difference.
        better: Queries with a higher value after.
        worse: Queries with a lower value after.
    """

    difference: float
    low: float
    high: float
    p_value: float
    better: int
    worse: int


def measure(
    judgements: dict[str, dict[str, int]], run: Run, *, recall_at: Iterable[int] = (10, 100)
) -> Metrics:
    """Return nDCG@10, MRR@10, MAP and recall of a run, as trec_eval computes them.

    Documents are ordered by score; equal scores (as 32-bit floats) by id, as in trec_eval.

    Args:
        judgements: For each query the grade of each judged document.
        run: For each query the score of each document found.
        recall_at: Cutoffs for recall.
    """
    require("ir_measures", of="evaluation", extra="eval")
    from ir_measures import AP, RR, Qrel, R, ScoredDoc, iter_calc, nDCG

    qrels = [
        Qrel(query, document, grade)
        for query, grades in judgements.items()
        for document, grade in grades.items()
    ]
    found = [
        ScoredDoc(query, document, score)
        for query in judgements
        for document, score in run.get(query, {}).items()
    ]
    names: dict[Any, str] = {nDCG @ 10: NDCG, RR: MRR, AP: MAP}
    names |= {R @ cutoff: f"R@{cutoff}" for cutoff in recall_at}
    per_query = {name: dict.fromkeys(judgements, 0.0) for name in names.values()}
    for each in iter_calc(list(names), qrels, found):
        per_query[names[each.measure]][each.query_id] = float(each.value)
    # The library's own RR@10 orders equal scores differently than trec_eval.
    first = per_query[MRR]
    per_query[MRR] = {
        query: value if value * _RR_CUTOFF >= 1 - 1e-9 else 0.0 for query, value in first.items()
    }
    return Metrics(per_query)


def compare(before: Metrics, after: Metrics, *, metric: str = NDCG) -> Comparison:
    """Return whether a metric changed, by a paired t-test over the queries.

    With fewer than two queries the interval is infinite and `p_value` is 1.
    """
    require("scipy", of="evaluation", extra="eval")
    from scipy.stats import ttest_rel

    old, new = before.per_query[metric], after.per_query[metric]
    gains = [new[query] - old[query] for query in old]
    difference = math.fsum(gains) / len(gains)
    better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    if not better and not worse:
        return Comparison(0.0, 0.0, 0.0, 1.0, 0, 0)
    if len(gains) < 2:
        return Comparison(difference, -math.inf, math.inf, 1.0, better, worse)
    if max(gains) == min(gains):
        return Comparison(difference, difference, difference, 0.0, better, worse)
    test = ttest_rel([new[query] for query in old], list(old.values()))
    low, high = test.confidence_interval()
    return Comparison(difference, float(low), float(high), float(test.pvalue), better, worse)
