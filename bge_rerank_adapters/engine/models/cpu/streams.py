"""A processor's threads apart: each takes pairs of its own instead of a share of every product.

Threads that share products meet after each of them, several hundred times a pack. Where products
are short, as in half precision on a processor with matrix units, waking and waiting takes as long
as they do, and longer once another part of the program computes with torch as well.
"""

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from queue import SimpleQueue
from typing import NamedTuple, Protocol, TypeVar

import torch

from bge_rerank_adapters.engine.text.tokenizer import TokenPair

# Python runs one stream's lines at a time, which take a fifteenth of what its products take; so
# where there are more threads, a stream has several.
_MOST_STREAMS = 8
# With this package's own kernels they take a sixtieth at most, and no kernel has several threads.
_MOST_STREAMS_OWN_KERNELS = 64
# Tokens of a pack for each stream where the user leaves it open: shares of 512 to 2,048 tokens are
# about as fast as each other.
_STREAM_TOKENS = 1024
# Threads that share products are as fast as so many of their number to this power: 1.7 for two,
# 4.8 for eight. Measured for two: 1.0 to 1.4 in bfloat16 with AMX, 1.7 to 1.9 in float32.
_SHARED_SPEED = 0.75

T = TypeVar("T")
# What a stream is given to do; `None` ends it.
_Tasks = SimpleQueue[Callable[[], None] | None]


class _Model(Protocol):
    device: torch.device
    dtype: torch.dtype
    pack_tokens: int

    def logits(self, pairs: Sequence[TokenPair]) -> list[float]: ...


def stream_count(device: torch.device, dtype: torch.dtype, *, own_kernels: bool = False) -> int:
    """Return how many streams suit a model here; 1 leaves threads together.

    In float32 products are long enough that threads lose nothing by sharing them.

    Args:
        device: Where the model runs.
        dtype: Of its layers.
        own_kernels: Whether these are of this package's own kernels.
    """
    if device.type != "cpu" or dtype == torch.float32:
        return 1
    threads = torch.get_num_threads()
    if own_kernels:
        return min(threads, _MOST_STREAMS_OWN_KERNELS)
    own = -(-threads // _MOST_STREAMS)
    return threads // own


class StreamedModel:
    """A model whose packs are shared out by the pair among streams.

    What does not share out well, a long pair alone for one, is run by all threads together.

    Attributes:
        device: As of the model.
        dtype: As of the model.
        streams: How many there are.
        pack_tokens: Token budget of a pack that gives each stream enough to do.
    """

    def __init__(self, model: _Model, streams: int) -> None:
        """Share the threads that torch would compute with here among the streams.

        Args:
            model: Can be used by several threads at once.
            streams: 2 to the number of threads.
        """
        self.device, self.dtype, self.streams = model.device, model.dtype, streams
        self.pack_tokens = max(model.pack_tokens, streams * _STREAM_TOKENS)
        self._model = model
        threads = torch.get_num_threads()
        own = threads // streams
        # How many times as fast as a stream all threads are together.
        self._together = (threads / own) ** _SHARED_SPEED
        self._tasks: _Tasks = SimpleQueue()
        weakref.finalize(self, _end, self._tasks, streams).atexit = False
        _start(streams, own, self._tasks)

    def logits(self, pairs: Sequence[TokenPair]) -> list[float]:
        """Return the logit of each pair of a pack; the same for the same pack each time."""
        parts = _share_out([len(pair) for pair in pairs], self.streams)
        longest = max(sum(len(pairs[place]) for place in part) for part in parts)
        if longest > sum(map(len, pairs)) / self._together:
            with _together(_Crew(self._tasks, self.streams)):
                return self._model.logits(pairs)
        futures = [self._score([pairs[place] for place in part]) for part in parts]
        # All of them, so that none holds memory any longer when one has failed for want of it.
        wait(futures)
        logits = [0.0] * len(pairs)
        for part, future in zip(parts, futures, strict=True):
            for place, logit in zip(part, future.result(), strict=True):
                logits[place] = logit
        return logits

    def _score(self, pairs: Sequence[TokenPair]) -> Future[list[float]]:
        future, model = Future[list[float]](), self._model
        self._tasks.put(lambda: _fulfil(future, lambda: model.logits(pairs)))
        return future


class _Crew(NamedTuple):
    """Streams that help a thread with what it runs; `size` counts the thread as one of them."""

    tasks: _Tasks
    size: int


_own = threading.local()


@contextmanager
def _together(crew: _Crew) -> Iterator[None]:
    _own.crew = crew
    try:
        yield
    finally:
        del _own.crew


def in_parts(count: int, least: int, work: Callable[[int, int], None]) -> None:
    """Do something to items that lie side by side, all threads together where a model runs so.

    Args:
        count: How many items there are.
        least: How many a part has at least, unless it is the only one.
        work: Is called with begin and end of each part, by one thread or another, and makes no
            use of torch's threads. Its errors are raised here, once all parts are done.
    """
    if count == 0:
        return
    crew: _Crew | None = getattr(_own, "crew", None)
    parts = 1 if crew is None else max(1, min(crew.size, count // least))
    if crew is None or parts == 1:
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
            _fulfil(*part)

    try:
        for _ in range(parts - 1):
            crew.tasks.put(help_out)
    finally:
        # A stream that comes later finds nothing left to do.
        help_out()
        wait(futures)
    for future in futures:
        future.result()


def in_one_thread(work: Callable[[], T]) -> T:
    """Return what `work` returns, done as a stream of one thread would do it."""
    future, tasks = Future[T](), _Tasks()
    tasks.put(lambda: _fulfil(future, work))
    _end(tasks, 1)
    _start(1, 1, tasks)
    return future.result()


def settle_threads() -> None:
    """Let this thread compute with as many threads as torch's others.

    A thread gets their number when it first uses torch, which must not be while streams start.
    """
    with _starting:
        torch.get_num_threads()


_starting = threading.Lock()


def _forget_starting() -> None:
    # Whoever may have held it is not in a forked process.
    global _starting
    _starting = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_starting)


def _start(streams: int, own: int, tasks: _Tasks) -> None:
    """Start streams, in which torch computes with so many threads each, and in others as before.

    torch.set_num_threads speaks for its own thread, and for all that use torch for the first time
    later; so the caller's number, which others have as well, is set again in the end.
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
            for _ in range(streams):
                # As daemons, they serve the program's threads to the end. They are idle by then:
                # who has given them something to do waits for it.
                threading.Thread(target=run, name="bge-rerank-stream", daemon=True).start()
                started += 1
        finally:
            for _ in range(started):
                limited.acquire()
            torch.set_num_threads(default)


def _work(tasks: _Tasks) -> None:
    while (task := tasks.get()) is not None:
        task()
        # It holds the model, which may be dropped while this thread waits for the next.
        del task


def _end(tasks: _Tasks, streams: int) -> None:
    for _ in range(streams):
        tasks.put(None)


def _fulfil(future: Future[T], work: Callable[[], T]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # noqa: BLE001 - raised to who waits
        future.set_exception(error)


def _share_out(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Return the places of each part: the longest first, each to the part with the least so far."""
    shares: list[list[int]] = [[] for _ in range(min(parts, len(lengths)))]
    tokens = [0] * len(shares)
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        least = tokens.index(min(tokens))
        shares[least].append(place)
        tokens[least] += lengths[place]
    return shares
