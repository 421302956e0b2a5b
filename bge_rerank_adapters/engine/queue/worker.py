"""One device's part of an engine: its model, its token budget, and the thread that runs packs."""

import logging
import math
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Sequence

from bge_rerank_adapters.engine.models.base import Model
from bge_rerank_adapters.engine.models.cpu.threads import settle_threads
from bge_rerank_adapters.engine.models.device_faults import (
    is_lost,
    is_out_of_memory,
    release_memory,
    remember_lost,
)
from bge_rerank_adapters.engine.queue.backlog import Backlog, TokenJob, TokenPack, fail, finish
from bge_rerank_adapters.engine.stats import Tally
from bge_rerank_adapters.engine.text.pairs import TokenPair
from bge_rerank_adapters.errors import NonFiniteLogitError, ScoringError, WorkerDiedError

# After each good pack the budget that a lack of memory cut down grows by one part in so many: a
# device that is short for good fails one pack in forty or so, one that was short once recovers.
_REGROWTH = 64

_log = logging.getLogger(__name__)


class DeviceWorker:
    """Scores pairs from a shared backlog on one device, in a thread that starts when needed.

    Attributes:
        model: The model on this device.
        budget: Most tokens of its next pack; for a time less than `pack_tokens` where the device
            ran out of memory.
        thread: The thread that runs packs; `None` where there is none.
    """

    def __init__(
        self,
        model: Model,
        *,
        number: int,
        backlog: Backlog,
        tally: Tally,
        pack_tokens: int | None = None,
    ) -> None:
        """Take over a model; no thread starts yet.

        Args:
            model: The model.
            number: Of the worker among those of its engine; names its thread.
            backlog: Where all workers of the engine take pairs from.
            tally: Counts what all of them do.
            pack_tokens: Token budget of a pack; `None` is what suits the model on its device.
        """
        self.model = model
        self.budget = self._pack_tokens = pack_tokens or model.pack_tokens
        self.thread: threading.Thread | None = None
        self._number, self._backlog, self._tally = number, backlog, tally
        self._warm_ups: deque[TokenJob] = deque()

    def start(self) -> None:
        """Make sure that the thread runs; the caller holds the backlog's lock.

        Raises:
            ScoringError: No thread can be started.
        """
        if self.thread is not None and self.thread.is_alive():
            return
        thread = threading.Thread(target=self._run, name=f"bge-rerank-{self._number}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise ScoringError(f"The scoring thread cannot start: {error}.") from error
        self.thread = thread
        scoring_threads.add(thread)

    def warm_up(self, job: TokenJob) -> None:
        """Queue pairs that are this device's alone, as one pack; the caller holds the lock."""
        self._backlog.register(job)
        self._warm_ups.append(job)
        self._backlog.changed.notify_all()

    def _run(self) -> None:
        try:
            settle_threads()
            while pack := self._take():
                self._count_waiting(pack)
                self._score(pack)
                del pack  # with its texts' ids, before the thread waits for the next
        except BaseException as error:  # noqa: BLE001 - callers must hear of whatever ended it
            self._fail_all(error)

    def _take(self) -> TokenPack:
        """Wait for pairs and return a pack of them; `[]` once the backlog is closed."""
        with self._backlog.changed:
            while not self._backlog.closed:
                if self._warm_ups:
                    job = self._warm_ups.popleft()
                    return [(job, position) for position in range(len(job.pairs))]
                if pack := self._backlog.take(self.budget, multiple=self.model.streams):
                    return pack
                self._backlog.changed.wait()
            return []

    def _count_waiting(self, pack: TokenPack) -> None:
        now = time.monotonic()
        for job in _jobs(pack):
            if job.queued_at is not None:
                job.waited_s = now - job.queued_at
                self._tally.add_waiting(job.waited_s)
                job.queued_at = None

    def _score(self, pack: TokenPack) -> None:
        """Run a pack; where that fails, parts of it that may do better."""
        begin = time.perf_counter()
        try:
            logits = self.model.logits([job.pairs[position] for job, position in pack])
            scored = list(zip(pack, logits, strict=True))
        except Exception as error:  # noqa: BLE001 - belongs to the callers whose pairs these were
            # Its frames hold tensors, which the next packs may need the room of.
            traceback.clear_frames(error.__traceback__)
            parts = self._parts_of_failed(pack, error)
        else:
            self._count(pack, time.perf_counter() - begin)
            self._store(scored)
            return
        if parts:
            release_memory(self.model.device)
        for part in parts:
            self._score(part)

    def _parts_of_failed(self, pack: TokenPack, error: Exception) -> list[TokenPack]:
        """Return the packs to run instead of one that failed; none once its callers are told."""
        if is_lost(error, self.model.device):
            self._close_engine(pack, error)
            return []
        if is_out_of_memory(error) and len(pack) > 1:
            self._shrink_budget(pack)
            middle = len(pack) // 2
            return [pack[:middle], pack[middle:]]
        jobs = _jobs(pack)
        if len(jobs) == 1:
            _fail_pack(pack, error)
            return []
        # Each call's pairs alone, so that only the one whose pairs fail hears of it.
        return [
            [place for place in pack if place[0] is job] for job in jobs if not job.future.done()
        ]

    def _close_engine(self, pack: TokenPack, error: Exception) -> None:
        """Close the engine, whose device is lost; the pack's callers get the error itself."""
        message = remember_lost(self.model.device, error)
        _log.error("The engine closes itself: %s", message, exc_info=error)
        self._backlog.refuse(because=message)
        for job in _jobs(pack):
            failure = ScoringError(f"The model failed: {message}")
            failure.__cause__ = error
            fail(job.future, failure)
        self._backlog.close()

    def _count(self, pack: TokenPack, seconds: float) -> None:
        pairs = [job.pairs[position] for job, position in pack]
        self._tally.add_pack(
            len(pairs),
            _tokens(pack),
            truncated=sum(pair.truncated for pair in pairs),
            query_truncated=sum(pair.query_truncated for pair in pairs),
            budget=self.budget,
            seconds=seconds,
        )
        self.budget = min(self._pack_tokens, self.budget + self.budget // _REGROWTH + 1)

    def _shrink_budget(self, pack: TokenPack) -> None:
        """Halve the budget of the packs to come, so that they need not fail in their turn."""
        tokens = _tokens(pack)
        self.budget = max(1, min(self.budget, tokens) // 2)
        _log.warning(
            "%s has too little memory for a pack of %d pairs and %d tokens; running its halves, "
            "and packs of at most %d tokens for now",
            self.model.device,
            len(pack),
            tokens,
            self.budget,
        )

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
            # The worker that scored what is not finite fails the job, and may be about to.
            if all(map(math.isfinite, logits)):
                finish(job.future, logits)

    def _fail_all(self, error: BaseException) -> None:
        with self._backlog.changed:
            # The next call starts another thread, though this one still runs.
            self.thread = None
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


# Python itself keeps those that run. They outlive an engine that was dropped, whose weights they
# free.
scoring_threads: "weakref.WeakSet[threading.Thread]" = weakref.WeakSet()


def _jobs(pack: TokenPack) -> list[TokenJob]:
    return list(dict.fromkeys(job for job, _ in pack))


def _tokens(pack: TokenPack) -> int:
    return sum(len(job.pairs[position]) for job, position in pack)


def _not_finite(job: TokenJob, pair: TokenPair, logit: float) -> NonFiniteLogitError:
    return NonFiniteLogitError(
        f"The model gave {logit} for {job.name(pair.index)} ({len(pair)} tokens); check the "
        'weights, or use dtype="float32" if they overflow in half precision.'
    )


def _fail_pack(pack: TokenPack, error: Exception) -> None:
    # An error for each caller, since raising one in two threads would mix their tracebacks.
    for job in _jobs(pack):
        failure = ScoringError(
            f"The model failed on a pack of {len(pack)} pairs and {_tokens(pack)} tokens: "
            f"{type(error).__name__}: {error}"
        )
        failure.__cause__ = error
        fail(job.future, failure)
