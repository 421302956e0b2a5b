"""An optional progress bar on standard error."""

from collections.abc import Iterable
from typing import Any, Self


class ProgressBar:
    """Counts the requests of a long run; a context manager."""

    def __init__(self, requests: Iterable[Any], *, shown: bool) -> None:
        """Make a bar for the requests, whose number may be unknown.

        Args:
            requests: The requests of the run; only their number is read.
            shown: Whether a bar is shown.
        """
        self._bar: Any = None
        if shown:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

            self._bar = Progress(
                "Reranking",
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("Reranking", total=_length(requests))

    def advance(self, requests: int) -> None:
        """Count finished requests."""
        if self._bar is not None:
            self._bar.advance(self._task, requests)

    def __enter__(self) -> Self:
        """Show the bar."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop updating the bar."""
        if self._bar is not None:
            self._bar.stop()


def _length(requests: Any) -> int | None:
    try:
        return len(requests)
    except TypeError:
        return None
