"""Reranks a file or a stream of queries with documents, in chunks."""

import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby, islice
from pathlib import Path
from typing import IO, NoReturn

import typer

from bge_rerank_adapters.calls.items import Bad, Item, rank_and_write
from bge_rerank_adapters.calls.limits import Limits
from bge_rerank_adapters.calls.ranked_document import RankedDocument
from bge_rerank_adapters.cli.bar import RunBar
from bge_rerank_adapters.cli.journal import Journal, Mark
from bge_rerank_adapters.errors import RerankError, SettingsError
from bge_rerank_adapters.settings import EngineSettings

# Size of a chunk, in pairs and characters; it bounds memory, as does the longest line.
_CHUNK_PAIRS = 1024
_CHUNK_SIZE = 4_000_000
INTERRUPTED = 130
"""Exit code of a run that was ended by Ctrl-C, as usual in shells."""


class OnError(StrEnum):
    """What to do at a bad line."""

    STOP = "stop"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Task:
    """The options of a run."""

    settings: EngineSettings
    limits: Limits
    on_error: OnError
    write: Callable[[Item, Iterable[RankedDocument]], bytes]
    quiet: bool
    cluster: str | None
    actors: int | None
    count: Callable[[], int | None]
    """Returns the number of all queries, if they can be counted."""


Chunk = list[Item | Bad]
# Yields each chunk with the bytes to write for its items, or why there are none.
_Rank = Callable[[Iterator[Chunk]], Iterator[tuple[Chunk, list[bytes | Bad]]]]


def count_queries(path: Path, *, is_run: bool) -> int:
    """Return the number of queries in a file of JSON lines, or in a TREC run."""
    with path.open("rb") as lines:
        filled = (line for line in lines if line.strip())
        if not is_run:
            return sum(1 for _ in filled)
        return sum(1 for _ in groupby(filled, key=lambda line: line.split(maxsplit=1)[0]))


def run_into_stream(task: Task, items: Iterator[Item | Bad]) -> bool:
    """Rerank to standard output; return whether there were bad lines."""
    # In one terminal the bar and the results would overwrite each other.
    shown = _watched(task) and not sys.stdout.isatty()
    bar = _bar(task, done=0, shown=shown)
    try:
        with bar, _ranker(task, bar) as rank:
            return _run(task, rank(_chunks(items)), bar, _Sink(sys.stdout.buffer)) > 0
    except KeyboardInterrupt:
        _stop(task, f"Stopped after {bar.done:,} queries.")


def run_into_file(task: Task, items: Iterator[Item | Bad], journal: Journal) -> bool:
    """Rerank what the journal does not have yet; return whether anything was put aside."""
    if journal.finished:
        _say(
            task,
            f"{journal.output} is complete already{journal.same_settings()}; delete it to rerank "
            "anew.",
        )
        return journal.bad.exists()
    done = sum(1 for _ in islice(items, journal.mark.items))
    if done < journal.mark.items:
        raise SettingsError(
            f"The input ends after {done} queries, but {journal.mark.items} of it are done "
            "already; give the input that the run began with."
        )
    bar = _bar(task, done=done, shown=_watched(task))
    try:
        with bar:
            _fill_file(task, items, journal, bar)
    except KeyboardInterrupt:
        _stop(task, _how_to_continue(journal, bar.total))
    bad = journal.mark.bad_bytes > 0
    if not bad:
        journal.bad.unlink()
    journal.finish()
    return bad


def _fill_file(task: Task, items: Iterator[Item | Bad], journal: Journal, bar: RunBar) -> None:
    # Load the model first: if that fails, an earlier output must stay.
    with _ranker(task, bar) as rank:
        journal.begin()
        with journal.output.open("ab") as results, journal.bad.open("ab") as put_aside:
            _run(task, rank(_chunks(items)), bar, _Sink(results, put_aside, journal))


def _how_to_continue(journal: Journal, total: int | None) -> str:
    if not journal.begun:
        return f"Stopped before anything was done; {journal.output} is as it was."
    of_all = "" if total is None else f" of {total:,}"
    return (
        f"Stopped: {journal.mark.items:,}{of_all} queries are done and kept in {journal.output}; "
        "to go on, give the same command with --resume."
    )


