"""The outermost middleware: metrics, API key, concurrency limit, and unhandled errors.

It also maps aliases of paths to the routed ones, and refuses requests of web pages of other
origins. Browsers send these without a preflight, since a body needs no Content-Type here.
"""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import time
from collections.abc import Iterable, MutableMapping
from contextlib import AbstractContextManager
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from bge_rerank_adapters.serve.concurrency import SLOT, Slot, Slots
from bge_rerank_adapters.serve.metrics import Metrics
from bge_rerank_adapters.serve.refusals import Refusal, path_of, response_of
from bge_rerank_adapters.serve.settings import ServerSettings, variable
from bge_rerank_adapters.serve.tracing import Tracing

SCORING = ("/v1/rerank", "/v2/rerank", "/rerank", "/infinity/rerank")
_OPEN = ("/", "/health", "/docs", "/openapi.json", "/v1/cluster/auth")
_ROUTES = frozenset((*SCORING, *_OPEN, "/metrics", "/info", "/v1/models"))
# Names in llama.cpp's server.
_ALIASES = {"/reranking": "/rerank", "/v1/reranking": "/v1/rerank"}
_MODEL = "/v1/models/"
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
# A refused client that has sent nothing for this long is assumed to send no body: it may wait for
# "100 Continue" first.
_SILENCE_S = 1.0

_log = logging.getLogger(__name__)


class Gate:
    """ASGI middleware that refuses requests before their body is read, and reports errors."""

    def __init__(
        self, app: ASGIApp, *, settings: ServerSettings, metrics: Metrics, tracing: Tracing
    ) -> None:
        """Wrap an app."""
        self._app, self._metrics, self._tracing = app, metrics, tracing
        self._slots = Slots(settings.max_concurrent_requests)
        self._body_timeout_s = settings.body_timeout_s
        self._origins = frozenset(settings.cors_origins)
        key = settings.api_key
        self._key = None if key is None else _digest(key.encode("utf-8"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = _canonical(path_of(scope))
        scope = _with_path(path, scope)
        body = _Body(receive)
        answer = _Answer(scope, body, send, Slot(self._slots))
        begin = time.perf_counter()
        try:
            with self._metrics.in_progress.track_inprogress(), self._traced(path, scope, answer):
                await self._answer(path, scope, body, answer)
        finally:
            route = _route(path)
            status = str(answer.status or 499)
            self._metrics.seconds.labels(route, status).observe(time.perf_counter() - begin)
        await answer.finish(self._body_timeout_s)

    def _traced(self, path: str, scope: Scope, answer: "_Answer") -> AbstractContextManager[None]:
        # Not for probes and scrapes, which would be most of the spans.
        if path not in SCORING:
            return contextlib.nullcontext()
        return self._tracing.request(scope, path, lambda: answer.status)

    async def _answer(self, path: str, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        try:
            self._check_origin(scope)
            self._check_key(path, scope)
            if path in SCORING:
                await self._score(scope, receive, answer)
            else:
                await self._app(scope, receive, answer)
        except Refusal as refusal:
            await response_of(path, refusal)(scope, receive, answer)
        except Exception:
            _log.exception("A request for %s failed", _route(path))
            if answer.status is not None:
                raise  # too late for another answer: the connection must be closed
            failed = Refusal(500, "The server failed on this request; its log says why.")
            await response_of(path, failed)(scope, receive, answer)

    async def _score(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        # Checked before the body is read; the slot is taken once the body is complete.
        self._slots.check()
        scope[SLOT] = answer.slot
        try:
            await self._app(scope, receive, answer)
        finally:
            answer.slot.release()

    def _check_origin(self, scope: Scope) -> None:
        given = {value for name, value in scope["headers"] if name == b"origin"}
        if not given or scope["method"] in _SAFE_METHODS or "*" in self._origins:
            return
        origin = given.pop().decode("latin-1")
        host = next((value for name, value in scope["headers"] if name == b"host"), b"")
        own = bool(host) and origin.partition("://")[2].lower() == host.decode("latin-1").lower()
        if given or not (own or origin in self._origins):
            raise Refusal(
                403,
                f"Web pages of {origin[:100]!r} may not send requests here; to allow it, start the "
                f"server with {variable('cors_origins')} set to that origin, or to * for all.",
            )

    def _check_key(self, path: str, scope: Scope) -> None:
        if self._key is None or path in _OPEN:
            return
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        right = hmac.compare_digest(_digest(key.strip()), self._key)
        if not right or scheme.lower() != b"bearer":
            raise Refusal(
                401,
                "This server needs its API key; send it as Authorization: Bearer KEY.",
                headers={"WWW-Authenticate": "Bearer"},
            )


class _Body:
    """Passes a request's body on, and records whether it is complete.

    Attributes:
        ended: Whether it is complete, or the client has disconnected.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.ended = False

    async def __call__(self) -> MutableMapping[str, Any]:
        message = await self._receive()
        self.ended = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    async def discard(self, timeout_s: float) -> None:
        """Read and drop the rest, until it ends, times out, or pauses."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self.ended:
                    async with asyncio.timeout(_SILENCE_S):
                        await self()


class _Answer:
    """Passes an answer on, but delays its end while part of the request's body is unread.

    Closing a connection with unread bytes resets it, and the client may lose the answer. So the
    rest of a refused body is read first.

    Attributes:
        status: Its status; `None` until it has begun.
        slot: The request's slot, released when the answer begins.
    """

    def __init__(self, scope: Scope, body: _Body, send: Send, slot: Slot) -> None:
        self._scope, self._body, self._send = scope, body, send
        self.slot = slot
        self.status: int | None = None
        self._closes = self._held_back = False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.slot.release()
            self._closes = _closes(self._scope, message.get("headers", ()))
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self._held_back = self._closes and not self._body.ended
            message = {**message, "more_body": self._held_back}
        await self._send(message)

    async def finish(self, timeout_s: float) -> None:
        """End an answer whose end was delayed, after at most `timeout_s` seconds."""
        if self._held_back:
            await self._body.discard(timeout_s)
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})


def _canonical(path: str) -> str:
    """Return the routed path for an alias."""
    if len(path) > 1:
        path = path.removesuffix("/")
    return _ALIASES.get(path, path)


def _with_path(path: str, scope: Scope) -> Scope:
    """Return a request's scope with another path, relative to where the app is mounted."""
    if path == path_of(scope):
        return scope
    whole = scope.get("root_path", "") + path
    return {**scope, "path": whole, "raw_path": whole.encode("utf-8", "surrogateescape")}


def _route(path: str) -> str:
    """Return a path as a metric label; unknown ones share a label, to limit their number."""
    if path.startswith(_MODEL):
        return _MODEL + "{model}"
    return path if path in _ROUTES else "other"


def _closes(scope: Scope, headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Return whether the server closes the connection after an answer with these headers."""
    tokens = {
        token.strip().lower()
        for name, value in (*scope["headers"], *headers)
        if name.lower() == b"connection"
        for token in value.split(b",")
    }
    return b"close" in tokens or scope.get("http_version") == "1.0"


def _digest(key: bytes) -> bytes:
    # Digests have equal lengths; comparing others would reveal the key's length.
    return hashlib.sha256(key).digest()
