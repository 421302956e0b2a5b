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

# Longer than any pack should take.
_JOIN_TIMEOUT_S = 60.0

_log = logging.getLogger(__name__)


class ScoringCore:
    """Scores jobs on one model per device; threads start with the first job.

    A reserved future always resolves: to the logits, to an error of the call's own packs, or to
    `ClosedError` or `WorkerDiedError`. No call waits for a thread that has ended.

    Attributes:
        workers: One for each device; empty once the core is closed.
        tally: Counts their work.
    """

    def __init__(
        self, models: Sequence[Model], *, max_queued_pairs: int, pack_tokens: int | None = None
    ) -> None:
        """Take over the models.

        Args:
            models: One for each device.
            max_queued_pairs: Maximum number of pairs that may wait.
            pack_tokens: Token budget of a pack; `None` is each model's own.
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
        """Whether the core was stopped, or belongs to the parent process."""
        return self._backlog.closed or self._backlog.made_before_fork

    def check_open(self) -> None:
        """Raise the errors of `Backlog.check_open`."""
        self._backlog.check_open()

    def reserve(self, future: Logits, pairs: int, *, bounded: bool = True) -> None:
        """Reserve room for the pairs of a call; see `Backlog.reserve`."""
        self._backlog.reserve(future, pairs, bounded=bounded)

    def submit(self, job: TokenJob) -> None:
        """Queue the pairs of a call that has a reservation, without waiting.

        Raises:
            ClosedError: The engine has been closed.
            ScoringError: No thread can be started.
        """
        # Under one lock, so that no thread can end in between and leave the job behind.
        with self._backlog.changed:
            self.check_open()
            for worker in self.workers:
                worker.start()
            self._backlog.put(job)

    def warm_up(self, pair: TokenPair) -> None:
        """Score the pair once in every stream of every device; raises what a call raises."""
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
        return self.tally.stats(queued_pairs=len(self._backlog))

    def stop(self) -> None:
        """Close without waiting: all calls fail with `ClosedError`, and threads end."""
        self._backlog.close()

    def close(self) -> None:
        """Stop, wait for the threads to end, and free the models; may be repeated."""
        self.stop()
        devices = [worker.model.device for worker in self.workers]
        threads = [worker.thread for worker in self.workers]
        self.workers.clear()
        if self._backlog.made_before_fork:
            return  # threads and devices are the parent's too
        for thread in threads:
            if thread is not None and thread is not threading.current_thread():
                thread.join(_JOIN_TIMEOUT_S)
                if thread.is_alive():
                    _log.warning(
                        "%s still runs a pack; its memory is freed afterwards", thread.name
                    )
        for device in devices:
            release_memory(device)

    def leave_to_parent(self) -> None:
        """In a forked process: drop the parent's calls, and locks that its threads may hold."""
        self._backlog.leave_to_parent()
        self.tally = Tally()


_live_cores: "weakref.WeakSet[ScoringCore]" = weakref.WeakSet()


@atexit.register
def _end_threads() -> None:
    # A daemon thread inside torch can crash the process while the interpreter shuts down.
    for core in list(_live_cores):
        try:
            core.close()
        except Exception:  # noqa: BLE001 - the other cores must be closed too
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
