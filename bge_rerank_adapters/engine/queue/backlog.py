"""All calls of an engine that have no logits yet: who waits, for what, and who may join them."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

from bge_rerank_adapters.engine.queue.packs import Job, Pack, PackQueue
from bge_rerank_adapters.engine.text.tokenizer import TokenPair
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

    def __init__(self, *, max_queued_pairs: int, pack_multiple: int = 1) -> None:
        """Begin with nobody waiting.

        Args:
            max_queued_pairs: Most pairs that may wait.
            pack_multiple: Of how many pairs full packs are a multiple, as of `PackQueue`.
        """
        self._max_queued_pairs, self._pack_multiple = max_queued_pairs, pack_multiple
        self.closed = False
        self._pid = os.getpid()
        self._begin_empty()

    def _begin_empty(self) -> None:
        self.changed = threading.Condition()
        self._queue: PackQueue[TokenPair] = PackQueue(multiple=self._pack_multiple)
        # How many pairs each call that is still tokenising will bring, and their sum.
        self._reserved: dict[Logits, int] = {}
        self._reserved_pairs = 0
        # All that has been put and not resolved, wherever its pairs are.
        self._jobs: dict[Logits, TokenJob] = {}
        # What a certain taker is to do, whoever else is free.
        self._own: dict[int, list[TokenJob]] = {}

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
            raise ClosedError("The engine is closed; make a new Reranker.")
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

    def reserve(self, pairs: int, *, bounded: bool = True) -> Logits:
        """Keep room for the pairs of a call, which come with `put`; returns at once.

        Args:
            pairs: How many, at least 1.
            bounded: Whether `max_queued_pairs` applies.

        Returns:
            The future of the logits. Who cancels it gives the room back, and its pairs are not
            scored.

        Raises:
            Overloaded: Too many pairs wait already.
            ClosedError: The engine has been closed.
        """
        future: Logits = Future()
        with self.changed:
            self.check_open()
            waiting = len(self)
            if bounded and waiting and waiting + pairs > self._max_queued_pairs:
                raise Overloaded(
                    f"{waiting} pairs wait already, and {pairs} more would be over "
                    f"max_queued_pairs={self._max_queued_pairs}; try again later, send fewer "
                    "pairs at a time, or raise the limit."
                )
            self._reserved[future] = pairs
            self._reserved_pairs += pairs
        future.add_done_callback(self._forget)
        return future

    def put(self, job: TokenJob, *, place: int | None = None) -> None:
        """Queue the pairs of a call whose future is one of `reserve`.

        Args:
            job: The call's.
            place: The taker that is to have all of them as its next pack; `None` is any.
        """
        with self.changed:
            if job.future not in self._reserved:
                return  # cancelled meanwhile
            self._reserved_pairs -= self._reserved.pop(job.future)
            self._jobs[job.future] = job
            job.queued_at = time.monotonic()
            if place is None:
                self._queue.put(job)
            else:
                self._own.setdefault(place, []).append(job)
            self.changed.notify_all()

    def take(self, max_tokens: Callable[[], int], *, place: int) -> TokenPack:
        """Wait for pairs and return a pack of them; `[]` once this is closed.

        Args:
            max_tokens: Tells the budget when there is something to take.
            place: Which taker this is.
        """
        with self.changed:
            while not self.closed:
                if own := self._own.get(place):
                    job = own.pop()
                    return [(job, position) for position in range(len(job.pairs))]
                if pack := self._queue.take(max_tokens()):
                    return pack
                self.changed.wait()
            return []

    def close(self) -> None:
        """Let nobody in, and fail all who wait with `ClosedError`."""
        with self.changed:
            self.closed = True
            futures = [*self._reserved, *self._jobs]
            self._queue.clear()
            self.changed.notify_all()
        for future in futures:
            fail(future, ClosedError("The engine was closed before the call had been scored."))

    def take_all(self) -> list[Logits]:
        """Empty the queue; return the futures of all calls that were put and have no logits."""
        with self.changed:
            self._queue.clear()
            self._own.clear()
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
