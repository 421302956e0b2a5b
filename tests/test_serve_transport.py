"""The server over real sockets, and clients that mean it harm or do not know better."""

import contextlib
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

pytest.importorskip("uvicorn")

from bge_rerank_adapters import Reranker
from bge_rerank_adapters.serve import ServerSettings, create_app
from bge_rerank_adapters.serve.transport.protocol import GuardedProtocol
from tests.test_serve import TINY, HeldModel, numbers
from tests.test_serve_http import BODY, CLOSE, WAIT_S, chunked, exchange, listening, post, until
from tests.texts import DOCUMENTS, QUERY

pytestmark = pytest.mark.timeout(400)

QUICK_S = 0.3
LOOPS = ["asyncio", *(["uvloop"] if __import__("importlib").util.find_spec("uvloop") else [])]


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the server's patience with a head and an answer be over soon.

    Only for tests in which a client that is itself slow changes nothing.
    """
    monkeypatch.setattr(GuardedProtocol, "head_timeout_s", QUICK_S)
    monkeypatch.setattr(GuardedProtocol, "answer_timeout_s", QUICK_S)


@pytest.fixture
def clean(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail where anything is logged as an error, or a traceback is."""
    with caplog.at_level(logging.INFO):
        yield
    bad = [each for each in caplog.records if each.levelno >= logging.ERROR or each.exc_info]
    assert not bad, bad


def app_of(engine: Reranker, **settings: Any) -> Any:
    return create_app(ServerSettings(engine=TINY, **settings), engine=engine)


@pytest.fixture(params=LOOPS)
def port(request, reranker: Reranker, clean) -> Iterator[int]:
    app = app_of(reranker, body_timeout_s=WAIT_S)
    with listening(app, loop=request.param, log_config=None) as opened:
        yield opened


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)


def rest(connection: socket.socket) -> bytes:
    """Return all that still comes."""
    parts = []
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def statuses(answer: bytes) -> list[int]:
    return [int(each) for each in re.findall(rb"HTTP/1\.1 (\d+)", answer)]


def is_well(port: int) -> bool:
    return httpx.get(f"http://127.0.0.1:{port}/health", timeout=WAIT_S).status_code == 200


# What is understood


def test_a_jdk_client_that_offers_http_2_is_answered_in_1_1(port, caplog):
    offer = (
        b"Connection: Upgrade, HTTP2-Settings",
        b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
        b"Upgrade: h2c",
    )
    with connect(port) as connection:
        for _ in range(2):
            connection.sendall(post(BODY, *offer))
            head = b""
            while b'"input_tokens"' not in head:
                head += connection.recv(65536)
            assert statuses(head) == [200]
        connection.sendall(post(chunked(BODY, 7), *offer[1:], CLOSE, b"Transfer-Encoding: chunked"))
        assert statuses(rest(connection)) == [200]
    assert "pgrade" not in caplog.text


def test_a_connection_that_is_kept_may_be_silent_between_requests(port, monkeypatch):
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_S) as client:
        for _ in range(2):
            assert client.post("/v2/rerank", content=BODY).status_code == 200
            monkeypatch.setattr(GuardedProtocol, "head_timeout_s", QUICK_S)
            time.sleep(3 * QUICK_S)
        [connection] = client._transport._pool.connections
        assert connection.is_idle(), "and not closed"


def test_requests_in_one_go_are_all_answered_and_counted(port):
    answer = exchange(port, post(BODY) * 7 + post(BODY, CLOSE))
    assert statuses(answer) == [200] * 8
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=WAIT_S).text
    seconds = 'bge_rerank_http_request_seconds_count{route="/v2/rerank",status="200"}'
    assert numbers(text)[seconds] == 8


# What is refused


@pytest.mark.parametrize("lengths", [(b"%d" % len(BODY),), (b"5",), (b"0",)])
def test_a_request_with_two_lengths_is_refused_once(port, lengths):
    inner = post(BODY, CLOSE)
    headers = (b"Transfer-Encoding: chunked", *(b"Content-Length: " + each for each in lengths))
    answer = exchange(port, post(chunked(BODY, 50) + inner, *headers))
    assert statuses(answer) == [400]
    assert b"Transfer-Encoding and Content-Length are both there." in answer


