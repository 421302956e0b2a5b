"""`RemoteReranker`: the interface of `Reranker` for a rerank server."""

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import NamedTuple

from bge_rerank_adapters.calls.base import BaseReranker
from bge_rerank_adapters.calls.ranking import PairScore, ScoredRequest
from bge_rerank_adapters.calls.requests import Request
from bge_rerank_adapters.calls.runner import AsyncRunner, Call, Reservations
from bge_rerank_adapters.errors import RemoteError
from bge_rerank_adapters.remote.answers import DistinctRequest, RemoteScores
from bge_rerank_adapters.remote.connections import Connections
from bge_rerank_adapters.remote.planning import Plan
from bge_rerank_adapters.remote.process_state import ProcessState
from bge_rerank_adapters.remote.settings import RemoteSettings
from bge_rerank_adapters.remote.stats import RemoteStats
from bge_rerank_adapters.settings.table import documents

_lock = threading.Lock()


def _renew_lock_after_fork() -> None:
    # In the child it may be held by a thread that does not exist there.
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock_after_fork)


class _Part(NamedTuple):
    """Documents of a request that are sent in one HTTP request, and where they begin."""

    request: DistinctRequest
    start: int
    texts: list[str]
    last: bool


_InProgress = deque[tuple[_Part, Future[RemoteScores] | None]]


