"""How far a run over a file is, on standard error: how many of how many, how fast, how long yet."""

from collections.abc import Callable, Iterable
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn
from rich.progress import TimeRemainingColumn as TimeLeft


class RunBar:
    """Counts the queries of a run; a context manager.

    It moves while the model works, not only when a chunk is done: of a chunk under way it counts
    the part of its pairs that the engine has scored.
    """

    def __init__(self, *, total: int | None, done: int, shown: bool) -> None:
        """Begin a count.

        Args:
            total: Queries of the whole run; `None` where nobody knows, as of a stream.
            done: How many of these an earlier run did.
            shown: Whether there is a bar at all.
        """
        self.done = done
        self.total = total
        self._under_way: Callable[[], float] = float
        self._bar = _Bar(self._move) if shown else None
        if self._bar is not None:
            self._task = self._bar.add_task("Loading the model", total=total, completed=done)

    def begin(self, queries: int, pairs: int, scored: Callable[[], int]) -> None:
        """Tell what is under way.

        Args:
            queries: How many of the input are scored next.
            pairs: Pairs of these.
            scored: Returns how many pairs the engine has scored since it was loaded.
        """
        before = scored()
        self._under_way = lambda: queries * min((scored() - before) / max(pairs, 1), 1.0)

    def advance(self, queries: int) -> None:
        """Count finished queries."""
        self._under_way = float
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
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()

    def ready(self) -> None:
        """Tell that the model is loaded, from where on time counts."""
        if self._bar is not None:
            self._bar.reset(
                self._task, total=self.total, completed=self.done, description="Reranking"
            )

    def _move(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done + self._under_way())


class _Bar(Progress):
    """Asks for the state of things whenever it is drawn, ten times a second."""

    def __init__(self, ask: Callable[[], None]) -> None:
        self._ask: Callable[[], None] | None = None
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            _Speed(""),
            TimeLeft(elapsed_when_finished=True),
            console=Console(stderr=True),
            # Results go to standard output, which is none of its business.
            redirect_stdout=False,
        )
        self._ask = ask

    def get_renderables(self) -> Iterable[Any]:
        if self._ask is not None:
            self._ask()
        return super().get_renderables()


class _Speed(TextColumn):
    def render(self, task: Task) -> Any:
        speed = task.finished_speed or task.speed
        self.text_format = "" if speed is None else f"{speed:.3g} queries/s"
        return super().render(task)
