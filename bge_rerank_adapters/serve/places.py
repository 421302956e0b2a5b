"""Places of requests: of those that are scored, and of those whose bodies are still arriving.

They are counted apart. A place among the scored belongs to a body that is there, so that clients
which send slowly keep nobody from being scored. Bodies that arrive are bounded by number and by
bytes; where one more would be too many, the one that has been arriving longest is given up.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from bge_rerank_adapters.serve.refusals import overloaded

# Under which a request's scope has its place.
PLACE = "bge_rerank.place"


class Scored:
    """Places for requests that are scored at the same time."""

    def __init__(self, most: int) -> None:
        """Have so many places."""
        self._most, self._taken = most, 0

    def check(self) -> None:
        """Raise if none is free.

        Raises:
            Refusal: All are taken.
        """
        if self._taken >= self._most:
            raise overloaded(
                f"{self._most} requests are served already, which is the most at a time; try again "
                "later."
            )

    def add(self, places: int) -> None:
        """Take a place, or give it back with -1."""
        self._taken += places


class Place:
    """One request's place among the scored, which it takes when its body is there."""

    def __init__(self, scored: Scored) -> None:
        """Have none yet."""
        self._scored, self._taken = scored, False

    def take(self) -> None:
        """Take it.

        Raises:
            Refusal: None is free.
        """
        if not self._taken:
            self._scored.check()
            self._scored.add(1)
            self._taken = True

    def release(self) -> None:
        """Give it back, if it was taken."""
        if self._taken:
            self._scored.add(-1)
            self._taken = False


class Body:
    """A body that is arriving.

    Attributes:
        given_up: Whether it made room for others.
    """

    def __init__(self, arriving: "Arriving", limit: asyncio.Timeout) -> None:
        self._arriving, self._limit = arriving, limit
        self._bytes = 0
        self.given_up = False

    def add(self, size: int) -> None:
        """Count bytes that have come."""
        self._bytes += size
        self._arriving.count(size)

    def give_up(self) -> int:
        """Let the reading end in a `TimeoutError`, and return how many bytes that frees."""
        self.given_up = True
        self._limit.reschedule(asyncio.get_running_loop().time())
        return self.forget()

    def forget(self) -> int:
        """Return how many bytes are counted for it, and count them no more."""
        size, self._bytes = self._bytes, 0
        return size


class Arriving:
    """The bodies that are arriving, the one that began first first."""

    def __init__(self, *, max_requests: int, max_bytes: int) -> None:
        """Let in so many, with so many bytes of them all."""
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
        """Count bytes that have come."""
        self._bytes += size
        self._make_room()

    def _make_room(self) -> None:
        # One that is larger than the limit alone is read where there is no other.
        while len(self._bodies) > 1 and (
            len(self._bodies) > self._max_requests or self._bytes > self._max_bytes
        ):
            oldest = next(iter(self._bodies))
            del self._bodies[oldest]
            self._bytes -= oldest.give_up()
