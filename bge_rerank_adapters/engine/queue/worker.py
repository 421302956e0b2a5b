"""The worker of one device: its model, its token budget, and the thread that runs packs."""

import logging
import math
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from bge_rerank_adapters.engine.models.base import Model, PendingLogits
from bge_rerank_adapters.engine.models.cpu.threads import settle_threads
from bge_rerank_adapters.engine.models.device_faults import (
    is_lost,
    is_out_of_memory,
    release_memory,
    remember_lost,
)
from bge_rerank_adapters.engine.queue.backlog import (
    Backlog,
    TokenJob,
    TokenPack,
    counts_of,
    fail,
    fail_pack,
    finish,
    jobs_of,
    not_finite,
    pairs_of,
    tokens_of,
)
from bge_rerank_adapters.engine.stats import Tally
from bge_rerank_adapters.errors import ScoringError, WorkerDiedError

# A budget that was reduced for lack of memory grows by 1/64 after each good pack. A device that was
# short of memory once recovers; one that always is fails about one pack in forty.
_REGROWTH = 64
# How many packs are launched after the one whose logits are waited for. One keeps the device busy
# while the thread reads logits and lays out the next pack; more would only delay new calls.
_PACKS_AHEAD = 1

_log = logging.getLogger(__name__)


class _Launched(NamedTuple):
    """A pack whose work has been queued on the device.

    Attributes:
        pack: The pack.
        pending: Waits for its logits and returns them.
        begun: When it was launched, by the performance counter.
    """

    pack: TokenPack
    pending: PendingLogits
    begun: float


