"""OpenTelemetry's spans of requests, and that nothing is imported where nobody asked for them."""

import json
import os
import re
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any, ClassVar

import httpx
import pytest

pytest.importorskip("fastapi")

from bge_rerank_adapters import Reranker
from bge_rerank_adapters.serve import tracing
from tests.rerank_servers import free_port
from tests.test_imports import FILES, imported, loaded_after
from tests.test_serve import BODY, KEY, TEI_BODY, client_of
from tests.test_serve_http import WAIT_S, is_up, start, until

pytestmark = pytest.mark.timeout(400)

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CALLER = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """All spans that end, of apps that are made while it is used."""
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("opentelemetry.trace.get_tracer", provider.get_tracer)
    yield exporter.get_finished_spans
    provider.shutdown()


async def test_a_request_has_its_spans_within_its_callers(spans, reranker: Reranker):
    async with client_of(reranker) as client:
        for path, body in (("/v1/rerank", BODY), ("/rerank/", TEI_BODY)):
            answer = await client.post(path, json=body, headers=CALLER)
            assert answer.status_code == 200
        await client.get("/health")
    assert [each.name for each in spans()] == [
        *("score", "wait", "tokenize", "POST /v1/rerank"),
        *("score", "wait", "tokenize", "POST /rerank"),
    ]
    score, wait, tokenize, whole = spans()[:4]
    assert f"{whole.context.trace_id:032x}" == TRACE
    assert f"{whole.parent.span_id:016x}" == PARENT
    assert whole.attributes["http.route"] == "/v1/rerank"
    assert whole.attributes["http.response.status_code"] == 200
    assert whole.attributes["bge_rerank.documents"] == len(BODY["documents"])
    assert whole.attributes["bge_rerank.tokens"] > 0
    for part in (score, wait, tokenize):
        assert part.parent.span_id == whole.context.span_id
    assert whole.start_time <= tokenize.start_time < tokenize.end_time == wait.start_time
    assert wait.end_time == score.start_time < score.end_time <= whole.end_time


async def test_refusals_and_failures_have_their_status(spans, reranker, monkeypatch):
    async with client_of(reranker, api_key=KEY) as client:
        await client.post("/v1/rerank", json=BODY)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("at /srv/secret.py")

    monkeypatch.setattr("bge_rerank_adapters.serve.schemas.requests.RerankRequest.texts", fail)
    async with client_of(reranker) as client:
        await client.post("/v1/rerank", json=BODY)
    refused, failed = spans()
    assert (refused.attributes["http.response.status_code"], refused.status.is_ok) == (401, True)
    assert (failed.attributes["http.response.status_code"], failed.status.is_ok) == (500, False)


ASK = """
import asyncio, httpx
from bge_rerank_adapters.serve import create_app, ServerSettings
from bge_rerank_adapters.settings import EngineSettings
from bge_rerank_adapters import Reranker
async def ask():
    with Reranker("tiny", device="cpu") as engine:
        app = create_app(ServerSettings(), engine=engine)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            body = {"query": "a", "documents": ["b"]}
            assert (await client.post("/v1/rerank", json=body)).status_code == 200
asyncio.run(ask())
"""


def test_nothing_is_imported_where_nobody_asked():
    # Of FastAPI some releases import the interface themselves; what sends spans is the extra's.
    assert loaded_after(ASK, ("opentelemetry.sdk", "opentelemetry.exporter")) == []
    importers = {path for path in FILES if any("opentelemetry" in each for each in imported(path))}
    assert {path.name for path in importers} == {"tracing.py"}
    assert not any("opentelemetry" in each for each in imported(*importers, nested=False))


def test_the_extra_is_named_where_it_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    with pytest.raises(ImportError, match=re.escape('pip install "bge-rerank-adapters[otel]"')):
        tracing.export()


class Collector(BaseHTTPRequestHandler):
    """Stands for what spans are sent to."""

    received: ClassVar[list[tuple[str, bytes]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.received.append((self.path, body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def test_the_command_sends_spans_where_the_environment_says():
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    port = free_port()
    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        Thread(target=collector.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{collector.server_address[1]}"
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1"}
        process = start("--model", "tiny", "--device", "cpu", port=port, **os.environ | environment)
        try:
            until(lambda: is_up(f"http://127.0.0.1:{port}") or process.poll() is not None)
            url = f"http://127.0.0.1:{port}/v2/rerank"
            assert (
                httpx.post(
                    url, content=json.dumps(BODY), headers=CALLER, timeout=WAIT_S
                ).status_code
                == 200
            )
            process.terminate()
            _, told = process.communicate(timeout=WAIT_S)
        finally:
            process.kill()
            process.wait()
        collector.shutdown()
    assert process.returncode == 0, told
    sent = b"".join(body for path, body in Collector.received if path == "/v1/traces")
    assert bytes.fromhex(TRACE) in sent
    for name in (b"POST /v2/rerank", b"tokenize", b"wait", b"score", b"bge-rerank"):
        assert name in sent
