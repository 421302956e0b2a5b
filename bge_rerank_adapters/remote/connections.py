"""The connections to a server, and the event loop that sends requests over them.

All requests of a reranker run on one event loop in its own thread. Calls from any thread or event
loop submit their requests to it and get a future, so there is one pool of connections and one
implementation for all of them.
"""

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import httpx

from bge_rerank_adapters.calls.counters import Counters
from bge_rerank_adapters.calls.requests import Request
from bge_rerank_adapters.errors import ClosedError, RerankError, RerankTimeoutError
from bge_rerank_adapters.remote.answers import RemoteScores, read_answer
from bge_rerank_adapters.remote.planning import Plan, find_plan
from bge_rerank_adapters.remote.refusals import Answer, refusal
from bge_rerank_adapters.remote.retrying import RetryingClient
from bge_rerank_adapters.remote.settings import RemoteSettings

T = TypeVar("T")

# Limit on the size of an answer: room for each result, and for documents that are returned
# although they were not requested, with escapes.
_ANSWER_BYTES = 1 << 20
_ANSWER_FACTOR = 8
# After this a host that does not answer counts as one that cannot be reached.
_CONNECT_S = 10.0
_JOIN_S = 5.0

_log = logging.getLogger(__name__)


class Connections:
    """The connections of one reranker in one process, with their event loop; thread-safe."""

    def __init__(self, settings: RemoteSettings, tally: Counters) -> None:
        self._settings, self._tally = settings, tally
        self._lock = threading.Lock()
        self._open = True
        self._plan: Plan | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._planning = asyncio.Lock()
        self._slots = asyncio.Semaphore(settings.max_connections)
        client = httpx.AsyncClient(
            auth=_Bearer(settings.api_key),
            timeout=httpx.Timeout(None, connect=_CONNECT_S),
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=settings.max_connections
            ),
            # A redirect would send the documents and the key elsewhere.
            follow_redirects=False,
        )
        self._client, self._retrying = client, RetryingClient(client, settings, tally)
        self._thread = threading.Thread(target=self._run, name="bge-rerank-remote", daemon=True)
        self._thread.start()

    def plan(self) -> "Future[Plan]":
        """Return a future of the plan, for which the server may be queried."""
        return self._submit(lambda: self._timed(self._planned))

    def known_plan(self) -> Plan | None:
        """Return the plan, if it is known already."""
        return self._plan

    def send(self, request: Request) -> "Future[RemoteScores]":
        """Return a future of the server's results for the texts of a request."""
        return self._submit(lambda: self._timed(lambda deadline: self._score(request, deadline)))

    def close(self) -> None:
        """Fail running requests with `ClosedError`, and close the connections."""
        with self._lock:
            self._open = False
        self.stop_soon()
        self._thread.join(_JOIN_S)

    def stop_soon(self) -> None:
        """Signal the thread to end without waiting for it; safe during garbage collection."""
        with suppress(RuntimeError):  # it has ended already
            self._loop.call_soon_threadsafe(self._stop.set)

    def _submit(self, make: Callable[[], Coroutine[Any, Any, T]]) -> "Future[T]":
        future: Future[T] = Future()
        # Under the lock, so that no request is submitted after `close` has stopped the loop.
        with self._lock:
            if not self._open:
                raise _closed()
            try:
                self._loop.call_soon_threadsafe(self._begin, make, future)
            except RuntimeError as error:
                raise _closed() from error
        return future

    def _begin(self, make: Callable[[], Coroutine[Any, Any, T]], future: "Future[T]") -> None:
        task = self._loop.create_task(self._fulfil(make, future))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        future.add_done_callback(lambda done: self._cancel_with(done, task))

    def _cancel_with(self, future: "Future[Any]", task: "asyncio.Task[None]") -> None:
        # The caller no longer waits, so the request is cancelled too.
        if future.cancelled():
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(task.cancel)

    async def _fulfil(
        self, make: Callable[[], Coroutine[Any, Any, T]], future: "Future[T]"
    ) -> None:
        try:
            result = await make()
        except asyncio.CancelledError:
            _fail(future, _closed())
        except RerankError as error:
            # It says all that the caller needs. Where it was raised is of no use to them.
            _fail(future, error.with_traceback(None))
        except BaseException as error:  # noqa: BLE001 - passed on to the caller
            _fail(future, error)
        else:
            with suppress(InvalidStateError):  # cancelled meanwhile
                future.set_result(result)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        try:
            await self._stop.wait()
        finally:
            for task in tuple(self._tasks):
                task.cancel()
            if self._tasks:
                await asyncio.wait(tuple(self._tasks))
            await self._client.aclose()

    async def _planned(self, deadline: float | None) -> Plan:
        async with self._planning:
            if self._plan is None:
                self._plan = await find_plan(self._settings, self._retrying, deadline)
            return self._plan

    async def _score(self, request: Request, deadline: float | None) -> RemoteScores:
        plan = await self._planned(deadline)
        results = await self._request(plan, request, deadline)
        self._tally.add(pairs=len(request.texts), tokens=results.tokens or 0)
        return results

    async def _request(self, plan: Plan, request: Request, deadline: float | None) -> RemoteScores:
        texts = request.texts
        body = _encoded(
            plan.api.request(
                request.query,
                texts,
                model=self._settings.model,
                scale=plan.scale,
                token_limits=request.token_limits,
            )
        )
        answer, url = await self._post(plan, body, deadline)
        if answer.status == 200:
            return read_answer(answer.body, documents=len(texts), scale=plan.scale, server=url)
        if answer.status != 413 or len(texts) == 1:
            raise refusal(answer, url, self._settings)
        half = len(texts) // 2
        _log.info(
            "%s refused %d documents as too many or too long; sending them in halves", url, half
        )
        first, rest = [
            await self._request(plan, replace(request, texts=part), deadline)
            for part in (texts[:half], texts[half:])
        ]
        return first.joined(rest, start=half)

    async def _post(self, plan: Plan, body: bytes, deadline: float | None) -> tuple[Answer, str]:
        """Send a request to the first address that exists, and keep that address."""
        max_bytes = _ANSWER_BYTES + _ANSWER_FACTOR * len(body)
        # Another request may have found it meanwhile.
        urls = plan.urls if self._plan is None else self._plan.urls
        for url in urls:
            answer = await self._retrying.post(url, body, deadline=deadline, max_bytes=max_bytes)
            if answer.status not in {404, 405}:
                self._plan = Plan(plan.api, (url,), plan.scale, plan.max_documents)
                return answer, url
        return answer, " or ".join(urls)

    async def _timed(self, work: Callable[[float | None], Coroutine[Any, Any, T]]) -> T:
        """Run `work`, given its deadline, within the timeout; count it and its errors."""
        limit = self._settings.timeout_s
        begin = time.monotonic()
        self._tally.add(under_way=1)
        try:
            async with asyncio.timeout(limit), self._slots:
                return await work(None if limit is None else begin + limit)
        except TimeoutError as error:
            self._tally.add(failed_requests=1)
            if isinstance(error, RerankTimeoutError):
                raise
            raise RerankTimeoutError(
                f"{self._settings.url} did not answer within timeout_s={limit}; send fewer or "
                "shorter documents at a time, or allow more time."
            ) from error
        except BaseException:
            self._tally.add(failed_requests=1)
            raise
        finally:
            self._tally.add(under_way=-1, waiting_s=time.monotonic() - begin)


class _Bearer(httpx.Auth):
    """Adds the key to each request; its repr does not contain the key."""

    def __init__(self, api_key: str | None) -> None:
        self._value = None if api_key is None else f"Bearer {api_key}"

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Send the request with the key."""
        if self._value is not None:
            request.headers["Authorization"] = self._value
        yield request


def _encoded(body: dict[str, Any]) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError:
        # Lone surrogates cannot be encoded, but they can be escaped; the server decides.
        return json.dumps(body, separators=(",", ":")).encode("ascii")


def _fail(future: "Future[Any]", error: BaseException) -> None:
    with suppress(InvalidStateError):  # cancelled meanwhile
        future.set_exception(error)


def _closed() -> ClosedError:
    return ClosedError("The remote reranker has been closed; make another one.")
