"""Threads in which torch uses a limited number of threads, and work that they share."""

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from itertools import pairwise
from queue import SimpleQueue
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")
# Queue of a thread's tasks; `None` ends the thread.
Tasks = SimpleQueue[Callable[[], None] | None]


class Helpers(NamedTuple):
    """Threads that help one thread with its work.

    Attributes:
        tasks: The queue that they take work from.
        size: Their number, including the thread that they help; 1 is that thread alone.
    """

    tasks: Tasks
    size: int

    def split(self, count: int, least: int, work: Callable[[int, int], None]) -> None:
        """Process a range of items in contiguous parts, in several threads at once.

        Args:
            count: Number of items.
            least: Minimum number of items in a part, unless there is only one part.
            work: Called with begin and end of each part, in any of the threads; must not use
                torch's threads. Its errors are raised here, once all parts are done.
        """
        parts = max(1, min(self.size, count // least))
        if parts == 1:
            if count:
                work(0, count)
            return
        bounds = [count * part // parts for part in range(parts + 1)]
        todo = deque((Future[None](), partial(work, *part)) for part in pairwise(bounds))
        futures = [future for future, _ in todo]

        def help_out() -> None:
            while todo:
                try:
                    part = todo.popleft()
                except IndexError:
                    return
                fulfil(*part)

        try:
            for _ in range(parts - 1):
                self.tasks.put(help_out)
        finally:
            # A helper that starts later finds nothing left to do.
            help_out()
            wait(futures)
        for future in futures:
            future.result()


ALONE = Helpers(Tasks(), 1)
"""No helpers: the thread does all of its work itself."""


def in_one_thread(work: Callable[[], T]) -> T:
    """Return the result of `work`, run in a new thread in which torch uses one thread."""
    future, tasks = Future[T](), Tasks()
    tasks.put(lambda: fulfil(future, work))
    end_threads(tasks, 1)
    start_threads(1, 1, tasks)
    return future.result()


def settle_threads() -> None:
    """Set this thread's number of torch threads to the default.

    Torch does so when a thread first uses it. That must not be while streams start, which change
    the default for a moment.
    """
    with _starting:
        torch.get_num_threads()


def use_at_most(threads: int) -> None:
    """Limit torch to this many threads, here and in threads that start later."""
    with _starting:
        if threads < torch.get_num_threads():
            torch.set_num_threads(threads)


_starting = threading.Lock()


def _forget_starting() -> None:
    # In a forked process the thread that may have held the lock does not exist.
    global _starting
    _starting = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_starting)


def start_threads(count: int, own: int, tasks: Tasks) -> None:
    """Start threads that process tasks, each with `own` torch threads.

    torch.set_num_threads sets the number for the calling thread, and for all threads that first use
    torch later. So the caller's number is set again at the end.
    """
    with _starting:
        default = torch.get_num_threads()
        limited = threading.Semaphore(0)

        def run() -> None:
            # A thread's first use of torch sets its number to the default, so it comes first.
            torch.get_num_threads()
            torch.set_num_threads(own)
            limited.release()
            _work(tasks)

        started = 0
        try:
            for _ in range(count):
                # Daemons, so that they do not keep the program alive. They are idle when it ends,
                # since a thread that gives them work waits for it.
                threading.Thread(target=run, name="bge-rerank-stream", daemon=True).start()
                started += 1
        finally:
            for _ in range(started):
                limited.acquire()
            torch.set_num_threads(default)


def _work(tasks: Tasks) -> None:
    while (task := tasks.get()) is not None:
        task()
        # It refers to the model, which may be dropped while this thread waits.
        del task


def end_threads(tasks: Tasks, count: int) -> None:
    """End threads after the tasks that are queued already."""
    for _ in range(count):
        tasks.put(None)


def fulfil(future: Future[T], work: Callable[[], T]) -> None:
    """Resolve a future to the result of some work, or to its error."""
    try:
        future.set_result(work())
    except BaseException as error:  # noqa: BLE001 - raised to the thread that waits
        future.set_exception(error)
