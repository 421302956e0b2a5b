"""What a remote reranker does when servers, networks and processes fail, and many use it."""

import asyncio
import copy
import gc
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("httpx")

from bge_rerank_adapters import (
    ClosedError,
    Overloaded,
    RemoteError,
    RemoteReranker,
    RerankTimeoutError,
)
from bge_rerank_adapters.remote import retrying
from tests.logs import own_records
from tests.rerank_servers import (
    NOT_FOUND,
    Asked,
    FakeServer,
    Reply,
    answering,
    common,
    remote,
    running,
    until,
)

pytestmark = pytest.mark.timeout(180)

KEY = "sekret-ß-42"
TEXTS = ["0.25 a", "0.75 b", "0.5 c"]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with running(common) as made:
        yield made


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds between tries, which pass by the clock of the retries and by no other."""
    passed: list[float] = []

    async def sleep(seconds: float) -> None:
        passed.append(seconds)

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + sum(passed), time=time.time)
    monkeypatch.setattr(retrying, "time", clock)
    monkeypatch.setattr(retrying, "asyncio", SimpleNamespace(sleep=sleep))
    return passed


# Faults


@pytest.mark.parametrize("status", [429, 502, 503])
def test_a_busy_server_is_asked_again(status):
    with answering(Reply({}, status), Reply({}, status), common) as (reranker, server):
        assert reranker.rerank("q", TEXTS)[0].index == 1
        assert reranker.stats().retries == 2
    assert len(server.posts) == 3


@pytest.mark.parametrize(("status", "error"), [(429, Overloaded), (503, RemoteError)])
def test_a_server_that_stays_busy_is_given_up(status, error):
    busy = Reply({"message": "too much waits"}, status)
    with answering(busy, max_retries=1) as (reranker, server):
        with pytest.raises(error, match=r"Sent 2 times") as told:
            reranker.rerank("q", TEXTS)
        assert reranker.stats().failed_requests == 1
    assert server.url in str(told.value)
    assert "too much waits" in str(told.value)
    assert len(server.posts) == 2


def test_a_busy_server_is_asked_until_the_time_is_over(waits):
    with answering(Reply({}, 503), timeout_s=60.0) as (reranker, server):
        begin = time.monotonic()
        with pytest.raises(RemoteError, match=r"Sent \d+ times"):
            reranker.rerank("q", TEXTS)
        took = time.monotonic() - begin + sum(waits)
    # To the end, and not without pause.
    assert took > 59.5
    assert min(waits) >= 0.05
    assert len(server.posts) == len(waits) + 1 > 5


def test_one_warning_tells_that_a_server_is_waited_for(caplog):
    replies = [Reply({}, 503)] * 4 + [common]
    with answering(*replies) as (reranker, _):
        reranker.rerank("q", TEXTS)
    told = [each.message for each in own_records(caplog)]
    assert len(told) == 1
    assert "answered 503, 3 times in a row; sending again until timeout_s=60 is over" in told[0]


@pytest.mark.parametrize("wait", [0, 1])
def test_a_servers_wait_makes_waits_no_shorter(wait, waits):
    busy = Reply({}, 429, headers={"Retry-After": str(wait)})
    with (
        answering(busy, max_retries=5) as (reranker, server),
        pytest.raises(Overloaded, match="the server asks to wait"),
    ):
        reranker.rerank("q", TEXTS)
    assert len(server.posts) == 6
    own = [0.125, 0.25, 0.5, 1.0, 2.0]
    assert all(passed >= max(each, wait) for passed, each in zip(waits, own, strict=True))


async def test_cancelling_a_task_that_waits_to_send_again_is_immediate():
    with answering(Reply({}, 429, headers={"Retry-After": "20"})) as (reranker, server):
        task = asyncio.create_task(reranker.arerank("q", TEXTS))
        await asyncio.to_thread(until, lambda: reranker.stats().retries == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(until, lambda: reranker.stats().under_way == 0)
        # The wait did not go on to its end.
        assert len(server.posts) == 1


def test_the_server_says_how_long_to_wait(waits):
    wait = Reply({}, 429, headers={"Retry-After": "7"})
    with answering(wait, common) as (reranker, _):
        reranker.rerank("q", TEXTS)
    [passed] = waits
    assert 7.0 <= passed <= 7.7


@pytest.mark.parametrize(
    ("wait", "given"),
    [
        ("31", {"timeout_s": None}),
        ("Fri, 01 Jan 2100 00:00:00 GMT", {}),
        ("45", {"timeout_s": 40.0}),
    ],
)
def test_nobody_waits_longer_than_there_is_time(wait, given, waits):
    busy = Reply({}, 429, headers={"Retry-After": wait})
    with (
        answering(busy, **given) as (reranker, server),
        pytest.raises(Overloaded, match=r"Sent 1 times; the server asks to wait"),
    ):
        reranker.rerank("q", TEXTS)
    assert waits == []
    assert len(server.posts) == 1


@pytest.mark.parametrize("wait", ["soon", "-1", "", "1e3", "Fri, 99 Jan", "²"])
def test_a_retry_after_that_is_none_is_not_minded(wait):
    headers = {"Retry-After": wait.encode().decode("latin-1")}
    with answering(Reply({}, 429, headers=headers), common) as (reranker, _):
        assert len(reranker.rerank("q", TEXTS)) == 3


def test_a_server_that_is_not_there_is_asked_again_and_named():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with (
            RemoteReranker(url, max_retries=1) as reranker,
            pytest.raises(RemoteError, match=r"cannot be reached.*Sent 2 times") as told,
        ):
            reranker.rerank("q", TEXTS)
    assert url in str(told.value)


def test_an_error_of_the_connection_is_told_without_the_librarys_tracebacks():
    broken = Reply({"results": []}, breaks="before")
    with answering(broken) as (reranker, _), pytest.raises(RemoteError) as told:
        reranker.rerank("q", TEXTS)
    shown = "".join(traceback.format_exception(told.value))
    assert type(told.value.cause).__name__ in shown
    assert "httpcore" not in shown
    assert "retrying.py" not in shown
    copied = copy.copy(told.value)
    assert (str(copied), copied.status_code, copied.cause) == (str(told.value), None, None)


@pytest.mark.parametrize("moment", ["before", "within"])
def test_a_broken_connection_is_tried_three_times_more(moment):
    broken = Reply({"results": []}, breaks=moment)
    with answering(broken, broken, broken, common) as (reranker, server):
        assert reranker.rerank("q", TEXTS)[0].index == 1
        assert len(server.posts) == 4
    with answering(broken) as (reranker, server):
        with pytest.raises(RemoteError, match=r"broke the connection off.*Sent 4 times"):
            reranker.rerank("q", TEXTS)
        assert len(server.posts) == 4


@pytest.mark.parametrize("body", [b"Internal Server Error", b"", b"<html>", b"\xff"])
def test_a_500_of_a_proxy_is_sent_once_more(body):
    """Of Ray Serve's, say, whose replica died with the request."""
    died = Reply(status=500, raw=body)
    with answering(died, common) as (reranker, server):
        assert reranker.rerank("q", TEXTS)[0].index == 1
        assert len(server.posts) == 2
        assert reranker.stats().retries == 1
    with answering(died) as (reranker, server):
        with pytest.raises(
            RemoteError, match=r"500: this comes from a proxy.*Sent 2 times"
        ) as told:
            reranker.rerank("q", TEXTS)
        assert told.value.status_code == 500
        assert len(server.posts) == 2


