"""The scoring threads: one for each device, all fed from one queue."""

import atexit
import logging
import math
import os
import threading
import time
import traceback
import weakref
from collections.abc import Sequence

from bge_rerank_adapters.engine.models.cpu.streams import settle_threads
from bge_rerank_adapters.engine.models.devices import is_out_of_memory, release_memory
from bge_rerank_adapters.engine.models.loading import Model
from bge_rerank_adapters.engine.queue.backlog import (
    Backlog,
    Logits,
    TokenJob,
    TokenPack,
    fail,
    finish,
)
from bge_rerank_adapters.engine.queue.packs import Job
from bge_rerank_adapters.engine.stats import EngineStats, Tally
from bge_rerank_adapters.engine.text.tokenizer import TokenPair
from bge_rerank_adapters.errors import NonFiniteLogitError, ScoringError, WorkerDiedError

# Longer than any pack takes that is worth waiting for.
_JOIN_TIMEOUT_S = 60.0
# After each good pack the budget that a lack of memory cut down grows by one part in so many: a
# device that is short for good fails one pack in forty or so, one that was short once recovers.
_REGROWTH = 64

_log = logging.getLogger(__name__)


class ScoringCore:
    """Scores jobs on one model per device; threads start with the first job.

    A future it gave out always resolves: with the logits, with what went wrong in the call's own
    packs, or with `ClosedError` or `WorkerDiedError`. No call waits for a thread that is gone.
    """

    def __init__(
        self,
        models: Sequence[Model],
        *,
        pack_tokens: int,
        max_queued_pairs: int,
        pack_multiple: int = 1,
    ) -> None:
        """Take over the models, one for each device; the rest is as of `Backlog`."""
        self._models = list(models)
        self._pack_tokens = pack_tokens
        self._budgets = [pack_tokens] * len(self._models)
        self._backlog = Backlog(max_queued_pairs=max_queued_pairs, pack_multiple=pack_multiple)
        self.tally = Tally()
        self._threads: list[threading.Thread | None] = [None] * len(self._models)
        _live_cores.add(self)

    @property
    def closed(self) -> bool:
        """Whether the core scores no more: it was stopped, or left to the parent by a fork."""
        return self._backlog.closed or self._backlog.is_of_parent

    def check_open(self) -> None:
        """Raise unless pairs can be scored; errors as of `Backlog.check_open`."""
        self._backlog.check_open()

    def reserve(self, pairs: int, *, bounded: bool = True) -> Logits:
        """Keep room for the pairs of a call; see `Backlog.reserve`."""
        return self._backlog.reserve(pairs, bounded=bounded)

    def submit(self, job: TokenJob, *, place: int | None = None) -> None:
        """Queue the pairs of a call whose future is one of `reserve`, and return at once.

        Args:
            job: The call's.
            place: The device that is to score them; `None` is whichever is free first.

        Raises:
            ClosedError: The engine has been closed.
            ScoringError: No thread can be started.
        """
        # Under one lock, so that no thread ends between the two without failing the job.
        with self._backlog.changed:
            self.check_open()
            self._start_threads()
            self._backlog.put(job, place=place)

    def score_everywhere(self, pairs: Sequence[TokenPair]) -> None:
        """Score the pairs on every device, and wait for all of them; errors as of a call."""
        jobs = [Job(list(pairs), self.reserve(len(pairs), bounded=False)) for _ in self._models]
        try:
            for place, job in enumerate(jobs):
                self.submit(job, place=place)
            for job in jobs:
                job.future.result()
        finally:
            for job in jobs:
                job.future.cancel()

    def stats(self) -> EngineStats:
        """Return the counts so far."""
        return self.tally.read(queued_pairs=len(self._backlog))

    def stop(self) -> None:
        """Close without waiting: what waits or runs fails with `ClosedError`, threads end."""
        self._backlog.close()

    def close(self) -> None:
        """Stop, wait for the threads to end, and let go of the models; harmless if repeated."""
        self.stop()
        devices = [model.device for model in self._models]
        self._models.clear()
        if self._backlog.is_of_parent:
            return  # and so are threads and devices
        for thread in self._threads:
            if thread is not None and thread is not threading.current_thread():
                thread.join(_JOIN_TIMEOUT_S)
                if thread.is_alive():
                    _log.warning("%s still runs a pack; its memory is freed after it", thread.name)
        for device in devices:
            release_memory(device)

    def leave_to_parent(self) -> None:
        """In a forked process: forget the parent's calls, and locks that its threads may hold."""
        self._backlog.leave_to_parent()
        self.tally = Tally()

    def _start_threads(self) -> None:
        for place, thread in enumerate(self._threads):
            if thread is None or not thread.is_alive():
                started = threading.Thread(
                    target=self._run,
                    args=(place, self._models[place]),
                    name=f"bge-rerank-{place}",
                    daemon=True,
                )
                try:
                    started.start()
                except RuntimeError as error:
                    raise ScoringError(f"The scoring thread cannot start: {error}.") from error
                self._threads[place] = started
                _threads.add(started)

    def _run(self, place: int, model: Model) -> None:
        try:
            settle_threads()
            while self._run_pack(place, model):
                pass
        except BaseException as error:  # noqa: BLE001 - callers must hear of whatever ended it
            self._fail_all(place, error)

    def _run_pack(self, place: int, model: Model) -> bool:
        """Score a pack and forget it; False once the core is closed."""
        pack = self._backlog.take(lambda: self._budgets[place], place=place)
        if pack:
            self._count_waiting(pack)
            self._score(place, model, pack)
        return bool(pack)

    def _count_waiting(self, pack: TokenPack) -> None:
        now = time.monotonic()
        for job in dict.fromkeys(job for job, _ in pack):
            if job.queued_at is not None:
                job.waited_s = now - job.queued_at
                self.tally.add_waiting(job.waited_s)
                job.queued_at = None

    def _score(self, place: int, model: Model, pack: TokenPack) -> None:
        """Run a pack, in halves as long as the device has too little memory for it."""
        scored: list[tuple[tuple[TokenJob, int], float]] | None = None
        begin = time.perf_counter()
        try:
            logits = model.logits([job.pairs[position] for job, position in pack])
            scored = list(zip(pack, logits, strict=True))
        except Exception as error:  # noqa: BLE001 - belongs to the callers whose pairs these were
            # Its frames hold tensors, which the next packs may need the room of.
            traceback.clear_frames(error.__traceback__)
            if len(pack) == 1 or not is_out_of_memory(error):
                _fail_pack(pack, error)
                return
        if scored is None:
            self._make_room(place, model, pack)
            middle = len(pack) // 2
            self._score(place, model, pack[:middle])
            self._score(place, model, pack[middle:])
        else:
            self._count(place, pack, time.perf_counter() - begin)
            self._store(scored)

    def _count(self, place: int, pack: TokenPack, seconds: float) -> None:
        budget = self._budgets[place]
        truncated = sum(job.pairs[position].truncated for job, position in pack)
        self.tally.add_pack(
            len(pack), _tokens(pack), truncated=truncated, budget=budget, seconds=seconds
        )
        self._budgets[place] = min(self._pack_tokens, budget + budget // _REGROWTH + 1)

    def _make_room(self, place: int, model: Model, pack: TokenPack) -> None:
        """Halve the budget of the packs to come, so that they need not fail in their turn."""
        tokens = _tokens(pack)
        self._budgets[place] = max(1, min(self._budgets[place], tokens) // 2)
        _log.warning(
            "%s has too little memory for a pack of %d pairs and %d tokens; running its halves, "
            "and packs of at most %d tokens for now",
            model.device,
            len(pack),
            tokens,
            self._budgets[place],
        )
        release_memory(model.device)

    def _store(self, scored: Sequence[tuple[tuple[TokenJob, int], float]]) -> None:
        """Hand logits to their jobs, and to their callers what is complete."""
        complete: list[TokenJob] = []
        # Another device may have pairs of the same job.
        with self._backlog.changed:
            for (job, position), logit in scored:
                job.logits[position] = logit
                job.missing -= 1
                if not job.missing:
                    complete.append(job)
        for (job, position), logit in scored:
            if not math.isfinite(logit):
                fail(job.future, _not_finite(job, job.pairs[position], logit))
        for job in complete:
            logits = [each for each in job.logits if each is not None]
            # Whoever scored what is not finite tells so, and may be about to.
            if all(map(math.isfinite, logits)):
                finish(job.future, logits)

    def _fail_all(self, place: int, error: BaseException) -> None:
        with self._backlog.changed:
            # From here on this thread is gone for whoever submits next, though it still runs.
            self._threads[place] = None
            futures = self._backlog.take_all()
        _log.error(
            "A scoring thread ended with %d calls waiting; the next call starts another",
            len(futures),
            exc_info=error,
        )
        for future in futures:
            failure = WorkerDiedError(
                f"The scoring thread ended: {type(error).__name__}: {error}. "
                "The next call starts a new one."
            )
            failure.__cause__ = error
            fail(future, failure)


def _tokens(pack: TokenPack) -> int:
    return sum(len(job.pairs[position]) for job, position in pack)


def _not_finite(job: TokenJob, pair: TokenPair, logit: float) -> NonFiniteLogitError:
    return NonFiniteLogitError(
        f"The model gave {logit} for {job.name(pair.index)} ({len(pair)} tokens); check the "
        'weights, or use dtype="float32" if they overflow in half precision.'
    )


def _fail_pack(pack: TokenPack, error: Exception) -> None:
    # An error for each caller, since raising one in two threads would mix their tracebacks.
    for job in dict.fromkeys(job for job, _ in pack):
        failure = ScoringError(
            f"The model failed on a pack of {len(pack)} pairs and {_tokens(pack)} tokens: "
            f"{type(error).__name__}: {error}"
        )
        failure.__cause__ = error
        fail(job.future, failure)


_live_cores: "weakref.WeakSet[ScoringCore]" = weakref.WeakSet()
# Python itself keeps those that run. They outlive a core that was dropped, whose weights they free.
_threads: "weakref.WeakSet[threading.Thread]" = weakref.WeakSet()


@atexit.register
def _end_threads() -> None:
    # A daemon thread inside torch while the interpreter goes away can crash the process.
    for core in list(_live_cores):
        core.close()
    for thread in list(_threads):
        if thread.is_alive():
            thread.join(_JOIN_TIMEOUT_S)


def _leave_cores_to_parent() -> None:
    for core in list(_live_cores):
        core.leave_to_parent()
    _threads.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_cores_to_parent)
