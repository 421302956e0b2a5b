"""All calls of an engine that have no logits yet: who waits, for what, and who may join them."""

import os
import threading
import time
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

from bge_rerank_adapters.engine.queue.packs import Job, Pack, PackQueue
from bge_rerank_adapters.engine.text.pairs import TokenPair
from bge_rerank_adapters.errors import ClosedError, Overloaded, WorkerDiedError

Logits = Future[list[float]]
TokenJob = Job[TokenPair]
TokenPack = Pack[TokenPair]


class Backlog:
    """A queue that threads share, and that knows every call until its future is resolved.

    Attributes:
        changed: Its lock, on which takers wait; may be entered again by its holder.
        closed: Whether it lets nobody in any more.
    """

    def __init__(self, *, max_queued_pairs: int) -> None:
        """Begin with nobody waiting, and room for `max_queued_pairs` pairs."""
        self._max_queued_pairs = max_queued_pairs
        self.closed = False
        self._closed_because: str | None = None
        self._pid = os.getpid()
        self._begin_empty()

    def _begin_empty(self) -> None:
        self.changed = threading.Condition()
        self._queue: PackQueue[TokenPair] = PackQueue()
        # How many pairs each call that is still tokenising will bring, and their sum.
        self._reserved: dict[Logits, int] = {}
        self._reserved_pairs = 0
        # All that has been registered and not resolved, wherever its pairs are.
        self._jobs: dict[Logits, TokenJob] = {}

    def __len__(self) -> int:
        """Return how many pairs wait, those still to be tokenised included."""
        with self.changed:
            return self._reserved_pairs + len(self._queue)

    def check_open(self) -> None:
        """Raise unless pairs can be scored.

        Raises:
            ClosedError: The engine has been closed.
            WorkerDiedError: It was made before a fork.
        """
        if self.closed:
            raise ClosedError(self._closed_because or "The engine is closed; make a new Reranker.")
        if self.is_of_parent:
            raise WorkerDiedError(
                "The engine was made before this process was forked, and its scoring thread did "
                "not come along; make the Reranker in the new process, or start processes with "
                '"spawn".'
            )

    @property
    def is_of_parent(self) -> bool:
        """Whether this process was forked off since, so that no thread serves the queue."""
        return self._pid != os.getpid()

    def reserve(self, future: Logits, pairs: int, *, bounded: bool = True) -> None:
        """Keep room for the pairs of a call, which come with `put`; returns at once.

        Args:
            future: Of the logits. Cancelling it gives the room back, even if this was interrupted,
                and its pairs are not scored.
            pairs: How many, at least 1.
            bounded: Whether `max_queued_pairs` applies.

        Raises:
            Overloaded: Too many pairs wait already.
            ClosedError: The engine has been closed.
        """
        # First, so that a call that is interrupted from here on can give its room back.
        future.add_done_callback(self._forget)
        with self.changed:
            self.check_open()
            waiting = len(self)
            if bounded and waiting and waiting + pairs > self._max_queued_pairs:
                raise Overloaded(
                    f"{waiting} pairs wait already, and {pairs} more would be over "
                    f"max_queued_pairs={self._max_queued_pairs}; try again later, send fewer "
                    "pairs at a time, or raise the limit."
                )
            # One that another thread has given up meanwhile would be forgotten by nobody.
            if not future.done():
                self._reserved[future] = pairs
                self._reserved_pairs += pairs

    def register(self, job: TokenJob) -> bool:
        """Turn the room kept for a call into a job that waits for its logits.

        Returns:
            Whether the call still waits; False if it has been cancelled meanwhile.
        """
        with self.changed:
            if job.future not in self._reserved:
                return False
            self._reserved_pairs -= self._reserved.pop(job.future)
            self._jobs[job.future] = job
            job.queued_at = time.monotonic()
            return True

    def put(self, job: TokenJob) -> None:
        """Queue the pairs of a call whose future has been reserved."""
        with self.changed:
            if self.register(job):
                self._queue.put(job)
                self.changed.notify_all()

    def take(self, max_tokens: int, *, multiple: int) -> TokenPack:
        """Return a pack of what waits, `[]` if nothing does; arguments as of `PackQueue.take`."""
        with self.changed:
            return self._queue.take(max_tokens, multiple=multiple)

    def refuse(self, *, because: str | None = None) -> None:
        """Let nobody in from now on; calls that wait are left to `close`.

        Args:
            because: What went wrong, for an engine that closes itself.
        """
        with self.changed:
            if not self.closed and because:
                self._closed_because = f"The engine closed itself: {because}"
            self.closed = True
            self.changed.notify_all()

    def close(self) -> None:
        """Let nobody in, and fail all who wait with `ClosedError`."""
        with self.changed:
            self.refuse()
            futures = [*self._reserved, *self._jobs]
            self._queue.clear()
        reason = self._closed_because or "The engine was closed before the call had been scored."
        for future in futures:
            fail(future, ClosedError(reason))

    def take_all(self) -> list[Logits]:
        """Empty the queue; return the futures of all calls that were put and have no logits."""
        with self.changed:
            self._queue.clear()
            return list(self._jobs)

    def leave_to_parent(self) -> None:
        """In a forked process: forget the parent's calls, and a lock that its threads may hold."""
        self._begin_empty()

    def _forget(self, future: Logits) -> None:
        """Forget a call that is done, failed or cancelled, and what of it waits."""
        with self.changed:
            self._reserved_pairs -= self._reserved.pop(future, 0)
            job = self._jobs.pop(future, None)
            if job is not None:
                self._queue.drop(job)


# Asking `done()` first would not do: it may be cancelled between the two.
def fail(future: Logits, error: Exception) -> None:
    """Hand over an error unless the call has been cancelled or has failed already."""
    with suppress(InvalidStateError):
        future.set_exception(error)


def finish(future: Logits, logits: list[float]) -> None:
    """Hand over logits unless the call has been cancelled or has failed already."""
    with suppress(InvalidStateError):
        future.set_result(logits)