def test_a_500_of_a_server_that_says_what_failed_is_not_sent_again():
    failed = Reply({"message": "the model failed"}, status=500)
    with answering(failed, common) as (reranker, server):
        with pytest.raises(RemoteError, match="the model failed"):
            reranker.rerank("q", TEXTS)
        assert len(server.posts) == 1


def test_no_retries_means_none():
    with (
        answering(Reply({}, 429), max_retries=0) as (reranker, server),
        pytest.raises(Overloaded, match="Sent 1 times"),
    ):
        reranker.rerank("q", TEXTS)
    assert len(server.posts) == 1


def test_a_slow_server_runs_out_of_time():
    slow = Reply({}, delay_s=30)
    with answering(slow, timeout_s=0.2) as (reranker, server):
        # Where the machine is slow, the time may be over before the request is there.
        while not server.posts:
            with pytest.raises(RerankTimeoutError, match=r"did not answer within timeout_s=0\.2"):
                reranker.rerank("q", TEXTS)
        with pytest.raises(RerankTimeoutError, match=r"did not answer within timeout_s=0\.2"):
            asyncio.run(reranker.arerank("q", TEXTS))
        assert server.gone.wait(60)


def test_a_calls_own_time_limit_holds_too():
    with answering(Reply({}, delay_s=30), api="jina") as (reranker, server):
        # Where the machine is slow, the time may be over before the request is there.
        while not server.posts:
            with pytest.raises(RerankTimeoutError, match=r"within timeout_s=0\.2"):
                reranker.rerank("q", TEXTS, timeout_s=0.2)
        assert server.gone.wait(60)
        with pytest.raises(RerankTimeoutError, match=r"within timeout_s=0\.2"):
            asyncio.run(reranker.arerank("q", TEXTS, timeout_s=0.2))
        until(lambda: reranker.stats().under_way == 0)


