"""Counters of an engine, for dashboards and logs."""

import threading
from dataclasses import asdict, dataclass
from typing import Any


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


class Tally:
    """Counts what an engine does; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests = self._pairs = self._tokens = self._packs = 0
        self._truncated = self._query_truncated = self._budgets = 0
        self._waiting_s = self._tokenizing_s = self._scoring_s = 0.0

    def add_requests(self, requests: int) -> None:
        """Count accepted requests."""
        with self._lock:
            self._requests += requests

    def add_tokenizing(self, seconds: float) -> None:
        """Count time in the tokenizer."""
        with self._lock:
            self._tokenizing_s += seconds

    def add_waiting(self, seconds: float) -> None:
        """Count time that calls waited for a pack."""
        with self._lock:
            self._waiting_s += seconds

    def add_pack(
        self,
        pairs: int,
        tokens: int,
        *,
        truncated: int,
        query_truncated: int,
        budget: int,
        seconds: float,
    ) -> None:
        """Count a pack that has been scored."""
        with self._lock:
            self._pairs += pairs
            self._tokens += tokens
            self._truncated += truncated
            self._query_truncated += query_truncated
            self._packs += 1
            # A pair longer than the budget makes a full pack, not one that is more than full.
            self._budgets += max(budget, tokens)
            self._scoring_s += seconds

    def read(self, *, queued_pairs: int) -> EngineStats:
        """Return a consistent snapshot of the counters."""
        with self._lock:
            return EngineStats(
                requests=self._requests,
                pairs=self._pairs,
                tokens=self._tokens,
                truncated_pairs=self._truncated,
                query_truncated_pairs=self._query_truncated,
                packs=self._packs,
                queued_pairs=queued_pairs,
                pack_fill=self._tokens / self._budgets if self._budgets else 0.0,
                waiting_s=self._waiting_s,
                tokenizing_s=self._tokenizing_s,
                scoring_s=self._scoring_s,
            )
