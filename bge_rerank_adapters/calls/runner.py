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

from bge_rerank_adapters.errors import ClosedError, RerankError, RerankTimeoutError, SettingsError

S = TypeVar("S")
T = TypeVar("T")
# A call is a generator that never blocks. It yields each future that it waits for, and is sent the
# result. Before slow work it yields `None`, so that an event loop can move the work to a thread.
Call = Generator["Future[Any] | None", Any, T]
Step = tuple[bool, Any]
F = TypeVar("F", bound="Future[Any]")

# The tokenizer has threads of its own: two here keep them busy, and more would only compete with
# the event loop for the interpreter.
_THREADS = 2
# Copying a host's document may take a millisecond if it holds an embedding.
_ITEMS_PER_TURN = 8


def advance(call: Call[T], result: Any = None) -> Step:
    """Run a call up to its next `yield`.

    Args:
        call: Must not be running.
        result: Result of the future that it yielded last; `None` if there was none.

    Returns:
        `(False, what it yields)`, or `(True, what it returns)`.
    """
    try:
        return False, next(call) if result is None else call.send(result)
    except StopIteration as stop:
        return True, stop.value


class Reservations:
    """The futures that a call waits for, which can be cancelled while the call runs.

    A generator cannot be closed while a thread runs it, for example tokenising for a second.
    Without this, a cancelled call would keep its room in the queue for that long.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._futures: set[Future[Any]] = set()
        self._cancelled = False

    def hold(self, future: F) -> F:
        """Remember a future until it is done; cancel it if `cancel` was called before.

        A call holds the future before it reserves room in a queue with it, so that an interrupt at
        any later moment gives the room back.

        Returns:
            The future.
        """
        with self._lock:
            self._futures.add(future)
            cancelled = self._cancelled
        # Added last, since the callback of a future that is done runs at once.
        future.add_done_callback(self._forget)
        if cancelled:
            future.cancel()
        return future

    def cancel(self) -> None:
        """Cancel all futures that are not done, and any that is held later."""
        with self._lock:
            self._cancelled = True
            futures = list(self._futures)
        for future in futures:
            future.cancel()

    def _forget(self, future: Future[Any]) -> None:
        with self._lock:
            self._futures.discard(future)


MakeCall = Callable[[Reservations], Call[T]]
"""Makes a call that holds its futures there; those not done when it ends are cancelled."""


def run(make_call: MakeCall[T], *, timeout_s: float | None = None) -> T:
    """Run a call in this thread.

    Raises:
        SettingsError: `timeout_s` is not a number above 0.
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
        reservations.cancel()
        call.close()
    return value  # type: ignore[no-any-return]


class AsyncRunner:
    """Runs calls from event loops; the steps of a call run in a few threads.

    Short calls have threads of their own, so that they never wait until a long call has tokenised
    ten thousand documents.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._short, self._long = (
            ThreadPoolExecutor(_THREADS, thread_name_prefix=f"bge-rerank-{name}")
            for name in ("short", "long")
        )

    async def run(self, make_call: MakeCall[T], *, timeout_s: float | None, long: bool) -> T:
        """Run a call without blocking the event loop.

        The part before its first `yield` runs in the event loop's thread. If the task is cancelled
        or runs out of time, the futures of the call are cancelled at once.

        Args:
            make_call: Makes the call.
            timeout_s: Seconds that the call may take; `None` is for ever.
            long: Whether its steps may take long.

        Raises:
            RerankError: The event loop is not asyncio's.
            SettingsError: `timeout_s` is not a number above 0.
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
                raise  # raised by something else, such as an iterator of the caller's
            raise _timed_out(timeout_s) from error
        finally:
            reservations.cancel()
            _close_when_idle(call)
        return value  # type: ignore[no-any-return]

    def close(self) -> None:
        """Let the threads finish their steps and end, without waiting for them."""
        # A forked process has none of the threads, and a lock of theirs may be held for ever.
        if self._pid == os.getpid():
            for pool in (self._short, self._long):
                pool.shutdown(wait=False)


async def _step(pool: ThreadPoolExecutor, call: Call[Any], result: Any) -> Step:
    """Run a call's next step in a thread."""
    try:
        step = pool.submit(advance, call, result)
    except RuntimeError as error:
        raise ClosedError(
            "The engine was closed, or Python is shutting down, before the call was scored "
            f"({error})."
        ) from error
    try:
        return await asyncio.wrap_future(step)
    except asyncio.CancelledError:
        # The step may still run in its thread; close the call once it is done.
        step.add_done_callback(lambda _: _close_when_idle(call))
        raise


async def map_in_turns(function: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """Return the function's value for each item, letting other tasks run in between.

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
    # ValueError: another thread runs the call, and closes it afterwards.
    with suppress(ValueError):
        call.close()


def _wait(future: Future[Any], deadline: float | None, timeout_s: float | None) -> Any:
    left = None if deadline is None else max(0.0, deadline - time.monotonic())
    try:
        return future.result(left)
    except FutureTimeoutError as error:
        if future.done():
            # It was done just as the time ran out, or failed with a TimeoutError.
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
    # Infinity is allowed.
    return float(min(timeout_s, threading.TIMEOUT_MAX))


def _timed_out(timeout_s: float | None) -> RerankTimeoutError:
    return RerankTimeoutError(
        f"The call was not done within timeout_s={timeout_s}; its waiting pairs were dropped. "
        "Send fewer documents or allow more time."
    )
