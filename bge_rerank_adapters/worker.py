"""The scoring threads: one for each device, all fed from one queue."""

import atexit
import math
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import InvalidStateError
from contextlib import suppress

from bge_rerank_adapters.errors import (
    ClosedError,
    NonFiniteLogitError,
    Overloaded,
    ScoringError,
    WorkerDiedError,
)
from bge_rerank_adapters.models.devices import is_out_of_memory, release_memory
from bge_rerank_adapters.models.loading import Model
from bge_rerank_adapters.packing import Job, Pack, PackQueue
from bge_rerank_adapters.tokenization import TokenPair

TokenJob = Job[TokenPair]
_JOIN_TIMEOUT_S = 10.0


class ScoringCore:
    """Scores jobs on one model per device; threads start with the first job.

    A job's future always resolves: with its logits, with what went wrong in its own packs, or with
    `ClosedError` or `WorkerDiedError`. No job waits for a thread that is gone.
    """

    def __init__(self, models: Sequence[Model], *, pack_tokens: int, max_queued_pairs: int) -> None:
        """Take over the models, one for each device."""
        self._models = list(models)
        self._pack_tokens = pack_tokens
        self._max_queued_pairs = max_queued_pairs
        self._queue: PackQueue[TokenPair] = PackQueue()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread | None] = [None] * len(self._models)
        self._running: list[Pack[TokenPair]] = [[] for _ in self._models]
        self._closed = False
        self._pid = os.getpid()
        _live_cores.add(self)

    @property
    def closed(self) -> bool:
        """Whether the core scores no more."""
        return self._closed

    def submit(self, pairs: Sequence[TokenPair], *, bounded: bool = True) -> TokenJob:
        """Queue the pairs of one call and return at once.

        Args:
            pairs: n >= 1 pairs.
            bounded: Whether `max_queued_pairs` applies.

        Raises:
            Overloaded: Too many pairs wait already; none of these was queued.
            ClosedError: The engine has been closed.
        """
        # Before the lock too: in a forked process it may be held by a thread that is gone.
        self.check_open()
        job = Job(pairs)
        with self._changed:
            self.check_open()
            waiting = len(self._queue)
            if bounded and waiting and waiting + len(pairs) > self._max_queued_pairs:
                raise Overloaded(
                    f"{waiting} pairs wait already, and {len(pairs)} more would be over "
                    f"max_queued_pairs={self._max_queued_pairs}; try again later, send fewer "
                    "pairs at a time, or raise the limit."
                )
            self._start_threads()
            self._queue.put(job)
            self._changed.notify_all()
        # Whoever cancels the future is rid of what has not run yet.
        job.future.add_done_callback(lambda _: self._drop(job))
        return job

    def stop(self) -> None:
        """Close without waiting: what waits or runs fails with `ClosedError`, threads end."""
        with self._changed:
            self._closed = True
            jobs = {id(job): job for job in self._queue.drain()}
            jobs |= {id(job): job for pack in self._running for job, _ in pack}
            self._changed.notify_all()
        for job in jobs.values():
            _fail(job, ClosedError("The engine was closed before the call had been scored."))

    def close(self) -> None:
        """Stop, wait for the threads to end, and let go of the models; harmless if repeated."""
        self.stop()
        if self._pid == os.getpid():
            for thread in self._threads:
                if thread is not None and thread is not threading.current_thread():
                    thread.join(_JOIN_TIMEOUT_S)
        devices = [model.device for model in self._models]
        self._models.clear()
        for device in devices:
            release_memory(device)

    def check_open(self) -> None:
        """Raise unless pairs can be scored.

        Raises:
            ClosedError: The engine has been closed.
            WorkerDiedError: It was made before a fork.
        """
        if self._closed:
            raise ClosedError("The engine is closed; make a new Reranker.")
        if self._pid != os.getpid():
            raise WorkerDiedError(
                "The engine was made before this process was forked, and its scoring thread did "
                "not come along; make the Reranker in the new process, or start processes with "
                '"spawn".'
            )

    def _start_threads(self) -> None:
        for place, thread in enumerate(self._threads):
            if thread is None or not thread.is_alive():
                started = threading.Thread(
                    target=self._run, args=(place,), name=f"bge-rerank-{place}", daemon=True
                )
                self._threads[place] = started
                started.start()

    def _run(self, place: int) -> None:
        try:
            model = self._models[place]
            while pack := self._next_pack(place):
                self._score(model, pack)
                self._running[place] = []
        except BaseException as error:  # noqa: BLE001 - callers must hear of whatever ended it
            self._fail_all(error, place)

    def _next_pack(self, place: int) -> Pack[TokenPair]:
        """Wait for pairs and take a pack of them; `[]` once the core is closed."""
        with self._changed:
            while not self._closed:
                pack = self._queue.take(self._pack_tokens)
                if pack:
                    self._running[place] = pack
                    return pack
                self._changed.wait()
            return []

    def _score(self, model: Model, pack: Pack[TokenPair]) -> None:
        """Run a pack, in halves as long as the device has too little memory for it."""
        try:
            logits = model.logits([job.pairs[position] for job, position in pack])
        except Exception as error:  # noqa: BLE001 - belongs to the callers whose pairs these were
            if is_out_of_memory(error) and len(pack) > 1:
                release_memory(model.device)
                middle = len(pack) // 2
                self._score(model, pack[:middle])
                self._score(model, pack[middle:])
                return
            self._fail_pack(pack, error)
            return
        for (job, position), logit in zip(pack, logits, strict=True):
            self._store(job, position, logit)

    def _store(self, job: TokenJob, position: int, logit: float) -> None:
        if not math.isfinite(logit):
            pair = job.pairs[position]
            _fail(
                job,
                NonFiniteLogitError(
                    f"The model gave {logit} for the pair at index {pair.index} ({len(pair)} "
                    'tokens); check the weights, or use dtype="float32" if they overflow in half '
                    "precision."
                ),
            )
            return
        job.logits[position] = logit
        job.missing -= 1
        if not job.missing:
            logits = [each for each in job.logits if each is not None]
            _resolve(lambda: job.future.set_result(logits))

    def _fail_pack(self, pack: Pack[TokenPair], error: Exception) -> None:
        tokens = sum(len(job.pairs[position]) for job, position in pack)
        for job in {id(job): job for job, _ in pack}.values():
            failure = ScoringError(
                f"The model failed on a pack of {len(pack)} pairs and {tokens} tokens: "
                f"{type(error).__name__}: {error}"
            )
            failure.__cause__ = error
            _fail(job, failure)

    def _fail_all(self, error: BaseException, place: int) -> None:
        with self._changed:
            # From here on this thread is gone for whoever submits next, though it still runs.
            self._threads[place] = None
            jobs = {id(job): job for job in self._queue.drain()}
            jobs |= {id(job): job for job, _ in self._running[place]}
            self._running[place] = []
        for job in jobs.values():
            failure = WorkerDiedError(
                f"The scoring thread ended: {type(error).__name__}: {error}. "
                "The next call starts a new one."
            )
            failure.__cause__ = error
            _fail(job, failure)

    def _drop(self, job: TokenJob) -> None:
        with self._changed:
            self._queue.drop(job)


def _fail(job: TokenJob, error: Exception) -> None:
    _resolve(lambda: job.future.set_exception(error))


def _resolve(resolve: Callable[[], None]) -> None:
    """Resolve a future unless its caller has cancelled it or another pack has failed it."""
    # Asking `done()` first would not do: it may be cancelled between the two.
    with suppress(InvalidStateError):
        resolve()


_live_cores: "weakref.WeakSet[ScoringCore]" = weakref.WeakSet()


@atexit.register
def _close_live_cores() -> None:
    # A daemon thread inside torch while the interpreter goes away can crash the process.
    for core in list(_live_cores):
        core.close()
