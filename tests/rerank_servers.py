"""Rerank servers on a local port: some that answer, or fail, as a test says, and our own."""

import json
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from bge_rerank_adapters import RemoteReranker, Reranker


@dataclass
class Asked:
    """One request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any = None


@dataclass
class Reply:
    """What is answered: JSON of `content`, or `raw` bytes; or a connection that breaks."""

    content: Any = None
    status: int = 200
    raw: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    breaks: str = ""  # "before" the answer, or "within" it


NOT_FOUND = Reply({"detail": "Not Found"}, status=404)


@dataclass
class FakeServer:
    """A server under way: where it is, and what it was asked."""

    url: str
    asked: list[Asked]
    gone: threading.Event  # a client broke off while it was answered
    ports: set[int]  # the clients', one for each connection

    @property
    def posts(self) -> list[Asked]:
        return [each for each in self.asked if each.method == "POST"]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "_Server"

    def do_POST(self) -> None:
        self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def do_GET(self) -> None:
        self._reply(None)

    def _reply(self, body: Any) -> None:
        request = Asked(self.command, self.path, dict(self.headers), body)
        self.server.ports.add(self.client_address[1])
        self.server.asked.append(request)
        reply = self.server.answer(request)
        self._wait(reply.delay_s)
        if reply.breaks == "before":
            self._reset()
            return
        content = json.dumps(reply.content).encode() if reply.raw is None else reply.raw
        self.send_response(reply.status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if reply.breaks == "within":
            self.wfile.write(content[: len(content) // 2])
            self._reset()
            return
        self.wfile.write(content)

    def _wait(self, seconds: float) -> None:
        """Wait, but no longer than the client does."""
        end = time.monotonic() + seconds
        self.connection.settimeout(0.02)
        while time.monotonic() < end:
            try:
                if not self.connection.recv(1, socket.MSG_PEEK):
                    raise ConnectionError("The client has gone.")
            except TimeoutError:
                continue
        self.connection.settimeout(None)

    def _reset(self) -> None:
        # With a linger of 0 the client sees a reset, as of a process that was killed.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, answer: Callable[[Asked], Reply]) -> None:
        self.answer = answer
        self.asked: list[Asked] = []
        self.ports: set[int] = set()
        self.gone = threading.Event()
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, *_: object) -> None:
        self.gone.set()


@contextmanager
def running(answer: Callable[[Asked], Reply]) -> Iterator[FakeServer]:
    """Run a server whose every reply is what `answer` makes of the request."""
    server = _Server(answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        yield FakeServer(url, server.asked, server.gone, server.ports)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def scores_of(texts: list[str]) -> list[tuple[int, float]]:
    """Return index and score of texts that begin with their score, best first."""
    found = [(index, float(text.split()[0])) for index, text in enumerate(texts)]
    return sorted(found, key=lambda each: -each[1])


def common(asked: Asked) -> Reply:
    """Answer as Cohere, Jina, vLLM and infinity do, on `/rerank` and `/v1/rerank` alone."""
    if asked.path not in {"/rerank", "/v1/rerank"}:
        return NOT_FOUND
    ranked = scores_of(asked.body["documents"])
    return Reply({"results": [{"index": i, "relevance_score": s} for i, s in ranked]})


def in_turn(*replies: Reply | Callable[[Asked], Reply]) -> Callable[[Asked], Reply]:
    """Answer one POST after the other, the last reply for ever; `/info` is not found."""
    left = list(replies)
    lock = threading.Lock()

    def answer(asked: Asked) -> Reply:
        if asked.method == "GET":
            return NOT_FOUND
        with lock:
            reply = left.pop(0) if len(left) > 1 else left[0]
        return reply(asked) if callable(reply) else reply

    return answer


def remote(server: FakeServer, *, path: str = "/v1", **given: Any) -> RemoteReranker:
    """Return a reranker that is told by the path what its server speaks."""
    return RemoteReranker(server.url + path, **given)


@contextmanager
def answering(*replies: Any, **given: Any) -> Iterator[tuple[RemoteReranker, FakeServer]]:
    """Return a reranker in front of a server that gives these replies, and the server."""
    with running(in_turn(*replies)) as server, remote(server, **given) as reranker:
        yield reranker, server


def free_port() -> int:
    """Return a port for a server that starts later, or again and again.

    It is below those that systems give to connections, so that none of these takes it meanwhile.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with socket.socket() as found, suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@contextmanager
def serving(engine: Reranker, **settings: Any) -> Iterator[str]:
    """Serve an engine on a port of its own; the address."""
    import uvicorn

    from bge_rerank_adapters.serve import ServerSettings, create_app

    app = create_app(ServerSettings(**settings), engine=engine)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(60)