def test_a_chunk_that_is_none_is_refused_once(port):
    headers = (b"Transfer-Encoding: chunked",)
    with connect(port) as connection:
        connection.sendall(post(b"5\r\n{    \r\n", *headers))
        time.sleep(0.1)
        connection.sendall(b"nonsense\r\n\r\n")
        assert statuses(rest(connection)) == [400]
    assert is_well(port)


@pytest.mark.parametrize("ended", [False, True], ids=["endless", "whole"])
@pytest.mark.parametrize("line", [b"X-%d: " + b"a" * 8000 + b"\r\n", b"X-%d: a\r\n", b"a%d"])
def test_a_head_has_a_bound(port, line, ended):
    size = sent = 0
    with connect(port) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        while size < (60_000 if ended else 64_000_000):
            block = b"".join(line % (sent + each) for each in range(20))
            connection.sendall(block)
            size, sent = size + len(block), sent + 20
        connection.sendall(b": a\r\n\r\n" if b"\r" not in line else b"\r\n")
        assert statuses(rest(connection)) in ([431], [])
    # What the buffers of both systems take is sent before the refusal is seen.
    assert size < 20_000_000
    assert is_well(port)


def test_a_head_that_is_just_too_large_is_told_so(port):
    answer = exchange(port, post(BODY, CLOSE, b"X: " + b"a" * 40_000))
    assert statuses(answer) == [431]
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["detail"].endswith(".")
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=WAIT_S).text
    assert numbers(text)['bge_rerank_http_refused_heads_total{status="431"}'] == 1
    assert statuses(exchange(port, post(BODY, CLOSE, b"X: " + b"a" * 20_000))) == [200]


# What does not come


def drip(connection: socket.socket, start: bytes) -> None:
    """Send bytes, and then one at a time for ever."""
    connection.sendall(start)
    while True:
        connection.sendall(b"a")
        time.sleep(QUICK_S / 6)


HALF = b"POST /v2/rerank HTTP/1.1\r\nHost: x\r\nX-A: "


@pytest.mark.usefixtures("hurried")
def test_a_connection_without_a_request_is_closed(port):
    with connect(port) as connection:
        assert rest(connection) == b""


@pytest.mark.usefixtures("hurried")
def test_half_a_head_is_not_waited_for(port):
    answer = b""
    # Where this thread is slow, the connection may be closed before anything has been sent.
    while not answer:
        with connect(port) as connection, contextlib.suppress(ConnectionError):
            connection.sendall(HALF)
            answer = rest(connection)
    assert statuses(answer) == [408]


@pytest.mark.usefixtures("hurried")
def test_half_a_head_that_grows_is_not_waited_for(port):
    with connect(port) as connection, pytest.raises(ConnectionError):
        drip(connection, HALF)


def test_half_a_head_after_a_request_is_not_waited_for(port, monkeypatch):
    with connect(port) as connection:
        connection.sendall(post(BODY))
        assert connection.recv(65536)
        monkeypatch.setattr(GuardedProtocol, "head_timeout_s", QUICK_S)
        time.sleep(2 * QUICK_S)
        connection.sendall(b"GET /health HT")
        assert statuses(rest(connection)) == [408]


@pytest.mark.usefixtures("hurried")
def test_a_body_that_nobody_reads_is_not_waited_for(port):
    headers = b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    with connect(port) as connection, pytest.raises(ConnectionError):
        drip(connection, headers)


def test_an_answer_that_is_not_taken_is_given_up(reranker, clean, monkeypatch):
    lost, lose = threading.Event(), GuardedProtocol.connection_lost

    def connection_lost(self: GuardedProtocol, exc: Exception | None) -> None:
        lose(self, exc)
        lost.set()

    monkeypatch.setattr(GuardedProtocol, "connection_lost", connection_lost)
    monkeypatch.setattr(GuardedProtocol, "answer_timeout_s", QUICK_S)
    document = {"text": "a", "more": "b" * 3_000_000}
    body = json.dumps({"query": "", "documents": [document], "return_documents": True}).encode()
    app = app_of(reranker)
    with listening(app, log_config=None) as port, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        connection.sendall(post(body))
        text = app.state.metrics.text
        until(lambda: 'route="/v2/rerank",status="200"' in text().decode())
        until(lambda: numbers(text().decode())["bge_rerank_http_requests_in_progress"] == 0)
        assert lost.wait(WAIT_S)
        connection.settimeout(WAIT_S)
        assert len(rest(connection)) < len(body)