GOOD = [{"index": index, "relevance_score": 0.5} for index in range(3)]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"results": GOOD[:2]}, "2 results for 3 documents, without index 2"),
        ({"results": [*GOOD, GOOD[0]]}, "index 0 twice"),
        ({"results": [*GOOD[:2], GOOD[1]]}, "index 1 twice"),
        ({"results": [*GOOD[:2], GOOD[2] | {"index": 3}]}, "index 3 for a request of 3"),
        ({"results": [*GOOD[:2], GOOD[2] | {"index": -1}]}, "index -1"),
        ({"results": [*GOOD[:2], GOOD[2] | {"index": True}]}, "has no index"),
        ({"results": [*GOOD[:2], GOOD[2] | {"index": 2.0}]}, "has no index"),
        ({"results": [*GOOD[:2], GOOD[2] | {"relevance_score": 1.5}]}, r"outside \[0, 1\].*logit"),
        ({"results": [*GOOD[:2], GOOD[2] | {"relevance_score": -0.1}]}, r"outside \[0, 1\]"),
        ({"results": [*GOOD[:2], GOOD[2] | {"relevance_score": float("nan")}]}, "not finite"),
        ({"results": [*GOOD[:2], GOOD[2] | {"relevance_score": 10**400}]}, "not finite"),
        ({"results": [*GOOD[:2], GOOD[2] | {"relevance_score": None}]}, "no number"),
        ({"results": [*GOOD[:2], GOOD[2] | {"relevance_score": "0.5"}]}, "no number"),
        ({"results": [*GOOD[:2], GOOD[2] | {"relevance_score": True}]}, "no number"),
        ({"results": [*GOOD[:2], GOOD[2] | {"logit": 0.0}]}, "logits for only some documents"),
        ({"results": [*GOOD[:2], GOOD[2] | {"logit": float("inf")}]}, "not finite"),
        ({"results": [*GOOD[:2], 7]}, "not an object"),
        ({"results": {"0": 0.5}}, "without a list of results"),
        ({"error": "model is loading"}, "without a list of results.*model is loading"),
        ([], "0 results for 3 documents"),
        ("done", "without a list of results"),
        (None, "without a list of results"),
    ],
)
def test_a_wrong_answer_is_an_error_that_says_what_was_wrong(content, told):
    with (
        answering(Reply(content)) as (reranker, server),
        pytest.raises(RemoteError, match=told) as error,
    ):
        reranker.rerank("q", ["a", "b", "c"])
    assert f"{server.url}/v1/rerank answered" in str(error.value)
    assert len(str(error.value)) < 600


def test_what_float32_rounds_beyond_1_is_1():
    with answering(Reply([{"index": 0, "score": 1.0000001}])) as (reranker, _):
        assert reranker.score("q", ["a"]) == [1.0]


@pytest.mark.parametrize(
    "body",
    [b"<html>Welcome to nginx!</html>" * 500, b"", b"\xff\xfe", b"[" * 100_000, b"1" * 5000],
)
def test_a_page_is_no_answer(body):
    with (
        answering(Reply(raw=body)) as (reranker, _),
        pytest.raises(RemoteError, match="answered with") as error,
    ):
        reranker.rerank("q", TEXTS)
    assert len(str(error.value)) < 600


def test_a_huge_answer_is_not_read_to_its_end():
    with (
        answering(Reply(raw=b"x" * (8 << 20))) as (reranker, _),
        pytest.raises(RemoteError, match="answered with more than"),
    ):
        reranker.rerank("q", TEXTS)


