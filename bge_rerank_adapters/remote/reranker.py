"""`RemoteReranker`: the interface of `Reranker` in front of a rerank server."""

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Self, TypeVar

from bge_rerank_adapters.calls.progress import ProgressBar
from bge_rerank_adapters.calls.ranking import (
    Ranking,
    check_pairs,
    check_score_threshold,
    check_top_k,
)
from bge_rerank_adapters.calls.requests import Request, Requests, check_request
from bge_rerank_adapters.calls.runner import Call, Places, run
from bge_rerank_adapters.errors import RemoteError
from bge_rerank_adapters.remote.answers import Question, Told
from bge_rerank_adapters.remote.line import Line
from bge_rerank_adapters.remote.settings import RemoteSettings
from bge_rerank_adapters.remote.stats import RemoteStats
from bge_rerank_adapters.remote.wire import Plan, Wire

T = TypeVar("T")

_lock = threading.Lock()


def _forget_after_fork() -> None:
    # It may be held there for ever by a thread that did not come along.
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)


class _Part(NamedTuple):
    """Documents of a question that go in one request, and where they begin."""

    question: Question
    start: int
    texts: list[str]
    last: bool


class RemoteReranker:
    """Scores how well documents answer a query by asking a server, with `Reranker`'s interface.

    Safe to use from many threads and event loops at once: all requests share one pool of
    connections. It goes wherever a `Reranker` goes, such as an adapter's `reranker=`. Making one
    sends nothing. After a fork the child opens connections of its own.

    With `api="auto"` a known host (Cohere's, Jina's) and a path with a version (`/v1/rerank`, or
    `/v1`) tell what the server speaks, the latter Cohere's form, that all but
    text-embeddings-inference share. Any other address is asked once for `/info`, which our server
    and text-embeddings-inference answer, before the first request; where there is none, Cohere's
    form is sent to `/rerank`, `/v1/rerank` or `/v2/rerank`, the first that is there.

    What comes back: all scores are asked for, and threshold and `top_k` are applied here. Our
    server and text-embeddings-inference tell logits; of others `logit` is `None`, and results are
    ordered by score. What is equal keeps the server's order. `truncated` and `span` are known of
    our server alone. Identical documents of a call are sent once.

    Requests are sent again on 429 and 503, with growing, random waits or the server's
    `Retry-After` (at most 30 s), and where the server cannot be reached; a request whose
    connection broke only once more. A request that a server finds too large (413) goes in halves.

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
        max_retries: int = RemoteSettings.max_retries,
        max_documents_per_request: int | None = RemoteSettings.max_documents_per_request,
        max_connections: int = RemoteSettings.max_connections,
    ) -> None:
        """Check the settings; nothing is sent.

        Args:
            url: The server's address, `"http://gpu-box:8080"`, or that of its route,
                `"https://api.jina.ai/v1/rerank"`.
            api: What it speaks: `"bge"` for our own server, `"tei"` for text-embeddings-inference,
                `"vllm"`, `"infinity"`, `"cohere"`, `"jina"`; `"auto"` finds out. With `"vllm"`
                that server is asked to cut long documents instead of refusing them.
            model: What the server calls its model; `None` is not sent.
            api_key: Secret, sent as a bearer token; in no repr, dump, error, log or pickle.
            scale: What the server's numbers are: `"score"`, in [0, 1]; `"logit"`, which vLLM
                (from `use_activation` on) and infinity are then asked for, `api` being given;
                `"auto"` is logits from our server and text-embeddings-inference, else scores.
            timeout_s: Seconds that one HTTP request may take at most, with its retries and their
                waits; `None` is for ever. A call of many documents may be several requests.
            max_retries: How often a request is sent again at most.
            max_documents_per_request: Longer calls go in several requests, side by side; `None`
                is the server's limit where it tells one (32 or more for
                text-embeddings-inference), and at most 1000.
            max_connections: Most HTTP requests under way at once; one call uses half of them.

        Raises:
            SettingsError: A setting has a value that is not allowed.
        """
        self._begin(
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

    @classmethod
    def from_settings(cls, settings: RemoteSettings) -> Self:
        """Return a new remote reranker with these settings."""
        reranker = cls.__new__(cls)
        reranker._begin(settings)  # noqa: SLF001 - its own class
        return reranker

    def _begin(self, settings: RemoteSettings) -> None:
        self.settings = settings
        self._hold(Line(settings))

    def _hold(self, line: Line) -> None:
        self._line = line
        self._finalizer = weakref.finalize(self, line.let_go)
        # At exit its thread is a daemon's, and the system closes the connections.
        self._finalizer.atexit = False

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return self._line.closed

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_k: int | None = None,
        score_threshold: float | None = None,
        timeout_s: float | None = None,
    ) -> Ranking:
        """Return the documents ranked by how well they answer the query, best first.

        Args:
            query: The question; may be empty.
            documents: n texts; may be empty or repeat themselves.
            top_k: Most results to return; `None` is all.
            score_threshold: Lowest score to keep, in [0, 1], inclusive; applied before `top_k`.
            timeout_s: Seconds that the whole call may take at most; `None` is as long as its
                requests may.

        Returns:
            At most n `RankedDocument`; `[]` for no documents, for which nothing is sent.

        Raises:
            InputTypeError: The query or a document is not a `str`.
            SettingsError: `top_k`, `score_threshold` or `timeout_s` is out of range.
            Overloaded: The server answered 429 to the end.
            RerankTimeoutError: `timeout_s`, here or of the constructor, ran out.
            RemoteError: The server cannot be reached, refused, or answered wrongly.
            ClosedError: The remote reranker has been closed.
        """
        request = check_request(query, documents)
        limits = _check_limits(top_k, score_threshold)
        return run(self._rerank(request, limits, Places()), timeout_s=timeout_s)

    async def arerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_k: int | None = None,
        score_threshold: float | None = None,
        timeout_s: float | None = None,
    ) -> Ranking:
        """Return what `rerank` returns, without blocking the event loop.

        A call that is cancelled or runs out of time cancels its requests.
        """
        request = check_request(query, documents)
        limits = _check_limits(top_k, score_threshold)
        places = Places()
        call = self._rerank(request, limits, places)
        door = self._line_here().door
        return await door.run(call, places=places, timeout_s=timeout_s, long=False)

    def logits(self, query: str, documents: Sequence[str]) -> list[float]:
        """Return the documents' logits in input order: unbounded floats, `[]` for no documents.

        Raises:
            RemoteError: The server tells scores alone; otherwise as `rerank`.
        """
        query, texts = check_request(query, documents)
        told = run(self._told(query, texts, Places()))
        logits = [each.logit for each in told if each.logit is not None]
        if len(logits) < len(texts):
            raise RemoteError(
                f"{self.settings.url} tells scores alone, no logits; use score(), or give "
                'scale="logit" where the server can be asked for them.'
            )
        return logits

    def score(self, query: str, documents: Sequence[str]) -> list[float]:
        """Return the documents' scores in input order: in [0, 1], `[]` for no documents.

        Raises:
            RerankError: As `rerank`.
        """
        query, texts = check_request(query, documents)
        return [each.score for each in run(self._told(query, texts, Places()))]

    def score_pairs(self, pairs: Iterable[tuple[str, str]]) -> list[float]:
        """Return the scores of (query, document) pairs in input order: in [0, 1], `[]` for none.

        Pairs of one query go in one request.

        Raises:
            RerankError: As `rerank`.
        """
        return run(self._score_pairs(check_pairs(pairs), Places()))

    def rerank_many(
        self,
        requests: Iterable[tuple[str, Sequence[str]]],
        *,
        top_k: int | None = None,
        score_threshold: float | None = None,
        progress: bool = False,
    ) -> list[Ranking]:
        """Return the rankings of many (query, documents) requests, in their order.

        Several are under way at once, and other calls are served in between.

        Args:
            requests: Any number of (query, documents) tuples; an iterator is read as it goes.
            top_k: Most results for each.
            score_threshold: Lowest score to keep, in [0, 1], inclusive.
            progress: Whether to show a bar on standard error; needs rich.

        Raises:
            InputTypeError: A request is not a query and documents; the message names which.
            RerankError: As `rerank`.
        """
        limits = _check_limits(top_k, score_threshold)
        return run(self._rerank_many(Requests(requests), limits, Places(), progress=progress))

    async def arerank_many(
        self,
        requests: Iterable[tuple[str, Sequence[str]]],
        *,
        top_k: int | None = None,
        score_threshold: float | None = None,
        progress: bool = False,
        timeout_s: float | None = None,
    ) -> list[Ranking]:
        """Return what `rerank_many` returns, without blocking the event loop.

        An iterator is read in another thread, two of which serve all long calls.
        """
        limits = _check_limits(top_k, score_threshold)
        places = Places()
        call = self._rerank_many(Requests(requests), limits, places, progress=progress)
        door = self._line_here().door
        return await door.run(call, places=places, timeout_s=timeout_s, long=True)

    def warm_up(self) -> None:
        """Ask the server for one score, which finds out what it speaks and opens a connection.

        Raises:
            RerankError: As `rerank`.
        """
        self.rerank("warm-up", ["warm-up"])

    def stats(self) -> RemoteStats:
        """Return what has been done so far; cheap, and good to ask at any time."""
        return self._line_here().tally.read()

    def close(self) -> None:
        """Close the connections; calls under way and later ones raise `ClosedError`.

        May be repeated.
        """
        self._line_here().close()

    def __enter__(self) -> Self:
        """Return the reranker itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def __repr__(self) -> str:
        """Name the server."""
        state = ", closed" if self.closed else ""
        return f"RemoteReranker({self.settings.url!r}, api={self.settings.api!r}{state})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings, without the key and without connections."""
        return type(self).from_settings, (self.settings,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return the reranker itself: connections are shared, not copied."""
        return self

    def _line_here(self) -> Line:
        """Return the line of this process, which after a fork is another one."""
        if not self._line.here:
            with _lock:
                if not self._line.here:
                    self._finalizer.detach()
                    self._hold(Line(self.settings, parents=self._line))
        return self._line

    def _rerank(self, request: Request, limits: dict[str, Any], places: Places) -> Call[Ranking]:
        question = Question(*request)
        yield from self._ask([question], places)
        return question.rank(**limits)

    def _told(self, query: str, texts: list[str], places: Places) -> Call[list[Told]]:
        question = Question(query, texts)
        yield from self._ask([question], places)
        return question.in_order()

    def _score_pairs(self, pairs: list[tuple[str, str]], places: Places) -> Call[list[float]]:
        indexes: dict[str, list[int]] = {}
        for index, (query, _) in enumerate(pairs):
            indexes.setdefault(query, []).append(index)
        questions = [
            Question(query, [pairs[index][1] for index in found])
            for query, found in indexes.items()
        ]
        yield from self._ask(questions, places)
        scores = [0.0] * len(pairs)
        for question, found in zip(questions, indexes.values(), strict=True):
            for index, told in zip(found, question.in_order(), strict=True):
                scores[index] = told.score
        return scores

    def _rerank_many(
        self, requests: Requests, limits: dict[str, Any], places: Places, *, progress: bool
    ) -> Call[list[Ranking]]:
        self._line_here().check_open()
        yield None
        rankings: list[Ranking] = []
        with ProgressBar(requests, shown=progress) as bar:

            def finish(question: Question) -> None:
                rankings.append(question.rank(**limits))
                bar.advance(1)

            yield from self._ask((Question(*each) for each in requests), places, finish=finish)
        return rankings

    def _ask(
        self,
        questions: Iterable[Question],
        places: Places,
        *,
        finish: Callable[[Question], None] = lambda _: None,
    ) -> Call[None]:
        """Ask all questions, several requests at a time.

        Args:
            questions: Read as it goes; each takes what is told of it.
            places: What holds the requests under way.
            finish: Called with each question, in order, when all of it has been told.
        """
        line = self._line_here()
        line.check_open()
        if not line.connected:
            yield None
        wire = line.wire()
        plan: Plan | None = None
        at_once = max(1, self.settings.max_connections // 2)
        under_way: deque[tuple[_Part, Future[list[Told]] | None]] = deque()
        try:
            for question in questions:
                line.tally.add(requests=1)
                if plan is None and question.distinct:
                    plan = wire.known_plan() or (yield _held(wire.plan(), places))
                for part in _parts(question, plan):
                    if len(under_way) == at_once:
                        yield from _collect(under_way, finish)
                    under_way.append((part, _send(part, wire, places)))
            while under_way:
                yield from _collect(under_way, finish)
        finally:
            # Where the caller has gone, so must its requests; a no-op for those that are done.
            for _, future in under_way:
                if future is not None:
                    future.cancel()


def _parts(question: Question, plan: Plan | None) -> Iterator[_Part]:
    if plan is None or not question.distinct:
        yield _Part(question, 0, [], last=True)
        return
    for start, texts in question.parts(plan.max_documents):
        last = start + len(texts) == len(question.distinct)
        yield _Part(question, start, texts, last)


def _send(part: _Part, wire: Wire, places: Places) -> "Future[list[Told]] | None":
    return _held(wire.ask(part.question.query, part.texts), places) if part.texts else None


def _held(future: "Future[T]", places: Places) -> "Future[T]":
    places.hold(future)
    return future


def _collect(
    under_way: "deque[tuple[_Part, Future[list[Told]] | None]]",
    finish: Callable[[Question], None],
) -> Call[None]:
    """Wait for the oldest request, and give its question what was told."""
    part, future = under_way[0]
    if future is not None:
        part.question.take(part.start, (yield future))
    under_way.popleft()
    if part.last:
        finish(part.question)


def _check_limits(top_k: object, score_threshold: object) -> dict[str, Any]:
    return {
        "top_k": check_top_k(top_k),
        "score_threshold": check_score_threshold(score_threshold),
    }
