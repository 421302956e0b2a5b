"""Counts of a remote reranker's work, for dashboards and logs."""

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
