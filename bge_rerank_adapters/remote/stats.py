"""Counts of a remote reranker's work, for dashboards and logs."""

import threading
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteStats:
    """Counts of a remote reranker's work; `RemoteReranker.stats()` returns them.

    All but `under_way` only grow. The work of the server is in its own metrics.

    Attributes:
        requests: Accepted calls; `rerank_many` counts each of its requests.
        pairs: Scored pairs; identical ones of a call count once.
        tokens: Tokens of these pairs as the server states them; 0 if it states none.
        http_requests: HTTP requests sent, retries included.
        retries: HTTP requests that were retries.
        failed_requests: Requests that ended with an error or were cancelled.
        under_way: Requests that are waiting for the server or a connection now.
        waiting_s: Seconds that requests took, retries included; a sum over all of them.
    """

    requests: int = 0
    pairs: int = 0
    tokens: int = 0
    http_requests: int = 0
    retries: int = 0
    failed_requests: int = 0
    under_way: int = 0
    waiting_s: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers by their names, ready for JSON."""
        return asdict(self)


class Tally:
    """Counts a remote reranker's work; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = RemoteStats().to_dict()

    def add(self, **counts: float) -> None:
        """Add to the counts of these names, which are those of `RemoteStats`."""
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count

    def read(self) -> RemoteStats:
        """Return a consistent snapshot of the counts."""
        with self._lock:
            return RemoteStats(**self._counts)