def test_documents_that_are_sent_back_are_no_huge_answer():
    def answer(asked: Asked) -> Reply:
        rows = common(asked).content["results"]
        texts = asked.body["documents"]
        # As vLLM does, and with escapes.
        return Reply({"results": [r | {"document": {"text": texts[r["index"]]}} for r in rows]})

    with answering(answer) as (reranker, _):
        assert len(reranker.rerank("q", [f"0.5 {'北' * 300_000}"])) == 1


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (400, "check api='auto' and model=None"),
        (401, "api_key is needed"),
        (403, "api_key is needed"),
        (404, "try the address without a path"),
        (405, "no such route"),
        (413, "a single document is too large for it"),
        (422, "check api='auto' and model=None"),
        (424, "answered 424"),
        (500, "answered 500"),
        (504, "answered 504"),
    ],
)
def test_a_refusal_says_what_to_do_and_what_the_server_said(status, told):
    for content in (
        {"message": "the reason"},
        {"error": "the reason", "error_type": "Validation"},
        {"error": {"message": "the reason", "type": "NotFoundError"}},
        {"detail": [{"msg": "the reason", "loc": ["body"]}]},
        {"detail": "the reason " * 10_000},
        ["the reason"],
    ):
        with (
            answering(Reply(content, status)) as (reranker, server),
            pytest.raises(RemoteError, match=told) as error,
        ):
            reranker.rerank("q", ["0.5"])
        assert "the reason" in str(error.value)
        assert f"{server.url}/v1/rerank" in str(error.value)
        assert len(str(error.value)) < 700
        assert error.value.status_code == status
        assert len(server.posts) == 1


def test_a_refused_key_is_named_and_not_shown():
    refused = Reply({"message": f"Wrong key: {KEY}"}, 401)
    with (
        answering(refused, api_key=KEY) as (reranker, _),
        pytest.raises(RemoteError, match=r"the api_key is not accepted.*Wrong key: \*\*\*"),
    ):
        reranker.rerank("q", TEXTS)


def test_a_key_that_info_needs_is_named():
    with (
        running(lambda _: Reply({"detail": "Unauthorized"}, 401)) as server,
        RemoteReranker(server.url) as reranker,
        pytest.raises(RemoteError, match="api_key is needed"),
    ):
        reranker.rerank("q", TEXTS)


def test_a_redirect_is_not_followed(server):
    away = Reply({}, 307, headers={"Location": f"{server.url}/v1/rerank"})
    with (
        answering(away, api_key=KEY) as (reranker, _),
        pytest.raises(RemoteError, match=rf"redirect to {server.url}.*not followed"),
    ):
        reranker.rerank("q", TEXTS)
    assert server.asked == []


def test_the_last_of_several_routes_is_named():
    routes = "/rerank or .*/v1/rerank or .*/v2/rerank"
    with (
        running(lambda _: NOT_FOUND) as server,
        RemoteReranker(server.url) as reranker,
        pytest.raises(RemoteError, match=f"{routes} answered 404"),
    ):
        reranker.rerank("q", TEXTS)


def test_after_an_error_the_next_call_works():
    with answering(Reply({}, 500), Reply("nonsense"), common) as (reranker, _):
        for _ in range(2):
            with pytest.raises(RemoteError):
                reranker.rerank("q", TEXTS)
        assert reranker.rerank("q", TEXTS)[0].index == 1


# Threads, event loops, processes


async def test_cancelling_a_task_cancels_its_request():
    with answering(Reply({}, delay_s=30), common) as (reranker, server):
        task = asyncio.create_task(reranker.arerank("q", TEXTS))
        await asyncio.to_thread(until, lambda: len(server.posts) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.gone.wait, 60)
        await asyncio.to_thread(until, lambda: reranker.stats().under_way == 0)


async def test_a_failed_call_takes_its_other_requests_with_it():
    all_there = threading.Barrier(len(TEXTS))

    def answer(asked: Asked) -> Reply:
        all_there.wait(60)
        first = TEXTS[0] in asked.body["documents"]
        return Reply({}, 500) if first else Reply({}, delay_s=60)

    with answering(answer, max_documents_per_request=1) as (reranker, server):
        with pytest.raises(RemoteError, match="500"):
            await reranker.arerank("q", TEXTS)
        assert await asyncio.to_thread(server.gone.wait, 50)
        await asyncio.to_thread(until, lambda: reranker.stats().under_way == 0)


async def test_the_event_loop_goes_on_while_a_server_thinks():
    went_on = threading.Event()

    def thinking(asked: Asked) -> Reply:
        assert went_on.wait(60)
        return common(asked)

    with answering(thinking) as (reranker, server):
        call = asyncio.create_task(reranker.arerank("q", TEXTS))
        async with asyncio.timeout(60):
            while not server.posts:  # noqa: ASYNC110 - the server's thread knows of no event
                await asyncio.sleep(0.005)
        went_on.set()
        assert len(await call) == 3


