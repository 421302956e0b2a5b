"""Metrics for Prometheus: requests by route and status, and the engine's counters."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from bge_rerank_adapters.engine.stats import EngineStats
from bge_rerank_adapters.serve.ignored import IgnoredFields

# In seconds, from a few milliseconds to the default time limit.
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_COUNTERS = {
    "requests": "Calls that the engine let in.",
    "pairs": "Pairs that went through the model.",
    "tokens": "Tokens of those pairs.",
    "truncated_pairs": "Pairs whose document was cut.",
    "query_truncated_pairs": "Pairs whose query was cut.",
    "packs": "Forward passes.",
    "waiting_s": "Seconds that calls waited for their first pack.",
    "tokenizing_s": "Seconds spent on tokenising.",
    "scoring_s": "Seconds spent in the model.",
}
_GAUGES = {
    "queued_pairs": "Pairs that wait at this moment.",
    "pack_fill": "How full packs were, from 0 to 1.",
}


class Metrics:
    """The metrics of one app, in a registry of their own."""

    def __init__(
        self, read: Callable[[], EngineStats | None], about: Callable[[], dict[str, str] | None]
    ) -> None:
        """Make metrics that start at zero.

        Args:
            read: Returns the engine's counters; `None` while no engine is loaded.
            about: Returns model, device, dtype and version; `None` while no engine is loaded.
        """
        self._registry = CollectorRegistry()
        self.seconds = Histogram(
            "bge_rerank_http_request_seconds",
            "Seconds from a request's head to the end of its answer.",
            ("route", "status"),
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self.in_progress = Gauge(
            "bge_rerank_http_requests_in_progress",
            "Requests that are being answered.",
            registry=self._registry,
        )
        self.refused = Counter(
            "bge_rerank_http_refused_heads",
            "Requests refused before the app saw them: not HTTP, or a head too large or too slow.",
            ("status",),
            registry=self._registry,
        )
        self.ignored = IgnoredFields(
            Counter(
                "bge_rerank_http_ignored_fields",
                "Unknown fields of requests, by name.",
                ("field",),
                registry=self._registry,
            )
        )
        self._registry.register(_EngineCollector(read, about))

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(
        self, read: Callable[[], EngineStats | None], about: Callable[[], dict[str, str] | None]
    ) -> None:
        self._read, self._about = read, about

    def collect(self) -> Iterator[Metric]:
        fixed, stats = self._about(), self._read()
        if fixed is not None:
            yield InfoMetricFamily("bge_rerank_engine", "The engine.", value=fixed)
        if stats is None:
            return
        values = stats.to_dict()
        for name, meaning in _COUNTERS.items():
            yield CounterMetricFamily(f"bge_rerank_engine_{_unit(name)}", meaning, values[name])
        for name, meaning in _GAUGES.items():
            yield GaugeMetricFamily(f"bge_rerank_engine_{name}", meaning, values[name])

    def describe(self) -> Iterator[Metric]:
        return iter(())


def _unit(name: str) -> str:
    """Return a counter's name by Prometheus' rules, with the unit spelt out."""
    return f"{name.removesuffix('_s')}_seconds" if name.endswith("_s") else name
