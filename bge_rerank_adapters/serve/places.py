"""Concurrency limits: of requests that are scored, and of bodies that are being received.

The two are counted separately. A request takes a place for scoring only once its body is complete,
so that slow clients block nobody. Bodies that are being received are limited by number and bytes;
if there are too many, the oldest is cancelled.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from bge_rerank_adapters.serve.refusals import overloaded

# Key of a request's place in its scope.
PLACE = "bge_rerank.place"


class Scored:
    """The places for requests that are scored at the same time."""

    def __init__(self, most: int) -> None:
        """Make `most` places."""
        self._most, self._taken = most, 0

    def check(self) -> None:
        """Raise if no place is free.

        Raises:
            Refusal: All are taken.
        """
        if self._taken >= self._most:
            raise overloaded(
                f"{self._most} requests are served already, which is the most at a time; try again "
                "later."
            )

    def add(self, places: int) -> None:
        """Take a place, or release it with -1."""
        self._taken += places


class Place:
    """One request's place for scoring, taken once its body is complete."""

    def __init__(self, scored: Scored) -> None:
        """Make a place that is not taken yet."""
        self._scored, self._taken = scored, False

    def take(self) -> None:
        """Take the place.

        Raises:
            Refusal: No place is free.
        """
        if not self._taken:
            self._scored.check()
            self._scored.add(1)
            self._taken = True

    def release(self) -> None:
        """Release the place, if it was taken."""
        if self._taken:
            self._scored.add(-1)
            self._taken = False


class Body:
    """A body that is being received.

    Attributes:
        cancelled: Whether it was cancelled to make room for others.
    """

    def __init__(self, arriving: "Arriving", limit: asyncio.Timeout) -> None:
        self._arriving, self._limit = arriving, limit
        self._bytes = 0
        self.cancelled = False

    def add(self, size: int) -> None:
        """Count received bytes."""
        self._bytes += size
        self._arriving.count(size)

    def cancel(self) -> int:
        """End the reading with a `TimeoutError`, and return how many bytes this frees."""
        self.cancelled = True
        self._limit.reschedule(asyncio.get_running_loop().time())
        return self.forget()

    def forget(self) -> int:
        """Return the number of bytes counted for it, and reset it."""
        size, self._bytes = self._bytes, 0
        return size


class Arriving:
    """The bodies that are being received, oldest first."""

    def __init__(self, *, max_requests: int, max_bytes: int) -> None:
        """Set the limits for the number of bodies and their bytes in all."""
        self._max_requests, self._max_bytes = max_requests, max_bytes
        self._bodies: dict[Body, None] = {}
        self._bytes = 0

    @asynccontextmanager
    async def body(self, timeout_s: float) -> AsyncIterator[Body]:
        """Count a body while it is read; the block may raise `TimeoutError` at any await."""
        async with asyncio.timeout(timeout_s) as limit:
            body = Body(self, limit)
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
