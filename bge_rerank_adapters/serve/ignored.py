"""Counts fields of requests that are ignored, by name, and logs each once."""

import logging
from collections.abc import Iterable

from prometheus_client import Counter

# Clients choose the names, so their number is limited for the server and for Prometheus.
_MAX_NAMES = 100
_MAX_CHARACTERS = 60

_log = logging.getLogger(__name__)


class IgnoredFields:
    """Counts ignored fields: the first hundred names separately, all others as `other`."""

    def __init__(self, counter: Counter) -> None:
        """Take a counter with one label."""
        self._counter = counter
        self._names: set[str] = set()

    def count(self, names: Iterable[str]) -> None:
        """Count each name, and log new ones."""
        for name in names:
            self._counter.labels(self._label(name)).inc()

    def _label(self, name: str) -> str:
        # Escapes lone surrogates and control characters, for logs and UTF-8.
        label = ascii(name[:_MAX_CHARACTERS])[1:-1]
        if label not in self._names:
            if len(self._names) == _MAX_NAMES:
                return "other"
            self._names.add(label)
            _log.warning(
                "Requests have a field %s, which this server does not know and ignores; "
                "BGE_RERANK_STRICT=1 refuses such requests",
                label,
            )
        return label
