"""Contenders as child processes that wait in turn."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_ROOT = Path(__file__).parent.parent


class Contender:
    """A contender's process; idle, without using a processor, between requests.

    Attributes:
        name: Its name in the tables.
        error: Why it cannot run, or `None`.
        start_s: Seconds from the start of the process until it was loaded.
    """

    def __init__(self, name: str, folder: Path, *, verbose: bool = False) -> None:
        """Start the process and wait until the contender is loaded."""
        self.name = name
        begin = time.perf_counter()
        self._process = subprocess.Popen(  # noqa: S603 - this file's own module
            [sys.executable, "-m", "benchmarks.worker", name, str(folder)],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if verbose else subprocess.DEVNULL,
            text=True,
        )
        self.error: str | None = self._answer().get("error")
        self.start_s = time.perf_counter() - begin

    def score(self, query: str, documents: Sequence[str]) -> dict[str, Any]:
        """Return `seconds`, `scores` and memory, or `error`."""
        return self.ask({"query": query, "documents": list(documents)})

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its answer; an error is kept for the tables."""
        if self.error is not None:
            return {"error": self.error}
        if self._process.stdin is None:
            raise RuntimeError("The process has no standard input.")
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.error = answer.get("error")
        return answer

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            return {"error": f"its process ended with code {self._process.wait()}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        """Return the contender itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
