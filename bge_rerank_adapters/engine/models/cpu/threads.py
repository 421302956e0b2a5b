"""Threads with a limited number of torch threads each, and work that several of them share."""

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
# What a thread is given to do; `None` ends it.
Tasks = SimpleQueue[Callable[[], None] | None]


class Helpers(NamedTuple):
    """Threads that help one thread with its work.

    Attributes:
        tasks: Where they take their work from.
        size: Their number, the thread that they help included; 1 is that thread alone.
    """

    tasks: Tasks
    size: int

    def split(self, count: int, least: int, work: Callable[[int, int], None]) -> None:
        """Process a range of items in contiguous parts, which several threads do at once.

        Args:
            count: How many items there are.
            least: How many a part has at least, unless it is the only one.
            work: Is called with begin and end of each part, by any of the threads, and makes no use
                of torch's threads. Its errors are raised here, once all parts are done.
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
            # A helper that comes later finds nothing left to do.
            help_out()
            wait(futures)
        for future in futures:
            future.result()


ALONE = Helpers(Tasks(), 1)
"""No helpers: a thread does all of its work itself."""


def in_one_thread(work: Callable[[], T]) -> T:
    """Return what `work` returns, done in a new thread in which torch uses one thread."""
    future, tasks = Future[T](), Tasks()
    tasks.put(lambda: fulfil(future, work))
    end_threads(tasks, 1)
    start_threads(1, 1, tasks)
    return future.result()


def settle_threads() -> None:
    """Let this thread compute with as many threads as torch's others.

    A thread gets their number when it first uses torch, which must not be while streams start.
    """
    with _starting:
        torch.get_num_threads()


def use_at_most(threads: int) -> None:
    """Let torch compute with so many threads at most, here and in threads that start later."""
    with _starting:
        if threads < torch.get_num_threads():
            torch.set_num_threads(threads)


_starting = threading.Lock()


def _forget_starting() -> None:
    # The thread that may have held it does not exist in a forked process.
    global _starting
    _starting = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_starting)


def start_threads(count: int, own: int, tasks: Tasks) -> None:
    """Start threads that work off tasks; torch computes with `own` threads in each of them.

    torch.set_num_threads sets the number of the calling thread, and of all threads that use torch
    for the first time later; so the caller's number, which others have as well, is set again in the
    end.
    """
    with _starting:
        default = torch.get_num_threads()
        limited = threading.Semaphore(0)

        def run() -> None:
            # A thread's first use of torch sets its number to that of others, so it comes first.
            torch.get_num_threads()
            torch.set_num_threads(own)
            limited.release()
            _work(tasks)

        started = 0
        try:
            for _ in range(count):
                # As daemons, they serve the program's threads to the end. They are idle by then:
                # a thread that has given them something to do waits for it.
                threading.Thread(target=run, name="bge-rerank-stream", daemon=True).start()
                started += 1
        finally:
            for _ in range(started):
                limited.acquire()
            torch.set_num_threads(default)


def _work(tasks: Tasks) -> None:
    while (task := tasks.get()) is not None:
        task()
        # It holds the model, which may be dropped while this thread waits for the next.
        del task


def end_threads(tasks: Tasks, count: int) -> None:
    """Let threads end once they have done what they were given before."""
    for _ in range(count):
        tasks.put(None)


def fulfil(future: Future[T], work: Callable[[], T]) -> None:
    """Give a future the result of some work, or its error."""
    try:
        future.set_result(work())
    except BaseException as error:  # noqa: BLE001 - raised to the thread that waits
        future.set_exception(error)