def test_several_event_loops_and_threads_share_it(server):
    def in_a_loop(number: int) -> list[float]:
        async def ask() -> list[float]:
            found = await asyncio.gather(
                *(reranker.arerank("q", [f"0.{number}{each}"]) for each in range(1, 6))
            )
            return [ranking[0].score for ranking in found]

        return asyncio.run(ask())

    def in_a_thread(number: int) -> list[float]:
        return [reranker.rerank("q", [f"0.{number}{each}"])[0].score for each in range(1, 6)]

    with remote(server) as reranker, ThreadPoolExecutor(8) as pool:
        loops = [pool.submit(in_a_loop, number) for number in range(1, 5)]
        threads = [pool.submit(in_a_thread, number) for number in range(5, 9)]
        for number, future in enumerate(loops + threads, start=1):
            assert future.result(60) == [float(f"0.{number}{each}") for each in range(1, 6)]


def test_connections_are_kept(server):
    with remote(server) as reranker:
        for _ in range(5):
            reranker.rerank("q", TEXTS)
    # One thread of the server serves one connection; http.server notes its port.
    assert len(server.ports) == 1


async def test_closing_fails_who_waits():
    with answering(Reply({}, delay_s=30)) as (reranker, server):
        tasks = [asyncio.create_task(reranker.arerank("q", TEXTS)) for _ in range(2)]
        failed = asyncio.create_task(asyncio.to_thread(reranker.rerank, "q", TEXTS))
        await asyncio.to_thread(until, lambda: len(server.posts) == 3)
        assert not reranker.closed
        await asyncio.to_thread(reranker.close)
        for task in [*tasks, failed]:
            with pytest.raises(ClosedError, match="has been closed"):
                await task
        assert reranker.closed
        reranker.close()
        with pytest.raises(ClosedError):
            await reranker.arerank("q", TEXTS)
        for call in (reranker.rerank, reranker.score):
            with pytest.raises(ClosedError):
                call("q", [])
        assert "closed" in repr(reranker)
        assert reranker.stats().failed_requests == 3


def test_a_dropped_reranker_ends_its_threads(server):
    def threads() -> set[threading.Thread]:
        return {each for each in threading.enumerate() if "bge-rerank" in each.name}

    before = threads()
    reranker = remote(server)
    reranker.rerank("q", TEXTS)
    asyncio.run(reranker.arerank("q", TEXTS))
    assert threads() - before
    gone = weakref.ref(reranker)
    del reranker
    gc.collect()
    assert gone() is None
    until(lambda: not threads() - before)


def run_script(code: str, server: FakeServer) -> None:
    """Run code that has a reranker of its own, and expect a clean end with "done"."""
    # Python's development mode tells of slow steps of the loop, which depend on the machine.
    begin = f"""
import asyncio, logging, os, threading
logging.getLogger("asyncio").addFilter(lambda told: " took " not in told.getMessage())
from bge_rerank_adapters import RemoteReranker
TEXTS = {TEXTS!r}
reranker = RemoteReranker({server.url!r} + "/v1", max_retries=0)
"""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", begin + code],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_program_ends_cleanly_with_requests_under_way():
    with running(lambda _: Reply({}, delay_s=30)) as server:
        run_script(
            """
threading.Thread(target=reranker.rerank, args=("q", TEXTS), daemon=True).start()
async def leave():
    task = asyncio.create_task(reranker.arerank("q", TEXTS))
    while reranker.stats().under_way < 2:
        await asyncio.sleep(0.01)
asyncio.run(leave())
print("done")
""",
            server,
        )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_connections_of_its_own(server):
    run_script(
        """
reranker.rerank("q", TEXTS)
asyncio.run(reranker.arerank("q", TEXTS))
child = os.fork()
if child == 0:
    ranking = reranker.rerank("q", TEXTS)
    assert asyncio.run(reranker.arerank("q", TEXTS)) == ranking
    assert reranker.stats().requests == 2
    reranker.close()
    os._exit(0 if len(ranking) == 3 else 1)
assert os.waitpid(child, 0)[1] == 0
assert len(reranker.rerank("q", TEXTS)) == 3
assert reranker.stats().requests == 3
reranker.close()
child = os.fork()
if child == 0:
    os._exit(0 if reranker.closed else 1)
assert os.waitpid(child, 0)[1] == 0
print("done")
""",
        server,
    )
    # A third one where the child took so long that the parent's was no longer kept.
    assert len(server.ports) in (2, 3)