def _stop(task: Task, text: str) -> NoReturn:
    _say(task, text)
    raise typer.Exit(code=INTERRUPTED)


def _watched(task: Task) -> bool:
    return not task.quiet and sys.stderr.isatty()


def _bar(task: Task, *, done: int, shown: bool) -> RunBar:
    # Counting reads the whole file, so it is done only for a bar.
    return RunBar(total=task.count() if shown else None, done=done, shown=shown)


@contextmanager
def _ranker(task: Task, bar: RunBar) -> Generator[_Rank, None, None]:
    """Load the model, here or in the cluster."""
    if task.cluster is not None:
        # Imported here, since it is an extra.
        from bge_rerank_adapters.ray.cluster import chunk_ranker, connected

        # Ray writes messages to standard output, which is for results only.
        with (
            redirect_stdout(sys.stderr),
            connected(task.cluster),
            chunk_ranker(
                task.settings, limits=task.limits, write=task.write, actors=task.actors
            ) as ranker,
        ):
            bar.ready()
            yield ranker.rank
        return
    # Imported here, since torch takes seconds.
    from bge_rerank_adapters.engine.reranker import Reranker

    with Reranker.from_settings(task.settings) as engine:

        def rank(chunks: Iterator[Chunk]) -> Iterator[tuple[Chunk, list[bytes | Bad]]]:
            for chunk in chunks:
                bar.begin(len(chunk), _pairs(chunk), lambda: engine.stats().pairs)
                yield chunk, rank_and_write(engine, chunk, limits=task.limits, write=task.write)

        bar.ready()
        yield rank


@dataclass(frozen=True, slots=True)
class _Sink:
    """Where results go; for a file also bad lines, and the journal."""

    results: IO[bytes]
    put_aside: IO[bytes] | None = None
    journal: Journal | None = None

    def write(self, outcome: bytes | Bad) -> None:
        if isinstance(outcome, bytes):
            self.results.write(outcome)
        elif self.put_aside is not None:
            self.put_aside.write(outcome.to_json())

    def record(self, items: int) -> None:
        """Record that this many more items are done."""
        self.results.flush()
        if self.journal is not None and self.put_aside is not None:
            self.put_aside.flush()
            done = self.journal.mark.items + items
            self.journal.set(Mark(done, self.results.tell(), self.put_aside.tell()))


def _run(
    task: Task, ranked: Iterator[tuple[Chunk, list[bytes | Bad]]], bar: RunBar, sink: _Sink
) -> int:
    """Rerank all items; return how many were bad."""
    bad = pairs = count = 0
    for chunk, lines in ranked:
        for outcome in lines:
            if isinstance(outcome, Bad):
                bad += 1
                _refuse_or_report(task, outcome)
            sink.write(outcome)
        sink.record(len(chunk))
        count += len(chunk)
        pairs += _pairs(chunk)
        bar.advance(len(chunk))
    _say(task, f"{count} queries, {pairs} pairs" + (f", {bad} put aside" if bad else "") + ".")
    return bad


def _pairs(chunk: Chunk) -> int:
    return sum(len(each.texts) for each in chunk if isinstance(each, Item))


def _chunks(items: Iterator[Item | Bad]) -> Iterator[Chunk]:
    chunk: Chunk = []
    pairs = size = 0
    for item in items:
        chunk.append(item)
        if isinstance(item, Item):
            pairs += len(item.texts)
            size += item.size
        if pairs >= _CHUNK_PAIRS or size >= _CHUNK_SIZE or len(chunk) >= _CHUNK_PAIRS:
            yield chunk
            chunk, pairs, size = [], 0, 0
    if chunk:
        yield chunk


def _refuse_or_report(task: Task, bad: Bad) -> None:
    message = f"line {bad.line}: {bad.reason}"
    if task.on_error is OnError.STOP:
        raise RerankError(f"{message} (--on-error skip puts such lines aside and goes on.)")
    if not task.quiet:
        typer.echo(message, err=True)


def _say(task: Task, text: str) -> None:
    if not task.quiet:
        typer.echo(text, err=True)