@pytest.mark.parametrize("loop", LOOPS)
def test_requests_in_one_go_and_a_hang_up_leave_no_traceback(loop, clean):
    with Reranker("tiny", device="cpu", dtype="float32", pack_tokens=64) as engine:
        held = HeldModel(engine)
        app = app_of(engine)
        with listening(app, loop=loop, log_config=None) as port:
            for _ in range(4):
                with connect(port) as connection:
                    connection.sendall(post(BODY) * 8)
                    until(held.entered.is_set)
            until(lambda: engine.stats().queued_pairs == 0)
            held.gate.set()
            count = 'bge_rerank_http_request_seconds_count{route="/v2/rerank",status="499"}'
            until(lambda: numbers(app.state.metrics.text().decode()).get(count, 0) >= 4)
            assert (
                numbers(app.state.metrics.text().decode())["bge_rerank_http_requests_in_progress"]
                == 0
            )
            assert is_well(port)


# Who may take places


def slow(port: int, body: bytes = BODY[:-1]) -> socket.socket:
    connection = connect(port)
    connection.sendall(post(BODY)[: -len(BODY)] + body)
    return connection


def test_slow_bodies_take_no_places_of_those_that_are_scored(reranker, clean):
    limits = {"max_concurrent_requests": 2, "body_timeout_s": 60.0}
    with (
        listening(app_of(reranker, **limits), log_config=None) as port,
        contextlib.ExitStack() as open_,
    ):
        for _ in range(40):
            open_.enter_context(slow(port, b"{"))
        for _ in range(3):
            assert statuses(exchange(port, post(BODY, CLOSE))) == [200]


@pytest.mark.parametrize(
    "limits", [{"max_reading_requests": 3}, {"max_reading_bytes": 4 * len(BODY) - 5}], ids=str
)
def test_one_body_too_many_takes_the_place_of_the_slowest(reranker, clean, limits):
    app = app_of(reranker, body_timeout_s=60.0, **limits)
    with listening(app, log_config=None) as port, contextlib.ExitStack() as open_:
        arriving = []
        for number in range(4):
            arriving.append(open_.enter_context(slow(port)))
            wanted = min(number + 1, 3)
            until(lambda wanted=wanted: len(app.state.incoming_bodies._bodies) == wanted)
        refused = rest(arriving[0])
        assert statuses(refused) == [429]
        assert b"Retry-After: 1" in refused.title() or b"retry-after: 1" in refused
        assert statuses(exchange(port, post(BODY, CLOSE))) == [200]
        # It took the place of the second, and the third is still waited for.
        assert statuses(rest(arriving[1])) == [429]
        arriving[3].sendall(BODY[-1:])
        assert statuses(arriving[3].recv(65536)) == [200]
    until(lambda: app.state.incoming_bodies._bytes == 0)


def test_a_body_larger_than_all_may_be_is_read_alone(reranker):
    with listening(app_of(reranker, max_reading_bytes=10)) as port:
        assert statuses(exchange(port, post(BODY, CLOSE))) == [200]


def test_silent_connections_make_room_for_others(reranker, clean, monkeypatch):
    monkeypatch.setattr("bge_rerank_adapters.serve.transport.server._MAX_CONNECTIONS", 5)
    monkeypatch.setattr(GuardedProtocol, "head_timeout_s", WAIT_S)
    app = app_of(reranker, body_timeout_s=60.0)
    with listening(app, log_config=None) as port, contextlib.ExitStack() as open_:
        asks = open_.enter_context(slow(port))
        until(lambda: len(app.state.incoming_bodies._bodies) == 1)
        silent = [open_.enter_context(connect(port)) for _ in range(12)]
        assert statuses(exchange(port, post(BODY, CLOSE))) == [200]
        assert rest(silent[0]) == b""
        asks.sendall(BODY[-1:])
        assert statuses(asks.recv(65536)) == [200], "who has a request keeps its connection"


def test_many_slow_heads_and_bodies_keep_nobody_waiting(port):
    with contextlib.ExitStack() as open_:
        for _ in range(60):
            open_.enter_context(slow(port))
            open_.enter_context(connect(port)).sendall(b"POST /v2/rerank HT")
        for _ in range(5):
            answer = exchange(
                port, post(json.dumps({"query": QUERY, "documents": DOCUMENTS[:1]}).encode(), CLOSE)
            )
            assert statuses(answer) == [200]
