"""`RemoteReranker`: the interface of `Reranker` in front of a rerank server."""

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
from bge_rerank_adapters.remote.answers import Answered, Question
from bge_rerank_adapters.remote.connections import Connections
from bge_rerank_adapters.remote.planning import Plan
from bge_rerank_adapters.remote.process_state import ProcessState
from bge_rerank_adapters.remote.settings import RemoteSettings
from bge_rerank_adapters.remote.stats import RemoteStats

_lock = threading.Lock()


def _forget_after_fork() -> None:
    # It may be held there for ever by a thread that did not come along.
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)


class _Part(NamedTuple):
    """Documents of a question that go in one HTTP request, and where they begin."""

    question: Question
    start: int
    texts: list[str]
    last: bool


_UnderWay = deque[tuple[_Part, Future[Answered] | None]]


class RemoteReranker(BaseReranker[RemoteSettings]):
    """Scores how well documents answer a query by asking a server, with `Reranker`'s interface.

    Safe to use from many threads and event loops at once: all requests share one pool of
    connections. It goes wherever a `Reranker` goes, such as an adapter's `reranker=`. Making one
    sends nothing. After a fork the child opens connections of its own.

    With `api="auto"` a known host (Cohere's, Jina's) says what the server speaks. Any other is
    asked once, before the first request: for `/info`, which our server and
    text-embeddings-inference answer, unless the address has a version (`/v1`, `/v1/rerank`); then
    for `/v1/models`, by which llama.cpp and SGLang are known. All others are asked in Cohere's
    form, at the address given, or the first that is there of `/rerank`, `/v1/rerank` and
    `/v2/rerank` below it.

    What comes back: all scores are asked for, and threshold and `top_k` are applied here. Our
    server, text-embeddings-inference, llama.cpp and SGLang give logits; of others `logit` is
    `None`, and results are ordered by score. What is equal keeps the server's order. `truncated`,
    `query_truncated` and `span` are known of our server alone, and `usage.tokens` where the server
    tells it. Identical documents of a call are sent once.

    Requests are sent again on 429, 502 and 503, with growing, random waits or the server's
    `Retry-After`, and where the server cannot be reached, until `timeout_s` is over: a server that
    comes back within that time loses none. A request whose connection broke is sent again three
    times at most. A request that a server finds too large (413) goes in halves.

    Attributes:
        settings: The settings it was made with.

    Example:
        ```python
        reranker = RemoteReranker("http://gpu-box:8080")
        for result in reranker.rerank("Who wrote Faust?", ["Goethe did.", "It rains."]):
            print(result.index, result.score, result.text)
        ```
    """

    settings: RemoteSettings

    def __init__(
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
            url: The server's address, `"http://gpu-box:8080"`, or that of its route,
                `"https://api.jina.ai/v1/rerank"`.
            api: What it speaks: `"bge"` for our own server, `"tei"` for text-embeddings-inference,
                `"vllm"`, `"infinity"`, `"cohere"`, `"jina"`, `"llamacpp"`, `"sglang"`; `"auto"`
                finds out. With `"vllm"` that server is asked to cut long documents instead of
                refusing them.
            model: What the server calls its model; `None` is not sent.
            api_key: Secret, sent as a bearer token; in no repr, dump, error, log or pickle.
            scale: What the server's numbers are: `"score"`, in [0, 1]; `"logit"`, which vLLM
                (from `use_activation` on) and infinity are then asked for, `api` being given;
                `"auto"` is logits from our server, text-embeddings-inference, llama.cpp and
                SGLang, else scores. The last two answer with what the model's head gives: for
                checkpoints that end in a sigmoid or softmax of their own, give `"score"`.
            timeout_s: Seconds that one HTTP request may take at most, with its retries and their
                waits; `None` is for ever. A call of many documents may be several requests.
            max_retries: How often a request is sent again at most; `None` is as often as
                `timeout_s` allows, 0 fails at once.
            max_documents_per_request: Longer calls go in several requests, side by side; `None`
                is the server's limit where it states one (32 or more for
                text-embeddings-inference), and at most 1000.
            max_connections: Most HTTP requests under way at once; one call uses half of them.

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
        self._finalizer = weakref.finalize(self, state.let_go)
        # At exit its thread is a daemon's, and the system closes the connections.
        self._finalizer.atexit = False

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return self._state.closed

    def warm_up(self) -> None:
        """Ask the server for one score, which finds out what it speaks and opens a connection.

        Raises:
            RerankError: As `rerank`.
        """
        self.rerank("warm-up", ["warm-up"])

    def stats(self) -> RemoteStats:
        """Return what has been done so far; cheap, and good to ask at any time."""
        return self._state_here().tally.read()

    def close(self) -> None:
        """Close the connections; calls under way and later ones raise `ClosedError`.

        May be repeated.
        """
        self._state_here().close()

    def __repr__(self) -> str:
        """Name the server."""
        state = ", closed" if self.closed else ""
        return f"RemoteReranker({self.settings.url!r}, api={self.settings.api!r}{state})"

    def _state_here(self) -> ProcessState:
        """Return the state of this process, which after a fork is another one."""
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
            f"{self.settings.url} gives scores alone, no logits; use score(), or give "
            'api="vllm" or "infinity" and scale="logit" if it is such a server.'
        )

    def _score(
        self,
        request: Request,
        reservations: Reservations,
        *,
        bounded: bool = True,  # noqa: ARG002 - nothing waits here but for the server
    ) -> Call[ScoredRequest]:
        question = Question(request)
        yield from self._ask([question], reservations)
        return question.scored()

    def _score_pairs(
        self, requests: list[Request], reservations: Reservations
    ) -> Call[list[PairScore]]:
        """Ask about the pairs of one query in one request."""
        indexes: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            indexes.setdefault(request.query, []).append(index)
        questions = [
            Question(replace(requests[found[0]], texts=[requests[i].texts[0] for i in found]))
            for found in indexes.values()
        ]
        yield from self._ask(questions, reservations)
        scores: dict[int, PairScore] = {}
        for question, found in zip(questions, indexes.values(), strict=True):
            scores.update(zip(found, question.scored().scores, strict=True))
        return [scores[index] for index in range(len(requests))]

    def _score_many(
        self,
        requests: Iterable[Request],
        reservations: Reservations,
        *,
        finish: Callable[[ScoredRequest], None],
    ) -> Call[None]:
        return self._ask(
            map(Question, requests),
            reservations,
            finish=lambda question: finish(question.scored()),
        )

    def _ask(
        self,
        questions: Iterable[Question],
        reservations: Reservations,
        *,
        finish: Callable[[Question], None] = lambda _: None,
    ) -> Call[None]:
        """Ask all questions, several requests at a time.

        Args:
            questions: Read as it goes; each takes what the server answers.
            reservations: Holds the requests under way.
            finish: Called with each question, in order, when all of it has been answered.
        """
        state = self._state_here()
        if not state.connected:
            yield None
        connections = state.connections()
        plan: Plan | None = None
        at_once = max(1, self.settings.max_connections // 2)
        under_way: _UnderWay = deque()
        for question in questions:
            state.tally.add(requests=1)
            if plan is None and question.distinct:
                plan = connections.known_plan() or (yield reservations.hold(connections.plan()))
            for part in _parts(question, plan):
                if len(under_way) == at_once:
                    yield from _collect(under_way, finish)
                under_way.append((part, _send(part, connections, reservations)))
        while under_way:
            yield from _collect(under_way, finish)


def _parts(question: Question, plan: Plan | None) -> Iterator[_Part]:
    if plan is None or not question.distinct:
        yield _Part(question, 0, [], last=True)
        return
    for start, texts in question.parts(plan.max_documents):
        last = start + len(texts) == len(question.distinct)
        yield _Part(question, start, texts, last)


def _send(
    part: _Part, connections: Connections, reservations: Reservations
) -> "Future[Answered] | None":
    if not part.texts:
        return None
    request = replace(part.question.request, texts=part.texts, documents=None)
    return reservations.hold(connections.ask(request))


def _collect(under_way: "_UnderWay", finish: Callable[[Question], None]) -> Call[None]:
    """Wait for the oldest request, and give its question what the server answered."""
    part, future = under_way.popleft()
    if future is not None:
        part.question.take(part.start, (yield future))
    if part.last:
        finish(part.question)