class DeviceWorker:
    """Scores pairs from a shared backlog on one device, in a thread that starts when needed.

    If the model can be launched ahead, the next pack is launched before the logits of the last one
    are read. Packs finish in the order of their launches, and an error fails only its own pack.

    Attributes:
        model: The model on this device.
        budget: Maximum tokens of the next pack; less than `pack_tokens` for some time after the
            device ran out of memory.
        thread: The thread that runs packs; `None` if there is none.
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
            number: The worker's number in its engine; part of its thread's name.
            backlog: The queue that all workers of the engine take pairs from.
            tally: Counts the work of all of them.
            pack_tokens: Token budget of a pack; `None` is the model's own.
        """
        self.model = model
        self.budget = self._pack_tokens = pack_tokens or model.pack_tokens
        self.thread: threading.Thread | None = None
        self._number, self._backlog, self._tally = number, backlog, tally
        self._warm_ups: deque[TokenJob] = deque()
        self._launch = model.launch if model.runs_ahead else None
        self._launched: deque[_Launched] = deque()
        self._last_end = 0.0

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
        """Queue a pack that only this device runs; the caller holds the lock."""
        self._backlog.register(job)
        self._warm_ups.append(job)
        self._backlog.changed.notify_all()

    def _run(self) -> None:
        try:
            settle_threads()
            self._launched.clear()
            while (pack := self._take(wait=not self._launched)) or self._launched:
                if pack:
                    self._count_waiting(pack)
                    self._begin(pack)
                while len(self._launched) > (_PACKS_AHEAD if pack else 0):
                    self._finish(self._launched.popleft())
                del pack  # frees its token ids before the thread waits
        except BaseException as error:  # noqa: BLE001 - whatever ended it, callers must not wait on
            self._fail_all(error)

    def _take(self, *, wait: bool) -> TokenPack:
        """Return a pack of waiting pairs; `[]` once the backlog is closed.

        Args:
            wait: Whether to wait until there are pairs, instead of returning `[]`.
        """
        with self._backlog.changed:
            while not self._backlog.closed:
                if self._warm_ups:
                    job = self._warm_ups.popleft()
                    return [(job, position) for position in range(len(job.pairs))]
                if pack := self._backlog.take(self.budget, multiple=self.model.streams):
                    return pack
                if not wait:
                    return []
                self._backlog.changed.wait()
            return []

    def _count_waiting(self, pack: TokenPack) -> None:
        now = time.monotonic()
        for job in jobs_of(pack):
            if job.queued_at is not None:
                job.waited_s = now - job.queued_at
                self._tally.add(waiting_s=job.waited_s)
                job.queued_at = None

    def _begin(self, pack: TokenPack) -> None:
        """Launch a pack, or score it if the model cannot be launched ahead."""
        if self._launch is None:
            self._score(pack)
            return
        begun = time.perf_counter()
        try:
            pending = self._launch(pairs_of(pack))
        except Exception as error:  # noqa: BLE001 - passed on to the callers of these pairs
            traceback.clear_frames(error.__traceback__)
            # Finish earlier packs first: a device reports errors late, so this may be theirs.
            while self._launched:
                self._finish(self._launched.popleft())
            self._retry(pack, error)
        else:
            self._launched.append(_Launched(pack, pending, begun))

    def _score(self, pack: TokenPack) -> None:
        """Run a pack; if that fails, run smaller packs where that may help."""
        pending = partial(self.model.logits, pairs_of(pack))
        self._finish(_Launched(pack, pending, time.perf_counter()))

    def _finish(self, launched: _Launched) -> None:
        """Wait for the logits of a pack and store them; if it failed, run smaller packs."""
        pack, pending, begun = launched
        try:
            scored = list(zip(pack, pending(), strict=True))
        except Exception as error:  # noqa: BLE001 - passed on to the callers of these pairs
            # Its frames hold tensors, whose memory the next packs may need.
            traceback.clear_frames(error.__traceback__)
            self._retry(pack, error)
            return
        # If two packs overlap, the time of the second is counted from the end of the first.
        begun, self._last_end = max(begun, self._last_end), time.perf_counter()
        self._count(pack, self._last_end - begun)
        self._store(scored)

    def _retry(self, pack: TokenPack, error: Exception) -> None:
        """Run parts of a failed pack one after another, without launching ahead."""
        parts = self._parts_of_failed(pack, error)
        if parts:
            release_memory(self.model.device)
        for part in parts:
            self._score(part)

    def _parts_of_failed(self, pack: TokenPack, error: Exception) -> list[TokenPack]:
        """Return the packs to run instead of one that failed; `[]` if its callers got the error."""
        if is_lost(error, self.model.device):
            self._close_engine(pack, error)
            return []
        if is_out_of_memory(error) and len(pack) > 1:
            self._shrink_budget(pack)
            middle = len(pack) // 2
            return [pack[:middle], pack[middle:]]
        jobs = jobs_of(pack)
        if len(jobs) == 1:
            fail_pack(pack, error)
            return []
        # A pack for each call, so that only the call whose pairs fail gets the error.
        return [
            [place for place in pack if place[0] is job] for job in jobs if not job.future.done()
        ]

    def _close_engine(self, pack: TokenPack, error: Exception) -> None:
        """Close the engine, whose device is lost; the callers of the pack get the error itself."""
        message = remember_lost(self.model.device, error)
        # Log it once, though packs launched after the lost one fail as well.
        if not self._backlog.closed:
            _log.error("The engine closes itself: %s", message, exc_info=error)
        self._backlog.refuse(because=message)
        for job in jobs_of(pack):
            fail(job.future, ScoringError(f"The model failed: {message}"), cause=error)
        self._backlog.close()

    def _count(self, pack: TokenPack, seconds: float) -> None:
        counts = counts_of(pack)
        # A pair longer than the budget makes a full pack, not one that is more than full.
        budget = max(self.budget, counts["tokens"])
        self._tally.add(**counts, packs=1, budgets=budget, scoring_s=seconds)
        self.budget = min(self._pack_tokens, self.budget + self.budget // _REGROWTH + 1)

    def _shrink_budget(self, pack: TokenPack) -> None:
        """Halve the budget, so that the next packs do not fail as well."""
        tokens = tokens_of(pack)
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
        """Store logits in their jobs, and finish the jobs that are complete."""
        complete: list[TokenJob] = []
        # Another device may store logits of the same job.
        with self._backlog.changed:
            for (job, position), logit in scored:
                job.logits[position] = logit
                job.missing -= 1
                if not job.missing:
                    complete.append(job)
        for (job, position), logit in scored:
            if not math.isfinite(logit):
                fail(job.future, not_finite(job, job.pairs[position], logit))
        for job in complete:
            logits = [each for each in job.logits if each is not None]
            # If a logit is not finite, the worker that scored it fails the job.
            if all(map(math.isfinite, logits)):
                finish(job.future, logits)

    def _fail_all(self, error: BaseException) -> None:
        with self._backlog.changed:
            # The next call must start another thread even while this one still runs.
            self.thread = None
            futures = self._backlog.take_all()
        _log.error(
            "A scoring thread ended with %d calls waiting; the next call starts another",
            len(futures),
            exc_info=error,
        )
        message = (
            f"The scoring thread ended: {type(error).__name__}: {error}. "
            "The next call starts a new one."
        )
        for future in futures:
            fail(future, WorkerDiedError(message), cause=error)


# The threads that run, which may outlive a dropped engine until they have freed its weights.
scoring_threads: "weakref.WeakSet[threading.Thread]" = weakref.WeakSet()
