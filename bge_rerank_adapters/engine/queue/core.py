"""The workers of an engine, one for each device, and the backlog that feeds them."""

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Sequence

from bge_rerank_adapters.engine.models.base import Model
from bge_rerank_adapters.engine.models.device_faults import release_memory
from bge_rerank_adapters.engine.queue.backlog import Backlog, Logits, TokenJob
from bge_rerank_adapters.engine.queue.packs import Job
from bge_rerank_adapters.engine.queue.worker import DeviceWorker, scoring_threads
from bge_rerank_adapters.engine.stats import EngineStats, Tally
from bge_rerank_adapters.engine.text.pairs import TokenPair

# Longer than any pack takes that is worth waiting for.
_JOIN_TIMEOUT_S = 60.0

_log = logging.getLogger(__name__)


class ScoringCore:
    """Scores jobs on one model per device; threads start with the first job.

    A future that was reserved always resolves: with the logits, with what went wrong in the call's
    own packs, or with `ClosedError` or `WorkerDiedError`. No call waits for a thread that is gone.

    Attributes:
        workers: One for each device; none once the core is closed.
        tally: Counts what they do.
    """

    def __init__(
        self, models: Sequence[Model], *, max_queued_pairs: int, pack_tokens: int | None = None
    ) -> None:
        """Take over the models.

        Args:
            models: One for each device.
            max_queued_pairs: Most pairs that may wait.
            pack_tokens: Token budget of a pack; `None` is what suits each model on its device.
        """
        self._backlog = Backlog(max_queued_pairs=max_queued_pairs)
        self.tally = Tally()
        self.workers = [
            DeviceWorker(
                model,
                number=number,
                backlog=self._backlog,
                tally=self.tally,
                pack_tokens=pack_tokens,
            )
            for number, model in enumerate(models)
        ]
        _live_cores.add(self)

    @property
    def closed(self) -> bool:
        """Whether the core scores no more: it was stopped, or left to the parent by a fork."""
        return self._backlog.closed or self._backlog.is_of_parent

    def check_open(self) -> None:
        """Raise unless pairs can be scored; errors as of `Backlog.check_open`."""
        self._backlog.check_open()

    def reserve(self, future: Logits, pairs: int, *, bounded: bool = True) -> None:
        """Keep room for the pairs of a call; see `Backlog.reserve`."""
        self._backlog.reserve(future, pairs, bounded=bounded)

    def submit(self, job: TokenJob) -> None:
        """Queue the pairs of a call whose future has been reserved, and return at once.

        Raises:
            ClosedError: The engine has been closed.
            ScoringError: No thread can be started.
        """
        # Under one lock, so that no thread ends between the two without failing the job.
        with self._backlog.changed:
            self.check_open()
            for worker in self.workers:
                worker.start()
            self._backlog.put(job)

    def warm_up(self, pair: TokenPair) -> None:
        """Score the pair once in every stream of every device; errors as of a call."""
        jobs: list[TokenJob] = []
        try:
            with self._backlog.changed:
                self.check_open()
                for worker in self.workers:
                    job = Job([pair] * worker.model.streams)
                    jobs.append(job)
                    self.reserve(job.future, len(job.pairs), bounded=False)
                    worker.start()
                    worker.warm_up(job)
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
        devices = [worker.model.device for worker in self.workers]
        threads = [worker.thread for worker in self.workers]
        self.workers.clear()
        if self._backlog.is_of_parent:
            return  # and so are threads and devices
        for thread in threads:
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


_live_cores: "weakref.WeakSet[ScoringCore]" = weakref.WeakSet()


@atexit.register
def _end_threads() -> None:
    # A daemon thread inside torch while the interpreter goes away can crash the process.
    for core in list(_live_cores):
        try:
            core.close()
        except Exception:  # noqa: BLE001 - the others are to be closed all the same
            _log.exception("An engine could not be closed at the end of the program")
    for thread in list(scoring_threads):
        if thread.is_alive():
            thread.join(_JOIN_TIMEOUT_S)


def _leave_cores_to_parent() -> None:
    for core in list(_live_cores):
        core.leave_to_parent()
    scoring_threads.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_cores_to_parent)
