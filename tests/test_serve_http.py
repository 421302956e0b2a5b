"""The server over real sockets: cohere's client, odd HTTP, its own description, the command."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import cohere
import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from typer.testing import CliRunner

from bge_rerank_adapters import Reranker
from bge_rerank_adapters.cli import app
from bge_rerank_adapters.serve import ServerSettings, create_app
from bge_rerank_adapters.serve.transport.server import server_of
from bge_rerank_adapters.settings import EngineSettings
from tests.checkpoints import read_sentences
from tests.rerank_servers import free_port
from tests.test_cli import PLAIN, invoke, plain
from tests.test_serve import HeldModel
from tests.texts import DOCUMENTS, QUERY

pytestmark = pytest.mark.timeout(400)

TINY = EngineSettings(model="tiny", device="cpu", dtype="float32")
KEY = "sekret-42"
BODY = json.dumps({"query": QUERY, "documents": DOCUMENTS}).encode()
SENTENCES = list(read_sentences().values())
# A server's start takes half a minute on a machine that does much else.
WAIT_S = 150


@contextlib.contextmanager
def listening(app: Any, **options: Any) -> Iterator[int]:
    """Serve an app from a thread as the command does, and give its port."""
    server = server_of(app, log_level="warning", **options)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until(lambda: server.started)
            yield port
        finally:
            server.should_exit = True
            thread.join(WAIT_S)


def until(condition: Any) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def port(reranker: Reranker) -> Iterator[int]:
    limits = {"max_documents": 50, "max_body_bytes": 200_000, "body_timeout_s": WAIT_S}
    with listening(create_app(ServerSettings(engine=TINY, **limits), engine=reranker)) as opened:
        yield opened


@pytest.fixture(scope="module")
def keyed_port(reranker: Reranker) -> Iterator[int]:
    app = create_app(ServerSettings(engine=TINY, api_key=KEY), engine=reranker)
    with listening(app) as opened:
        yield opened


# The official client


@pytest.mark.parametrize("kind", [cohere.Client, cohere.ClientV2])
def test_cohere_ranks_as_the_engine_does(port, reranker, kind):
    client = kind(api_key="any", base_url=f"http://127.0.0.1:{port}")
    answer = client.rerank(model="tiny", query=QUERY, documents=DOCUMENTS, top_n=3)
    wanted = reranker.rerank(QUERY, DOCUMENTS, top_k=3)
    assert [each.index for each in answer.results] == [each.index for each in wanted]
    assert [each.relevance_score for each in answer.results] == pytest.approx(
        [each.score for each in wanted], abs=1e-5
    )
    assert answer.id
    assert answer.meta.api_version.version == ("1" if kind is cohere.Client else "2")


async def test_coheres_asynchronous_client_works_too(port, reranker):
    client = cohere.AsyncClientV2(api_key="any", base_url=f"http://127.0.0.1:{port}")
    answer = await client.rerank(model="tiny", query=QUERY, documents=DOCUMENTS)
    wanted = [each.index for each in reranker.rerank(QUERY, DOCUMENTS)]
    assert [each.index for each in answer.results] == wanted


def test_cohere_gets_its_documents_back(port):
    client = cohere.Client(api_key="any", base_url=f"http://127.0.0.1:{port}")
    documents = [{"title": "Faust", "text": "Goethe wrote Faust."}, "It rains."]
    answer = client.rerank(
        model="tiny",
        query="Who wrote Faust?",
        documents=documents,
        rank_fields=["title", "text"],
        return_documents=True,
    )
    assert answer.results[0].document.text == "Goethe wrote Faust."
    assert answer.results[0].document.title == "Faust"
    assert answer.results[1].document.text == "It rains."


@pytest.mark.parametrize("kind", [cohere.Client, cohere.ClientV2])
def test_cohere_raises_its_own_errors(port, keyed_port, kind):
    client = kind(api_key="any", base_url=f"http://127.0.0.1:{port}")
    with pytest.raises(cohere.NotFoundError, match=r"'rerank-v3\.5' is not served here"):
        client.rerank(model="rerank-v3.5", query=QUERY, documents=DOCUMENTS)
    with pytest.raises(cohere.UnprocessableEntityError, match="top_n"):
        client.rerank(model="tiny", query=QUERY, documents=DOCUMENTS, top_n=0)
    stranger = kind(api_key="wrong", base_url=f"http://127.0.0.1:{keyed_port}")
    with pytest.raises(cohere.UnauthorizedError, match="needs its API key"):
        stranger.rerank(model="tiny", query=QUERY, documents=DOCUMENTS)
    friend = kind(api_key=KEY, base_url=f"http://127.0.0.1:{keyed_port}")
    assert friend.rerank(model="tiny", query=QUERY, documents=DOCUMENTS).results


# Odd HTTP


def exchange(port: int, request: bytes, *, ended: bool = False) -> bytes:
    """Send bytes, and the end of them if asked to, and return all that comes back."""
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as connection:
        connection.sendall(request)
        if ended:
            connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def post(body: bytes, *headers: bytes, version: bytes = b"1.1", path: bytes = b"/v2/rerank"):
    lines = [b"POST %s HTTP/%s" % (path, version), b"Host: server", *headers]
    if not any(line.lower().startswith(b"content-type:") for line in headers):
        lines.append(b"Content-Type: application/json")
    if not any(line.lower().startswith((b"content-length:", b"transfer-")) for line in headers):
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def chunked(body: bytes, size: int) -> bytes:
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


CLOSE = b"Connection: close"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (post(BODY, CLOSE), 200),
        (post(BODY, version=b"1.0"), 200),
        (post(chunked(BODY, 7), CLOSE, b"Transfer-Encoding: chunked"), 200),
        (post(BODY, CLOSE, b"Expect: 100-continue"), 200),
        (post(BODY, CLOSE, b"Authorization: Bearer \xff\xfe\xe2\x82\xac"), 200),
        (post(b"", CLOSE, b"Content-Length: 5000000"), 413),
        (post(chunked(b" " * 300_000, 9000), CLOSE, b"Transfer-Encoding: chunked"), 413),
        # Refused before all of the body is read, which must not reset the connection.
        (post(b" " * 3_000_000, CLOSE), 413),
        (post(b" " * 3_000_000, version=b"1.0"), 413),
        (post(b" " * 3_000_000, b"Content-Encoding: br", b"Connection: te, Close"), 415),
        (post(BODY, CLOSE, path=b"/v2/rerank?top_n=1&x=%00"), 200),
        (post(BODY, CLOSE, path=b"//v2/rerank"), 404),
        (post(BODY, CLOSE, path=b"/v2/../v2/rerank"), 404),
        (post(BODY, CLOSE, path=b"/v2/rerank/%2e%2e"), 404),
        (post(b"[" * 60_000, CLOSE), 400),
        (b"GET /health HTTP/1.0\r\n\r\n", 200),
        (b"BREW /v2/rerank HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405),
    ],
    ids=lambda value: value if isinstance(value, int) else value[:40].decode("latin-1"),
)
def test_odd_requests_get_their_answer(port, request_, status, monkeypatch):
    if len(request_) > 1_000_000:
        # However slowly this machine sends, the server reads on.
        monkeypatch.setattr("bge_rerank_adapters.serve.gate._SILENCE_S", WAIT_S)
    answer = exchange(port, request_)
    statuses = re.findall(rb"^HTTP/1\.1 (\d+)", answer, flags=re.MULTILINE)
    # A method of no standard is no HTTP to one of uvicorn's parsers.
    assert int(statuses[-1]) in ({status, 400} if request_.startswith(b"BREW") else {status})
    assert b"Traceback" not in answer
    assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=WAIT_S).status_code == 200


@pytest.mark.parametrize(
    "noise",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"POST /v2/rerank HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        post(b"abcde", b"Content-Length: 5", b"Content-Length: 6"),
        b"POST /v2/rerank HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v2/rerank HTTP/9.9\r\nHost: x\r\n\r\n",
        b"",
    ],
)
def test_noise_does_no_harm(port, noise):
    answer = exchange(port, noise, ended=True)
    assert not answer or re.match(rb"HTTP/1\.1 4\d\d ", answer)
    assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=WAIT_S).status_code == 200


def test_head_gets_no_body(port):
    answer = exchange(port, b"HEAD /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert body == b""


def test_two_requests_in_one_go_get_two_answers(port):
    answer = exchange(port, post(BODY) + post(BODY, CLOSE))
    assert answer.count(b"HTTP/1.1 200") == 2
    assert answer.count(b'"relevance_score"') == 8


def test_a_body_that_does_not_come_is_not_waited_for(reranker):
    settings = ServerSettings(engine=TINY, body_timeout_s=0.5)
    with (
        listening(create_app(settings, engine=reranker)) as port,
        socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as connection,
    ):
        connection.sendall(post(BODY)[:-10])
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"did not arrive within 0.5 seconds" in answer


def test_a_refused_body_that_does_not_come_is_not_waited_for(reranker):
    limits = {"max_body_bytes": 1000, "body_timeout_s": 2.0 * WAIT_S}
    waits = (b"Content-Length: 5000", b"Expect: 100-continue", CLOSE)
    with listening(create_app(ServerSettings(engine=TINY, **limits), engine=reranker)) as opened:
        # The socket's own time limit is over before the body's.
        assert exchange(opened, post(b"", *waits)).startswith(b"HTTP/1.1 413")


def test_a_refused_body_leaves_the_connection_in_order(port):
    """What the server did not read of a body must not be taken for the next request."""
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_S) as client:
        inner = post(BODY, b"X-Inner: yes")
        for _ in range(2):
            large = client.post(
                "/v2/rerank", content=inner * 400, headers={"Content-Encoding": "br"}
            )
            assert large.status_code == 415
            headers = {"Content-Type": "application/json"}
            assert client.post("/v2/rerank", content=BODY, headers=headers).status_code == 200


def test_a_client_that_hangs_up_takes_its_pairs_along():
    with Reranker("tiny", device="cpu", dtype="float32", pack_tokens=64) as engine:
        held = HeldModel(engine)
        with listening(create_app(ServerSettings(engine=TINY), engine=engine)) as port:
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(post(BODY))
                until(held.entered.is_set)
                assert engine.stats().queued_pairs
            until(lambda: engine.stats().queued_pairs == 0)
            held.gate.set()


def test_many_clients_get_what_the_engine_gives(port, reranker):
    requests = [SENTENCES[start : start + 5] for start in range(0, 150, 5)]

    def ask(texts: list[str]) -> dict[int, float]:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_S) as client:
            answer = client.post("/v1/rerank", json={"query": QUERY, "documents": texts})
        return {each["index"]: each["relevance_score"] for each in answer.json()["results"]}

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, requests))
    for scores, texts in zip(answers, requests, strict=True):
        wanted = reranker.score(QUERY, texts)
        assert [scores[index] for index in range(5)] == pytest.approx(wanted, abs=1e-5)


# Its own description


@pytest.fixture(scope="module")
def described(reranker: Reranker) -> Any:
    app = create_app(ServerSettings(engine=TINY, api_key=KEY), engine=reranker)
    return schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank", "/infinity/rerank"])
def test_answers_are_as_described(described, path, mode):
    @settings(
        max_examples=40,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=described[path]["POST"].as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        # Of these fields it takes the model, or the documents, to tell what is allowed.
        of_documents = {"rank_fields", "truncate_prompt_tokens"}
        of_documents |= {"texts"} if path == "/rerank" else set()
        free = not of_documents & set(case.body if isinstance(case.body, dict) else ())
        response = case.call_and_validate(
            headers={"Authorization": f"Bearer {KEY}"},
            excluded_checks=[] if free else [positive_data_acceptance],
        )
        assert response.status_code < 500

    check()


@pytest.mark.parametrize("path", ["/health", "/metrics", "/info", "/v1/models", "/v1/cluster/auth"])
def test_what_is_read_is_as_described(described, path):
    case = described[path]["GET"].Case()
    response = case.call_and_validate(headers={"Authorization": f"Bearer {KEY}"})
    assert response.status_code == 200


# The command


def start(*arguments: str, port: int, **environment: str) -> "subprocess.Popen[str]":
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BGE_RERANK")}
    return subprocess.Popen(
        [sys.executable, "-m", "bge_rerank_adapters", "serve", "--port", str(port), *arguments],
        env=kept | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def test_the_command_serves_and_ends_when_it_has_answered(reranker):
    opened = free_port()
    url, headers = f"http://127.0.0.1:{opened}", {"Authorization": f"Bearer {KEY}"}
    arguments = ("--model", "tiny", "--device", "cpu", "--dtype", "float32", "--max-documents", "9")
    environment = {"BGE_RERANK_API_KEY": KEY, "BGE_RERANK_SERVED_MODEL": "mine"}
    process = start(*arguments, port=opened, **environment, BGE_RERANK_MAX_DOCUMENTS="5")
    try:
        until(lambda: is_up(url) or process.poll() is not None)
        body = {"model": "mine", "query": QUERY, "documents": SENTENCES[:9]}
        assert httpx.post(f"{url}/v2/rerank", json=body, timeout=WAIT_S).status_code == 401
        with ThreadPoolExecutor(1) as pool:
            long = body | {"documents": [" ".join(SENTENCES[i::9]) for i in range(9)]}
            call = pool.submit(
                httpx.post, f"{url}/v2/rerank", json=long, headers=headers, timeout=WAIT_S
            )
            metrics = f"{url}/metrics"
            get = partial(httpx.get, metrics, headers=headers, timeout=WAIT_S)
            until(lambda: "progress 2.0" in get().text or call.done())
            process.send_signal(signal.SIGTERM)
            answer = call.result(WAIT_S)
        assert answer.status_code == 200
        assert len(answer.json()["results"]) == 9
        shown, told = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, told
    assert told.startswith("Loading tiny; nothing listens before it is loaded\n")
    assert f"Serving mine: try it on {url}/, all routes are on {url}/docs\n" in told
    assert shown == ""
    assert "Traceback" not in told
    assert KEY not in told


def test_the_command_tells_what_is_wrong_in_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = invoke("serve", "--model", "tiny", "--port", str(taken.getsockname()[1]))
    assert done.exit_code == 1
    assert "cannot be listened on" in str(done.exception)
    assert "choose another --port" in str(done.exception)
    for arguments, message in (
        (("--host", "no.such.host.invalid"), "'no.such.host.invalid' cannot be listened on"),
        (("--max-length", "8", "--query-max-length", "9"), "leaves no room for a document"),
        (("--timeout-s", "0"), "timeout_s must be a number of seconds above 0, got 0.0"),
    ):
        done = invoke("serve", "--model", "tiny", *arguments, "--port", "0")
        assert done.exit_code == 1
        assert message in str(done.exception)


def test_the_key_cannot_be_given_where_other_users_see_it():
    shown = plain(invoke("serve", "--help").output)
    assert "--model" in shown
    assert "the API key only from there" in shown
    assert invoke("serve", "--api-key", "x").exit_code == 2


def test_the_environments_mistakes_reach_the_command():
    done = CliRunner().invoke(app, ["serve"], env=PLAIN | {"BGE_RERANK_APIKEY": "x"})
    assert "BGE_RERANK_APIKEY is not a setting" in str(done.exception)


@pytest.mark.parametrize("part", [b"[]", b"{}", b'""', b"1", b'{"text":"a"}'])
async def test_the_loop_goes_on_while_a_large_body_is_read(reranker, part):
    app = create_app(ServerSettings(engine=TINY), engine=reranker)
    transport = httpx.ASGITransport(app=app)
    parts = b",".join([part] * (4_000_000 // (len(part) + 1)))
    body = b'{"query": "", "documents": [%s]}' % parts
    headers = {"Content-Type": "application/json"}
    steps = [0.0]
    run = asyncio.Handle._run

    def timed_run(handle: asyncio.Handle) -> None:
        begin = time.thread_time()
        run(handle)
        steps.append(time.thread_time() - begin)

    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        await client.get("/health")
        # Other load on the machine can only add to a step's processor time.
        for _ in range(3):
            steps[:] = [0.0]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(asyncio.Handle, "_run", timed_run)
                # A task of its own, since the step that runs already is not timed.
                call = client.post("/v2/rerank", content=body, headers=headers)
                answer = await asyncio.create_task(call)
            assert answer.status_code == 413
            assert len(steps) > 3
            if max(steps) < 0.05:
                break
    assert max(steps) < 0.05


def test_texts_full_of_brackets_are_no_parts(port, reranker):
    texts = [f"{number} " + '[{,}] \\" ' * 400 for number in range(40)]
    body = {"query": QUERY, "documents": texts}
    answer = httpx.post(f"http://127.0.0.1:{port}/v2/rerank", json=body, timeout=WAIT_S)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["results"]) == 40
