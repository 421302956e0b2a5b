"""Counters of an engine, for dashboards and logs."""

from dataclasses import asdict, dataclass
from typing import Any

from bge_rerank_adapters.calls.counters import Counters


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counters of an engine since it was loaded; `Reranker.stats()` returns them.

    All but `queued_pairs` and `pack_fill` are monotonic counters, so two readings give a rate.
    Times are sums over threads and devices, and may grow by more than a second per second.

    Attributes:
        requests: Accepted calls; each request of `rerank_many` counts.
        pairs: Pairs scored by the model; identical ones of a call count once.
        tokens: Tokens of these pairs, special tokens included.
        truncated_pairs: How many of them had their document cut.
        query_truncated_pairs: How many of them had their query cut.
        packs: Successful forward passes.
        queued_pairs: Pairs that wait now, including those not yet tokenised.
        pack_fill: How full packs were, in [0, 1]: their tokens divided by their budgets; 0 without
            packs.
        waiting_s: Seconds that calls waited until the first of their pairs went into a pack.
        tokenizing_s: Seconds spent on tokenising.
        scoring_s: Seconds spent in the model.
    """

    requests: int
    pairs: int
    tokens: int
    truncated_pairs: int
    query_truncated_pairs: int
    packs: int
    queued_pairs: int
    pack_fill: float
    waiting_s: float
    tokenizing_s: float
    scoring_s: float

    def to_dict(self) -> dict[str, Any]:
        """Return the counters by name, as JSON values."""
        return asdict(self)


class Tally(Counters):
    """Counts what an engine does; the names are those of `EngineStats`, and `budgets`."""

    def __init__(self) -> None:
        """Begin at zero."""
        names = ("requests", "pairs", "tokens", "truncated_pairs", "query_truncated_pairs", "packs")
        times = ("waiting_s", "tokenizing_s", "scoring_s")
        super().__init__(dict.fromkeys((*names, "budgets"), 0) | dict.fromkeys(times, 0.0))

    def stats(self, *, queued_pairs: int) -> EngineStats:
        """Return a consistent snapshot of the counters."""
        counts = self.read()
        budgets = counts.pop("budgets")
        fill = counts["tokens"] / budgets if budgets else 0.0
        return EngineStats(**counts, queued_pairs=queued_pairs, pack_fill=fill)
