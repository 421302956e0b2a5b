"""The progress bar of a run over a file: count, speed and remaining time, on standard error."""

from collections.abc import Callable, Iterable
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn
from rich.progress import TimeRemainingColumn as TimeLeft


class RunBar:
    """Counts the queries of a run; a context manager.

    It also moves within a chunk, by the pairs of it that the engine has scored.
    """

    def __init__(self, *, total: int | None, done: int, shown: bool) -> None:
        """Start counting.

        Args:
            total: Number of queries of the whole run; `None` if unknown, as for a stream.
            done: How many of them an earlier run did.
            shown: Whether a bar is shown.
        """
        self.done = done
        self.total = total
        self._in_progress: Callable[[], float] = float
        self._bar = _Bar(self._move) if shown else None
        if self._bar is not None:
            self._task = self._bar.add_task("Loading the model", total=total, completed=done)

    def begin(self, queries: int, pairs: int, scored: Callable[[], int]) -> None:
        """Begin a chunk.

        Args:
            queries: Number of its queries.
            pairs: Number of its pairs.
            scored: Returns how many pairs the engine has scored since it was loaded.
        """
        before = scored()
        self._in_progress = lambda: queries * min((scored() - before) / max(pairs, 1), 1.0)

    def advance(self, queries: int) -> None:
        """Count finished queries."""
        self._in_progress = float
        self.done += queries

    def __enter__(self) -> Self:
        """Show the bar."""
        if self._bar is not None:
            try:
                self._bar.start()
            except KeyboardInterrupt:
                self._bar.stop()  # or the cursor stays hidden
                raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop updating the bar."""
        if self._bar is not None:
            self._bar.stop()

    def ready(self) -> None:
        """Start measuring time, once the model is loaded."""
        if self._bar is not None:
            self._bar.reset(
                self._task, total=self.total, completed=self.done, description="Reranking"
            )

    def _move(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done + self._in_progress())


class _Bar(Progress):
    """A bar that updates its count whenever it is drawn, ten times a second."""

    def __init__(self, update_count: Callable[[], None]) -> None:
        self._update_count: Callable[[], None] | None = None
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            _Speed(""),
            TimeLeft(elapsed_when_finished=True),
            console=Console(stderr=True),
            # Standard output is for results.
            redirect_stdout=False,
        )
        self._update_count = update_count

    def get_renderables(self) -> Iterable[Any]:
        if self._update_count is not None:
            self._update_count()
        return super().get_renderables()


class _Speed(TextColumn):
    def render(self, task: Task) -> Any:
        speed = task.finished_speed or task.speed
        self.text_format = "" if speed is None else f"{speed:.3g} queries/s"
        return super().render(task)
