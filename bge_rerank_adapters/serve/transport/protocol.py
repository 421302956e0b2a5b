"""One connection of `bge-rerank serve`: uvicorn's, with more timeouts.

Uvicorn has a timeout only between two requests. Here incomplete heads, bodies of refused requests,
answers that the client does not read, and idle new connections have one as well.
"""

import asyncio
import json
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from bge_rerank_adapters.serve.transport.connection import StrictConnection

# For a whole head, from its first byte or the opening of the connection, and for the rest of a body
# after its answer.
HEAD_TIMEOUT_S = 10.0
# For a client that reads nothing of an answer larger than the system's buffers.
ANSWER_TIMEOUT_S = 30.0


class GuardedProtocol(H11Protocol):
    """A connection with a timeout for each part of a request and its answer."""

    max_connections = 4096
    head_timeout_s = HEAD_TIMEOUT_S
    answer_timeout_s = ANSWER_TIMEOUT_S

    @staticmethod
    def count_refusal(status: int) -> None:
        """Count a request that is refused before the app sees it; overridden by servers."""

    def __init__(self, *args: Any, **named: Any) -> None:
        """Take uvicorn's arguments of a connection."""
        super().__init__(*args, **named)
        self.conn = StrictConnection()
        self.opened = time.monotonic()
        self._head_timer: asyncio.TimerHandle | None = None
        self._answer_timer: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin; if there are too many connections, close the oldest one without a request."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._head_timer = self._in(self.head_timeout_s, self._give_up_head)
        if len(self.connections) > self.max_connections:
            others = [each for each in self.connections if each is not self and each.waiting]  # type: ignore[union-attr]
            oldest = min(others, key=lambda each: each.opened, default=self)  # type: ignore[union-attr]
            oldest.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Take bytes, and start the timeout of a head or the rest of a body."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        if not self.waiting:
            self._cancel_head_timer()
        elif self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self._in(self.head_timeout_s, self._give_up_head)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the connection and its timers."""
        self._cancel_head_timer()
        self._cancel_answer_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Wait for the client to read, for a limited time."""
        super().pause_writing()
        self._cancel_answer_timer()
        self._answer_timer = self._in(self.answer_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Continue to send."""
        self._cancel_answer_timer()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuse an invalid request; called by uvicorn. The answer is JSON, like all others."""
        status, reason = self.conn.refusal or (400, msg)  # type: ignore[attr-defined]
        self._refuse(status, reason)

    def _give_up_head(self) -> None:
        self._head_timer = None
        if not self.waiting or self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:
            self._refuse(408, f"The head did not arrive within {self.head_timeout_s:g} seconds")
        else:
            self.transport.close()

    def _refuse(self, status: int, reason: str) -> None:
        self.count_refusal(status)
        # In the middle of an answer, another would be read as part of it.
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            self.transport.write(_refusal(status, reason))
        self.transport.close()

    def _in(self, seconds: float, action: Callable[[], None]) -> asyncio.TimerHandle:
        return self.loop.call_later(seconds, action)

    def _cancel_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _cancel_answer_timer(self) -> None:
        if self._answer_timer is not None:
            self._answer_timer.cancel()
            self._answer_timer = None


def _refusal(status: int, reason: str) -> bytes:
    message = f"{reason}."
    content = {"message": message, "detail": message, "error_type": "Validation"}
    body = json.dumps(content).encode("ascii")
    phrase = HTTPStatus(status).phrase
    return (
        f"HTTP/1.1 {status} {phrase}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode("ascii") + body
