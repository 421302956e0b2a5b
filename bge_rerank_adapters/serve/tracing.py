"""OpenTelemetry spans: one of each request, with children for tokenising, waiting and scoring.

Only `export` imports OpenTelemetry. An app makes spans if the program has imported it, as
`opentelemetry-instrument` does, and `bge-rerank serve` if OTEL_EXPORTER_OTLP_ENDPOINT is set.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.types import Scope

from bge_rerank_adapters.calls.extras import require
from bge_rerank_adapters.calls.ranking import Usage

_NAME = "bge_rerank_adapters"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_NANOSECONDS = 1_000_000_000


def is_requested() -> bool:
    """Return whether the environment has an endpoint for spans."""
    return any(os.environ.get(name) for name in _ENDPOINTS)


def export() -> Callable[[], None]:
    """Export this process's spans to the environment's endpoint; return the function that flushes.

    Raises:
        ImportError: The extra `otel` is not installed.
    """
    require("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http", of="serve", extra="otel")
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = os.environ.get("OTEL_SERVICE_NAME") or "bge-rerank"
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return provider.shutdown


class Tracing:
    """Makes spans, or does nothing in a program without OpenTelemetry."""

    def __init__(self) -> None:
        """Find out whether OpenTelemetry has been imported."""
        self._trace: Any = sys.modules.get("opentelemetry.trace")
        self._tracer = None if self._trace is None else self._trace.get_tracer(_NAME)

    @contextmanager
    def request(self, scope: Scope, route: str, status: Callable[[], int | None]) -> Iterator[None]:
        """Make a span of a request, as a child of the one in its `traceparent` header.

        Args:
            scope: The request's scope.
            route: The route, not the path that the client sent.
            status: Returns the status of the answer.
        """
        if self._tracer is None:
            yield
            return
        from opentelemetry.propagate import extract

        carrier = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        with self._tracer.start_as_current_span(
            f"{scope['method']} {route}",
            context=extract(carrier),
            kind=self._trace.SpanKind.SERVER,
            attributes={"http.request.method": scope["method"], "http.route": route},
        ) as span:
            try:
                yield
            finally:
                code = status() or 499
                span.set_attribute("http.response.status_code", code)
                if code >= 500:
                    span.set_status(self._trace.StatusCode.ERROR)

    def scored(self, usage: Usage | None, *, documents: int) -> None:
        """Make the spans of a call that has just been scored, as children of its request's."""
        if self._tracer is None or usage is None:
            return
        self._trace.get_current_span().set_attributes(
            {"bge_rerank.documents": documents, "bge_rerank.tokens": usage.tokens}
        )
        end = time.time_ns()
        for name, seconds in (
            ("score", usage.scoring_s),
            ("wait", usage.waiting_s),
            ("tokenize", usage.tokenizing_s),
        ):
            start = end - int(seconds * _NANOSECONDS)
            self._tracer.start_span(name, start_time=start).end(end)
            end = start
