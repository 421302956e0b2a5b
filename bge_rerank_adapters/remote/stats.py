"""What a remote reranker has done, for dashboards and logs."""

import threading
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteStats:
    """What a remote reranker has done; `RemoteReranker.stats()` returns it.

    All but `under_way` only ever grow. What the server does is in its own metrics.

    Attributes:
        requests: Calls that were let in; of `rerank_many`, each of its requests.
        pairs: Pairs that the server scored; identical ones of a call count once.
        tokens: Tokens that the server read for them, by its own account; 0 where it gives none.
        http_requests: Sent, retries included.
        retries: How many of them were sent again.
        failed_requests: Requests that ended with an error, given-up ones included.
        under_way: Requests that wait for the server, or for a connection, at this moment.
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
    """Counts what a remote reranker does; safe to use from many threads at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = RemoteStats().to_dict()

    def add(self, **counts: float) -> None:
        """Add to the counts of these names, which are those of `RemoteStats`."""
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count

    def read(self) -> RemoteStats:
        """Return the counts, all of one moment."""
        with self._lock:
            return RemoteStats(**self._counts)
