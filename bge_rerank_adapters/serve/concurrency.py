"""Concurrency limits: of requests that are scored, and of bodies that are being received.

The two are counted separately. A request takes a slot for scoring only once its body is complete,
so that slow clients block nobody. Bodies that are being received are limited by number and bytes;
if there are too many, the oldest is cancelled.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from bge_rerank_adapters.serve.refusals import overloaded

# Key of a request's slot in its scope.
SLOT = "bge_rerank.slot"


class Slots:
    """The slots for requests that are scored at the same time."""

    def __init__(self, count: int) -> None:
        """Make `count` free slots."""
        self._count, self._taken = count, 0

    def check(self) -> None:
        """Raise if no slot is free.

        Raises:
            Refusal: All are taken.
        """
        if self._taken >= self._count:
            raise overloaded(
                f"{self._count} requests are served already, which is the most at a time; try "
                "again later."
            )

    def add(self, slots: int) -> None:
        """Take a slot, or release it with -1."""
        self._taken += slots


class Slot:
    """One request's slot for scoring, taken once its body is complete."""

    def __init__(self, slots: Slots) -> None:
        """Make a slot that is not taken yet."""
        self._slots, self._taken = slots, False

    def take(self) -> None:
        """Take the slot.

        Raises:
            Refusal: No slot is free.
        """
        if not self._taken:
            self._slots.check()
            self._slots.add(1)
            self._taken = True

    def release(self) -> None:
        """Release the slot, if it was taken."""
        if self._taken:
            self._slots.add(-1)
            self._taken = False


class IncomingBody:
    """A body that is being received.

    Attributes:
        cancelled: Whether it was cancelled to make room for others.
    """

    def __init__(self, bodies: "IncomingBodies", limit: asyncio.Timeout) -> None:
        self._all, self._limit = bodies, limit
        self._bytes = 0
        self.cancelled = False

    def add(self, size: int) -> None:
        """Count received bytes."""
        self._bytes += size
        self._all.count(size)

    def cancel(self) -> int:
        """End the reading with a `TimeoutError`, and return how many bytes this frees."""
        self.cancelled = True
        self._limit.reschedule(asyncio.get_running_loop().time())
        return self.forget()

    def forget(self) -> int:
        """Return the number of bytes counted for it, and reset it."""
        size, self._bytes = self._bytes, 0
        return size


class IncomingBodies:
    """The bodies that are being received, oldest first."""

    def __init__(self, *, max_requests: int, max_bytes: int) -> None:
        """Set the limits for the number of bodies and their bytes in all."""
        self._max_requests, self._max_bytes = max_requests, max_bytes
        self._bodies: dict[IncomingBody, None] = {}
        self._bytes = 0

    @asynccontextmanager
    async def body(self, timeout_s: float) -> AsyncIterator[IncomingBody]:
        """Count a body while it is read; the block may raise `TimeoutError` at any await."""
        async with asyncio.timeout(timeout_s) as limit:
            body = IncomingBody(self, limit)
            self._bodies[body] = None
            self._make_room()
            try:
                yield body
            finally:
                self._bodies.pop(body, None)
                self._bytes -= body.forget()

    def count(self, size: int) -> None:
        """Count received bytes."""
        self._bytes += size
        self._make_room()

    def _make_room(self) -> None:
        # A single body is always allowed, even if it is larger than the limit.
        while len(self._bodies) > 1 and (
            len(self._bodies) > self._max_requests or self._bytes > self._max_bytes
        ):
            oldest = next(iter(self._bodies))
            del self._bodies[oldest]
            self._bytes -= oldest.cancel()
