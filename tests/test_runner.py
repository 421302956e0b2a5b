"""How a call is run from a thread and from an event loop, whatever it waits for."""

import asyncio
import math
import threading
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from bge_rerank_adapters import ClosedError, RerankError, RerankTimeoutError, SettingsError
from bge_rerank_adapters.calls.runner import AsyncRunner, Call, map_in_turns, run

WAIT_S = 60


@pytest.fixture
def runner() -> Iterator[AsyncRunner]:
    made = AsyncRunner()
    yield made
    made.close()


def waiting_for(future: Future[list[float]], seen: list[str]) -> Call[list[float] | None]:
    """Return a call that notes where each of its parts ran and that it was closed."""
    try:
        seen.append(threading.current_thread().name)
        yield None
        seen.append(threading.current_thread().name)
        result = yield future
        seen.append(threading.current_thread().name)
        return result
    finally:
        future.cancel()
        seen.append("closed")


async def test_only_the_first_part_runs_on_the_loop(runner):
    future, seen = Future(), []
    asyncio.get_running_loop().call_later(0.01, future.set_result, [1.0])
    assert await runner.run(lambda _: waiting_for(future, seen), timeout_s=None, long=False) == [
        1.0
    ]
    assert seen[0] == threading.current_thread().name
    assert all(name.startswith("bge-rerank-short") for name in seen[1:3])
    assert seen[3:] == ["closed"]


def test_all_parts_run_in_the_callers_thread():
    future, seen = Future(), []
    future.set_result([1.0])
    assert run(lambda _: waiting_for(future, seen)) == [1.0]
    assert seen == [threading.current_thread().name] * 3 + ["closed"]


async def test_long_calls_do_not_hold_up_short_ones(runner):
    gate = threading.Event()

    def long_call() -> Call[str]:
        yield None
        assert gate.wait(WAIT_S)
        return "long"

    def short_call() -> Call[str]:
        yield None
        return "short"

    long = [
        asyncio.create_task(runner.run(lambda _: long_call(), timeout_s=None, long=True))
        for _ in range(20)
    ]
    # One turn of the loop, in which each of them has been handed to a thread.
    await asyncio.sleep(0)
    assert await runner.run(lambda _: short_call(), timeout_s=WAIT_S, long=False) == "short"
    gate.set()
    assert await asyncio.gather(*long) == ["long"] * 20


async def test_a_call_that_was_cancelled_while_it_works_is_closed_after_that(runner):
    entered, gate, closed = threading.Event(), threading.Event(), threading.Event()

    def working() -> Call[None]:
        try:
            yield None
            entered.set()
            assert gate.wait(WAIT_S)
            yield Future()
        finally:
            closed.set()

    task = asyncio.create_task(runner.run(lambda _: working(), timeout_s=None, long=False))
    await asyncio.to_thread(entered.wait, WAIT_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not closed.is_set()
    gate.set()
    assert await asyncio.to_thread(closed.wait, WAIT_S)


def test_a_future_that_comes_too_late_is_a_timeout_and_cancelled():
    future = Future()
    with pytest.raises(RerankTimeoutError, match=r"timeout_s=0\.01"):
        run(lambda _: waiting_for(future, []), timeout_s=0.01)
    assert future.cancelled()


class LateFuture(Future):
    """A future whose result, or error, comes just as the time to wait for it runs out."""

    def __init__(self, outcome):
        super().__init__()
        self.outcome = outcome

    def result(self, timeout=None):
        if self.done():
            return super().result(timeout)
        if isinstance(self.outcome, Exception):
            self.set_exception(self.outcome)
        else:
            self.set_result(self.outcome)
        raise TimeoutError


def test_a_result_that_comes_as_the_time_runs_out_is_the_result():
    assert run(lambda _: waiting_for(LateFuture([1.0]), []), timeout_s=0.01) == [1.0]
    with pytest.raises(TimeoutError, match="the future's own"):
        run(lambda _: waiting_for(LateFuture(TimeoutError("the future's own")), []), timeout_s=1)


async def test_the_same_on_an_event_loop(runner):
    future = Future()
    with pytest.raises(RerankTimeoutError, match=r"timeout_s=0\.01"):
        await runner.run(lambda _: waiting_for(future, []), timeout_s=0.01, long=False)
    assert future.cancelled()


async def test_a_timeout_error_of_the_callers_own_stays_what_it_is(runner):
    """Of an iterator of requests, for instance, that reads from a network."""

    def failing() -> Call[None]:
        yield None
        raise TimeoutError("the caller's own")

    for timeout_s in (None, WAIT_S):
        with pytest.raises(TimeoutError, match="the caller's own") as info:
            run(lambda _: failing(), timeout_s=timeout_s)
        assert type(info.value) is TimeoutError
        with pytest.raises(TimeoutError, match="the caller's own") as info:
            await runner.run(lambda _: failing(), timeout_s=timeout_s, long=False)
        assert type(info.value) is TimeoutError


@pytest.mark.parametrize("timeout_s", [math.inf, 1e300, 10**400])
async def test_an_endless_time_limit_is_one(runner, timeout_s):
    future = Future()
    asyncio.get_running_loop().call_later(0.01, future.set_result, [1.0])
    assert await runner.run(lambda _: waiting_for(future, []), timeout_s=timeout_s, long=False) == [
        1.0
    ]
    assert run(lambda _: waiting_for(future, []), timeout_s=timeout_s) == [1.0]


@pytest.mark.parametrize("timeout_s", [0, -1, math.nan, "2", True])
async def test_a_time_limit_that_is_none_is_refused_before_anything_runs(runner, timeout_s):
    seen = []
    with pytest.raises(SettingsError):
        run(lambda _: waiting_for(Future(), seen), timeout_s=timeout_s)
    with pytest.raises(SettingsError):
        await runner.run(lambda _: waiting_for(Future(), seen), timeout_s=timeout_s, long=False)
    assert seen == []


async def test_a_closed_runner_says_so(runner):
    runner.close()
    with pytest.raises(ClosedError, match="closed"):
        await runner.run(lambda _: waiting_for(Future(), []), timeout_s=None, long=False)


def test_another_kind_of_event_loop_is_refused_by_name(runner):
    """Trio's, for instance, in which there is no asyncio loop to be found either."""
    seen = []
    calls = [
        runner.run(lambda _: waiting_for(Future(), seen), timeout_s=1, long=False),
        map_in_turns(str, [1, 2, 3]),
    ]
    for call in calls:
        with pytest.raises(RerankError, match=r"run on asyncio.*a thread"):
            call.send(None)
    assert seen == []


async def test_mapping_in_turns_gives_all_values_in_order_and_others_their_turns():
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    assert await map_in_turns(lambda n: n * n, range(100)) == [n * n for n in range(100)]
    assert turns > 10
    task.cancel()
    assert await map_in_turns(str, []) == []
