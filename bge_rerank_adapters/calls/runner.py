"""Runs a call from a thread or from an event loop.

A call is written once, as a generator, and serves the synchronous and the asynchronous methods.
"""

import asyncio
import numbers
import os
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from typing import Any, TypeVar

from bge_rerank_adapters.errors import (
    ClosedError,
    RerankError,
    RerankTimeoutError,
    SettingsError,
)

S = TypeVar("S")
T = TypeVar("T")
# A call is a generator. It yields each future it waits for and is sent its result; it yields
# `None` before work that takes its time. It never blocks, and need not know what runs it.
Call = Generator["Future[Any] | None", Any, T]
Step = tuple[bool, Any]
F = TypeVar("F", bound="Future[Any]")

# Two threads tokenise as fast as the tokenizer, which has threads of its own, and more would only
# stand in the event loop's way.
_THREADS = 2
# Copying a document of a host may take a millisecond, where it has an embedding.
_ITEMS_PER_TURN = 8


def advance(call: Call[T], result: Any = None) -> Step:
    """Run a call up to where it next yields.

    Args:
        call: One that does not run at this moment.
        result: Of the future that it yielded last; `None` if there was none.

    Returns:
        `(False, what it yields)`, or `(True, what it returns)`.
    """
    try:
        return False, next(call) if result is None else call.send(result)
    except StopIteration as stop:
        return True, stop.value


class Reservations:
    """The futures that a call has others work for, to be given up even while the call runs.

    A generator cannot be closed from outside while a thread is in it, tokenising for a second,
    say; its pairs would keep others out of a full queue for as long.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._futures: set[Future[Any]] = set()
        self._given_up = False

    def hold(self, future: F) -> F:
        """Remember a future until it is done; cancel it if the call has been given up already.

        A call that keeps room in a queue holds the future first, so that an interrupt at any later
        moment gives the room back.

        Returns:
            The future.
        """
        with self._lock:
            self._futures.add(future)
            given_up = self._given_up
        # Added after it was noted, since one that is done already is forgotten within the call.
        future.add_done_callback(self._forget)
        if given_up:
            future.cancel()
        return future

    def give_up(self) -> None:
        """Cancel all that are not done, and whatever the call comes to hold from now on."""
        with self._lock:
            self._given_up = True
            futures = list(self._futures)
        for future in futures:
            future.cancel()

    def _forget(self, future: Future[Any]) -> None:
        with self._lock:
            self._futures.discard(future)


MakeCall = Callable[[Reservations], Call[T]]
"""Makes a call that holds its futures there; all that are not done when it ends are cancelled."""


def run(make_call: MakeCall[T], *, timeout_s: float | None = None) -> T:
    """Run a call in this thread.

    Raises:
        SettingsError: `timeout_s` is no number above 0.
        RerankTimeoutError: It ran out.
    """
    limit = _check_timeout(timeout_s)
    deadline = None if limit is None else time.monotonic() + limit
    reservations = Reservations()
    call = make_call(reservations)
    try:
        finished, value = advance(call)
        while not finished:
            result = None if value is None else _wait(value, deadline, timeout_s)
            finished, value = advance(call, result)
    finally:
        reservations.give_up()
        call.close()
    return value  # type: ignore[no-any-return]


class AsyncRunner:
    """Runs calls from event loops: the work of their steps in a few threads of its own.

    Short calls have threads that long ones do not get, so that they need not wait until ten
    thousand documents of somebody else's have been tokenised.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._short, self._long = (
            ThreadPoolExecutor(_THREADS, thread_name_prefix=f"bge-rerank-{name}")
            for name in ("short", "long")
        )

    async def run(self, make_call: MakeCall[T], *, timeout_s: float | None, long: bool) -> T:
        """Run a call without blocking the event loop, up to its first yield at once.

        When the task is cancelled or out of time, what the call holds is given up at once.

        Args:
            make_call: Makes the call.
            timeout_s: Seconds it may take; `None` is for ever.
            long: Whether its work may take its time.

        Raises:
            RerankError: The event loop is not asyncio's.
            SettingsError: `timeout_s` is no number above 0.
            RerankTimeoutError: It ran out.
            ClosedError: The runner was closed meanwhile.
        """
        _check_event_loop()
        pool = self._long if long else self._short
        timer = asyncio.timeout(_check_timeout(timeout_s))
        reservations = Reservations()
        call = make_call(reservations)
        try:
            async with timer:
                finished, value = advance(call)
                while not finished:
                    result = None if value is None else await asyncio.wrap_future(value)
                    finished, value = await _step(pool, call, result)
        except TimeoutError as error:
            if not timer.expired():
                raise  # not ours: of an iterator that the caller gave, say
            raise _timed_out(timeout_s) from error
        finally:
            reservations.give_up()
            _close_when_idle(call)
        return value  # type: ignore[no-any-return]

    def close(self) -> None:
        """Let the threads end with what they do; does not wait for them."""
        # In a forked process they are gone, and a lock of theirs may be held for ever.
        if self._pid == os.getpid():
            for pool in (self._short, self._long):
                pool.shutdown(wait=False)


async def _step(pool: ThreadPoolExecutor, call: Call[Any], result: Any) -> Step:
    """Run a call's next step in a thread."""
    try:
        step = pool.submit(advance, call, result)
    except RuntimeError as error:
        raise ClosedError(
            f"The engine was closed, or Python ends, before the call had been scored ({error})."
        ) from error
    try:
        return await asyncio.wrap_future(step)
    except asyncio.CancelledError:
        # The step may still run in its thread; the call is closed as soon as it is done.
        step.add_done_callback(lambda _: _close_when_idle(call))
        raise


async def map_in_turns(function: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """Return the function's values for the items, while the event loop's other tasks have turns.

    Raises:
        RerankError: The event loop is not asyncio's.
    """
    _check_event_loop()
    values: list[T] = []
    for start in range(0, len(items), _ITEMS_PER_TURN):
        values += map(function, items[start : start + _ITEMS_PER_TURN])
        await asyncio.sleep(0)
    return values


def _close_when_idle(call: Call[Any]) -> None:
    # A call that another thread runs at this moment raises ValueError, and is closed after that.
    with suppress(ValueError):
        call.close()


def _wait(future: Future[Any], deadline: float | None, timeout_s: float | None) -> Any:
    left = None if deadline is None else max(0.0, deadline - time.monotonic())
    try:
        return future.result(left)
    except FutureTimeoutError as error:
        if future.done():
            # It ended just as the time ran out, or with such an error of its own.
            return future.result()
        raise _timed_out(timeout_s) from error


def _check_event_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError as error:
        raise RerankError(
            "The asynchronous methods run on asyncio, and no asyncio event loop runs here. On "
            "another kind, such as trio's, call the synchronous method in a thread: "
            "await trio.to_thread.run_sync(reranker.rerank, query, documents)."
        ) from error


def _check_timeout(timeout_s: Any) -> float | None:
    if timeout_s is None:
        return None
    real = isinstance(timeout_s, numbers.Real) and not isinstance(timeout_s, bool)
    if not real or not timeout_s > 0:
        raise SettingsError(
            f"timeout_s must be a number of seconds above 0 or None, got {timeout_s!r}."
        )
    # Infinity, too, is a time to wait for.
    return float(min(timeout_s, threading.TIMEOUT_MAX))


def _timed_out(timeout_s: float | None) -> RerankTimeoutError:
    return RerankTimeoutError(
        f"The call was not done within timeout_s={timeout_s}; its waiting pairs were dropped. "
        "Send fewer documents or allow more time."
    )
