"""Counters of a reranker's work, which several threads add to."""

import threading
from collections.abc import Mapping
from typing import Any


class Counters:
    """Named numbers; thread-safe."""

    def __init__(self, start: Mapping[str, float]) -> None:
        """Begin with these numbers."""
        self._lock = threading.Lock()
        self._counts = dict(start)

    def add(self, **counts: float) -> None:
        """Add to the numbers of these names."""
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count

    def read(self) -> dict[str, Any]:
        """Return a consistent snapshot of all numbers."""
        with self._lock:
            return dict(self._counts)
