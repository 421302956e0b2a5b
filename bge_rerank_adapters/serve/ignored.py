"""Fields of requests that mean nothing here: counted by name, and logged once."""

import logging
from collections.abc import Iterable

from prometheus_client import Counter

# Strangers choose the names, which must not fill the memory of the server or of Prometheus.
_MOST_NAMES = 100
_MOST_CHARACTERS = 60

_log = logging.getLogger(__name__)


class IgnoredFields:
    """Counts fields that were ignored, the first hundred names each and the rest as `other`."""

    def __init__(self, counter: Counter) -> None:
        """Count into a counter with one label."""
        self._counter = counter
        self._names: set[str] = set()

    def count(self, names: Iterable[str]) -> None:
        """Count each of them, and log those that are new."""
        for name in names:
            self._counter.labels(self._label(name)).inc()

    def _label(self, name: str) -> str:
        # Without lone surrogates and control characters, which neither a log nor UTF-8 takes.
        label = ascii(name[:_MOST_CHARACTERS])[1:-1]
        if label not in self._names:
            if len(self._names) == _MOST_NAMES:
                return "other"
            self._names.add(label)
            _log.warning(
                "Requests have a field %s, which means nothing here and is ignored; "
                "BGE_RERANK_STRICT=1 refuses such requests",
                label,
            )
        return label
