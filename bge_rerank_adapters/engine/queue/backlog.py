"""The calls of an engine that wait for logits, and the limit on their pairs."""

import os
import threading
import time
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

from bge_rerank_adapters.engine.queue.packs import Job, Pack, PackQueue
from bge_rerank_adapters.engine.text.pairs import TokenPair
from bge_rerank_adapters.errors import (
    ClosedError,
    NonFiniteLogitError,
    Overloaded,
    ScoringError,
    WorkerDiedError,
)

Logits = Future[list[float]]
TokenJob = Job[TokenPair]
TokenPack = Pack[TokenPair]


class Backlog:
    """A thread-safe queue that keeps every call until its future is resolved.

    Attributes:
        changed: Condition that takers wait on; its lock, which is reentrant, guards the queue.
        closed: Whether it refuses new calls.
    """

    def __init__(self, *, max_queued_pairs: int) -> None:
        """Make an empty queue with room for `max_queued_pairs` pairs."""
        self._max_queued_pairs = max_queued_pairs
        self.closed = False
        self._closed_because: str | None = None
        self._pid = os.getpid()
        self._begin_empty()

    def _begin_empty(self) -> None:
        self.changed = threading.Condition()
        self._queue: PackQueue[TokenPair] = PackQueue()
        # Number of pairs of each call that is still tokenising, and their sum.
        self._reserved: dict[Logits, int] = {}
        self._reserved_pairs = 0
        # Every job from `register` until its future is resolved, whether queued or in packs.
        self._jobs: dict[Logits, TokenJob] = {}

    def __len__(self) -> int:
        """Return how many pairs wait, including those not yet tokenised."""
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
        if self.made_before_fork:
            raise WorkerDiedError(
                "The engine was made before this process was forked, and its scoring thread did "
                "not come along; make the Reranker in the new process, or start processes with "
                '"spawn".'
            )

    @property
    def made_before_fork(self) -> bool:
        """Whether this process was forked after the queue was made, so that no thread serves it."""
        return self._pid != os.getpid()

    def reserve(self, future: Logits, pairs: int, *, bounded: bool = True) -> None:
        """Reserve room for the pairs of a call, which come with `put`; never waits.

        Args:
            future: The future of the call's logits. Cancelling it gives the room back, even if this
                method was interrupted.
            pairs: Number of pairs, at least 1.
            bounded: Whether `max_queued_pairs` applies.

        Raises:
            Overloaded: Too many pairs wait already.
            ClosedError: The engine has been closed.
        """
        # First, so that an interrupt at any later moment gives the room back.
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
            # If it was cancelled meanwhile, its callback has run and would not remove it.
            if not future.done():
                self._reserved[future] = pairs
                self._reserved_pairs += pairs

    def register(self, job: TokenJob) -> bool:
        """Replace a call's reservation by a job that waits for its logits.

        Returns:
            Whether the call still waits: False if it has been cancelled.
        """
        with self.changed:
            if job.future not in self._reserved:
                return False
            self._reserved_pairs -= self._reserved.pop(job.future)
            self._jobs[job.future] = job
            job.queued_at = time.monotonic()
            return True

    def put(self, job: TokenJob) -> None:
        """Queue the pairs of a call that has a reservation."""
        with self.changed:
            if self.register(job):
                self._queue.put(job)
                self.changed.notify_all()

    def take(self, max_tokens: int, *, multiple: int) -> TokenPack:
        """Return a pack of queued pairs, `[]` if there are none; see `PackQueue.take`."""
        with self.changed:
            return self._queue.take(max_tokens, multiple=multiple)

    def refuse(self, *, because: str | None = None) -> None:
        """Refuse new calls; those that wait are left to `close`.

        Args:
            because: What went wrong, if the engine closes itself.
        """
        with self.changed:
            if not self.closed and because:
                self._closed_because = f"The engine closed itself: {because}"
            self.closed = True
            self.changed.notify_all()

    def close(self) -> None:
        """Refuse new calls, and fail those that wait with `ClosedError`."""
        with self.changed:
            self.refuse()
            futures = [*self._reserved, *self._jobs]
            self._queue.clear()
        reason = self._closed_because or "The engine was closed before the call had been scored."
        for future in futures:
            fail(future, ClosedError(reason))

    def take_all(self) -> list[Logits]:
        """Empty the queue; return the futures of all registered calls without logits."""
        with self.changed:
            self._queue.clear()
            return list(self._jobs)

    def leave_to_parent(self) -> None:
        """In a forked process: drop the parent's calls, and the lock that its threads may hold."""
        self._begin_empty()

    def _forget(self, future: Logits) -> None:
        """Remove a call that is done, failed or cancelled, with its queued pairs."""
        with self.changed:
            self._reserved_pairs -= self._reserved.pop(future, 0)
            job = self._jobs.pop(future, None)
            if job is not None:
                self._queue.drop(job)


# Not `if not done()`: the future may be cancelled in between.
def fail(future: Logits, error: Exception, *, cause: BaseException | None = None) -> None:
    """Set the error of a call, and its cause, unless it has been cancelled or has failed.

    Each caller needs an error of its own: raising one in two threads would mix tracebacks.
    """
    if cause is not None:
        error.__cause__ = cause
    with suppress(InvalidStateError):
        future.set_exception(error)


def finish(future: Logits, logits: list[float]) -> None:
    """Set the logits of a call, unless it has been cancelled or has failed."""
    with suppress(InvalidStateError):
        future.set_result(logits)


def jobs_of(pack: TokenPack) -> list[TokenJob]:
    """Return the jobs that a pack has pairs of, each once."""
    return list(dict.fromkeys(job for job, _ in pack))


def pairs_of(pack: TokenPack) -> list[TokenPair]:
    """Return the pairs of a pack."""
    return [job.pairs[position] for job, position in pack]


def tokens_of(pack: TokenPack) -> int:
    """Return how many tokens a pack has."""
    return sum(map(len, pairs_of(pack)))


def counts_of(pack: TokenPack) -> dict[str, int]:
    """Return the counts of a pack by the names of `EngineStats`."""
    pairs = pairs_of(pack)
    return {
        "pairs": len(pairs),
        "tokens": tokens_of(pack),
        "truncated_pairs": sum(pair.truncated for pair in pairs),
        "query_truncated_pairs": sum(pair.query_truncated for pair in pairs),
    }


def fail_pack(pack: TokenPack, error: Exception) -> None:
    """Fail all calls of a pack with an error that names its size."""
    message = (
        f"The model failed on a pack of {len(pack)} pairs and {tokens_of(pack)} tokens: "
        f"{type(error).__name__}: {error}"
    )
    for job in jobs_of(pack):
        fail(job.future, ScoringError(message), cause=error)


def not_finite(job: TokenJob, pair: TokenPair, logit: float) -> NonFiniteLogitError:
    """Return the error for a logit that is NaN or infinite."""
    return NonFiniteLogitError(
        f"The model gave {logit} for {job.name(pair.index)} ({len(pair)} tokens); check the "
        'weights, or use dtype="float32" if they overflow in half precision.'
    )