class RemoteReranker(BaseReranker[RemoteSettings]):
    """Scores how well documents answer a query on a server, with `Reranker`'s interface.

    It is safe to use from many threads and event loops at once: all requests share one pool of
    connections. It can replace a `Reranker` anywhere, such as an adapter's `reranker=`. Making one
    sends nothing. After a fork the child opens its own connections.

    With `api="auto"` a known host (Cohere's, Jina's) implies the API. Any other server is queried
    once, before the first request: `/info` identifies our server and text-embeddings-inference, and
    is skipped if the address has a version (`/v1`, `/v1/rerank`); `/v1/models` identifies llama.cpp
    and SGLang. All others get requests in Cohere's format, at the address given or the first that
    exists of `/rerank`, `/v1/rerank` and `/v2/rerank` below it.

    All scores are requested, and the threshold and `top_k` are applied here. Our server,
    text-embeddings-inference, llama.cpp and SGLang return logits. For others `logit` is `None`, and
    results are ordered by score. Ties keep the server's order. `truncated`, `query_truncated` and
    `span` come only from our server, and `usage.tokens` is set if the server states it. Identical
    documents of a call are sent once.

    Requests are retried on 429, 502 and 503 and if the server cannot be reached, with growing,
    random waits or the server's `Retry-After`, until `timeout_s` is over. So no request is lost if
    the server returns in time. A request whose connection broke is retried three times at most. A
    request that is too large for a server (413) is sent in halves.

    Attributes:
        settings: Its settings.

    Example:
        ```python
        reranker = RemoteReranker("http://gpu-box:8080")
        for result in reranker.rerank("Who wrote Faust?", ["Goethe did.", "It rains."]):
            print(result.index, result.score, result.text)
        ```
    """

    settings: RemoteSettings

    @documents(RemoteSettings)
    def __init__(  # noqa: D417 - the table of settings fills it in
        self,
        url: str,
        *,
        api: str = RemoteSettings.api,
        model: str | None = RemoteSettings.model,
        api_key: str | None = RemoteSettings.api_key,
        scale: str = RemoteSettings.scale,
        timeout_s: float | None = RemoteSettings.timeout_s,
        max_retries: int | None = RemoteSettings.max_retries,
        max_documents_per_request: int | None = RemoteSettings.max_documents_per_request,
        max_connections: int = RemoteSettings.max_connections,
    ) -> None:
        """Check the settings; nothing is sent.

        Args:
            **settings: Those of `RemoteSettings`.

        Raises:
            SettingsError: A setting has a value that is not allowed.
        """
        self._set_up(
            RemoteSettings(
                url=url,
                api=api,
                model=model,
                api_key=api_key,
                scale=scale,
                timeout_s=timeout_s,
                max_retries=max_retries,
                max_documents_per_request=max_documents_per_request,
                max_connections=max_connections,
            )
        )

    def _set_up(self, settings: RemoteSettings) -> None:
        self.settings = settings
        self._hold(ProcessState(settings))

    def _hold(self, state: ProcessState) -> None:
        self._state = state
        self._finalizer = weakref.finalize(self, state.stop_soon)
        # At exit its thread is a daemon's, and the system closes the connections.
        self._finalizer.atexit = False

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return self._state.closed

    def warm_up(self) -> None:
        """Request one score, which finds out the server's API and opens a connection.

        Raises:
            RerankError: As `rerank`.
        """
        self.rerank("warm-up", ["warm-up"])

    def stats(self) -> RemoteStats:
        """Return the counts so far; cheap."""
        return RemoteStats(**self._state_here().tally.read())

    def close(self) -> None:
        """Close the connections; running and later calls raise `ClosedError`.

        May be repeated.
        """
        self._state_here().close()

    def __repr__(self) -> str:
        """Name the server."""
        state = ", closed" if self.closed else ""
        return f"RemoteReranker({self.settings.url!r}, api={self.settings.api!r}{state})"

    def _state_here(self) -> ProcessState:
        """Return the state of this process, and make one after a fork."""
        if not self._state.here:
            with _lock:
                if not self._state.here:
                    self._finalizer.detach()
                    self._hold(ProcessState(self.settings, parents=self._state))
        return self._state

    def _check_open(self) -> None:
        self._state_here().check_open()

    def _async_runner(self) -> AsyncRunner:
        return self._state_here().runner

    def _no_logits(self) -> RemoteError:
        return RemoteError(
            f"{self.settings.url} returns scores without logits; use score(), or give "
            'api="vllm" or "infinity" and scale="logit" if it is such a server.'
        )

    def _score(
        self,
        request: Request,
        reservations: Reservations,
        *,
        bounded: bool = True,  # noqa: ARG002 - there is no queue here
    ) -> Call[ScoredRequest]:
        distinct = DistinctRequest(request)
        yield from self._send_all([distinct], reservations)
        return distinct.scored()

    def _score_pairs(
        self, requests: list[Request], reservations: Reservations
    ) -> Call[list[PairScore]]:
        """Send the pairs of one query in one request."""
        indexes: dict[str, list[int]] = {}
        for index, each in enumerate(requests):
            indexes.setdefault(each.query, []).append(index)
        by_query = [
            DistinctRequest(
                replace(requests[found[0]], texts=[requests[i].texts[0] for i in found])
            )
            for found in indexes.values()
        ]
        yield from self._send_all(by_query, reservations)
        scores: dict[int, PairScore] = {}
        for request, found in zip(by_query, indexes.values(), strict=True):
            scores.update(zip(found, request.scored().scores, strict=True))
        return [scores[index] for index in range(len(requests))]

    def _score_many(
        self,
        requests: Iterable[Request],
        reservations: Reservations,
        *,
        finish: Callable[[ScoredRequest], None],
    ) -> Call[None]:
        return self._send_all(
            map(DistinctRequest, requests),
            reservations,
            finish=lambda request: finish(request.scored()),
        )

    def _send_all(
        self,
        requests: Iterable[DistinctRequest],
        reservations: Reservations,
        *,
        finish: Callable[[DistinctRequest], None] = lambda _: None,
    ) -> Call[None]:
        """Send all requests, several HTTP requests at a time.

        Args:
            requests: Read lazily; each stores its results.
            reservations: Holds the running HTTP requests.
            finish: Called with each request, in order, once it has all its results.
        """
        state = self._state_here()
        if not state.connected:
            yield None
        connections = state.connections()
        plan: Plan | None = None
        at_once = max(1, self.settings.max_connections // 2)
        in_progress: _InProgress = deque()
        for request in requests:
            state.tally.add(requests=1)
            if plan is None and request.distinct:
                plan = connections.known_plan() or (yield reservations.hold(connections.plan()))
            for part in _parts(request, plan):
                if len(in_progress) == at_once:
                    yield from _collect(in_progress, finish)
                in_progress.append((part, _send(part, connections, reservations)))
        while in_progress:
            yield from _collect(in_progress, finish)


def _parts(request: DistinctRequest, plan: Plan | None) -> Iterator[_Part]:
    if plan is None or not request.distinct:
        yield _Part(request, 0, [], last=True)
        return
    for start, texts in request.parts(plan.max_documents):
        last = start + len(texts) == len(request.distinct)
        yield _Part(request, start, texts, last)


def _send(
    part: _Part, connections: Connections, reservations: Reservations
) -> "Future[RemoteScores] | None":
    if not part.texts:
        return None
    request = replace(part.request.request, texts=part.texts, documents=None)
    return reservations.hold(connections.send(request))


def _collect(in_progress: "_InProgress", finish: Callable[[DistinctRequest], None]) -> Call[None]:
    """Wait for the oldest HTTP request, and store its results in its request."""
    part, future = in_progress.popleft()
    if future is not None:
        part.request.add((yield future), start=part.start)
    if part.last:
        finish(part.request)
