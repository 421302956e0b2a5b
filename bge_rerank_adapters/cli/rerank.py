"""`bge-rerank rerank`: a file or a stream of queries with documents, reranked."""

import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import IO, Annotated

import typer

from bge_rerank_adapters.calls.items import Bad, Item, rank_and_write, read_jsonl, with_own_names
from bge_rerank_adapters.calls.limits import Limits
from bge_rerank_adapters.calls.progress import ProgressBar
from bge_rerank_adapters.calls.ranking import RankedDocument
from bge_rerank_adapters.cli import options
from bge_rerank_adapters.cli.journal import Journal, Mark
from bge_rerank_adapters.cli.trec_input import RunReader
from bge_rerank_adapters.errors import RerankError, SettingsError
from bge_rerank_adapters.settings import EngineSettings
from bge_rerank_adapters.settings.checkpoints import DEFAULT_MODEL

# What is read before anything is scored; memory is bounded by it, and by the longest line.
_CHUNK_PAIRS = 1024
_CHUNK_SIZE = 4_000_000
PUT_ASIDE = 3
"""Exit code of a run that finished, but put something aside."""

EXAMPLES = """
Examples:

    bge-rerank rerank questions.jsonl -o ranked.jsonl --top-k 3

    cat questions.jsonl | bge-rerank rerank --model tiny | jq .results[0].text

    bge-rerank rerank bm25.trec --collection scifact -o reranked.trec --resume

    bge-rerank rerank questions.jsonl -o ranked.jsonl --ray head-node:6379

Input lines: {"query": "...", "documents": ["...", {"text": "...", "id": 7}], ...}; with
--collection a TREC run whose texts are in a BEIR folder.

Bad lines that --on-error skip put aside can be mended and given again:

    jq -r .input ranked.jsonl.bad.jsonl > again.jsonl

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but bad lines were put aside.
"""


class OnError(StrEnum):
    """What becomes of a run that meets a bad line."""

    STOP = "stop"
    SKIP = "skip"


class Format(StrEnum):
    """How results are written."""

    JSONL = "jsonl"
    TREC = "trec"


@dataclass(frozen=True, slots=True)
class _Task:
    """What to do with the items, and how to tell it."""

    settings: EngineSettings
    limits: Limits
    on_error: OnError
    write: Callable[[Item, Iterable[RankedDocument]], bytes]
    quiet: bool
    cluster: str | None
    actors: int | None


Chunk = list[Item | Bad]
# Yields each chunk with what to write for its items, or why there is nothing to write.
_Rank = Callable[[Iterator[Chunk]], Iterator[tuple[Chunk, list[bytes | Bad]]]]


@options.with_engine_options
def rerank(
    source: Annotated[
        Path | None, typer.Argument(help="JSONL, or a TREC run; - or nothing for standard input.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; else standard output.")
    ] = None,
    collection: Annotated[
        Path | None, typer.Option(help="BEIR folder with the texts of a TREC run.")
    ] = None,
    output_format: Annotated[
        Format | None, typer.Option("--format", help="As the input is, if not given.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Most results of a query; else all.")] = None,
    score_threshold: Annotated[float | None, typer.Option(help="Lowest score to keep.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a run that was stopped; needs --output.")
    ] = False,
    on_error: Annotated[
        OnError, typer.Option(help="At a bad line: stop, or skip it and put it aside.")
    ] = OnError.STOP,
    model: options.Model = DEFAULT_MODEL,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quiet: options.Quiet = False,
    cluster: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help='Score on a Ray cluster: "auto", "local", host:port or ray://host:port.',
            rich_help_panel="Many machines",
        ),
    ] = None,
    actors: Annotated[
        int | None,
        typer.Option(
            help="Models loaded in the cluster; else one per GPU, or per machine without any.",
            min=1,
            rich_help_panel="Many machines",
        ),
    ] = None,
    *,
    engine: options.Asked,
) -> None:
    """Rerank the documents of each query of a file or a stream."""
    if actors is not None and cluster is None:
        raise typer.BadParameter("needs --ray, the cluster they are for", param_hint="--actors")
    if resume and output is None:
        raise typer.BadParameter(
            "needs --output: a stream cannot be continued", param_hint="--resume"
        )
    limits = _limits(top_k, score_threshold)
    settings = options.engine_settings(model, device=device, dtype=dtype, engine=engine)
    kind = output_format or (Format.JSONL if collection is None else Format.TREC)
    write = Item.to_json if kind is Format.JSONL else Item.to_trec
    task = _Task(settings, limits, on_error, write, quiet, cluster, actors)
    with ExitStack() as files:
        lines = _opened(source, files)
        run = None if collection is None else files.enter_context(RunReader(collection))
        items = read_jsonl(lines) if run is None else run.read(lines)
        items = items if kind is Format.JSONL else with_own_names(items)
        if output is None:
            bad = _run_into_stream(task, items)
        else:
            asked = {
                "settings": settings.to_dict(),
                "format": str(kind),
                "input": _named(source),
                "collection": _named(collection),
                **limits.to_dict(),
            }
            journal = Journal(output, asked=asked, resume=resume)
            journal.refuse_inputs(_inputs(lines, run))
            bad = _run_into_file(task, items, journal)
    if bad:
        raise typer.Exit(code=PUT_ASIDE)


def _limits(top_k: int | None, score_threshold: float | None) -> Limits:
    """Return the limits of each ranking; a bad one is reported as wrong usage."""
    try:
        return Limits(top_k, score_threshold)
    except SettingsError as error:
        hint = "--top-k" if str(error).startswith("top_k") else "--score-threshold"
        raise typer.BadParameter(str(error), param_hint=hint) from error


def _named(path: Path | None) -> str | None:
    """Return what a journal calls an input; `None` for a stream, or for none."""
    return None if path is None or str(path) == "-" else str(path.resolve())


def _opened(source: Path | None, files: ExitStack) -> IO[bytes]:
    if source is None or str(source) == "-":
        return sys.stdin.buffer
    try:
        return files.enter_context(source.open("rb"))
    except OSError as error:
        raise SettingsError(f"{source} cannot be read: {error.strerror}.") from error


def _inputs(lines: IO[bytes], run: RunReader | None) -> Iterator[os.stat_result]:
    """Yield what the system says of each file that is read, standard input among them."""
    # What stands for standard input in another program's test may be no file.
    with suppress(OSError):
        yield os.fstat(lines.fileno())
    for path in run.files if run is not None else ():
        yield path.stat()


def _run_into_stream(task: _Task, items: Iterator[Item | Bad]) -> bool:
    results = sys.stdout.buffer
    with _ranker(task) as rank:
        return _run(task, rank, items, results) > 0


def _run_into_file(task: _Task, items: Iterator[Item | Bad], journal: Journal) -> bool:
    """Rerank what the journal has not; return whether anything was ever put aside."""
    if journal.finished:
        _tell(
            task,
            f"{journal.output} is complete already, whatever its options were; delete it to "
            "rerank anew.",
        )
        return journal.bad.exists()
    done = sum(1 for _ in islice(items, journal.mark.items))
    if done < journal.mark.items:
        raise SettingsError(
            f"The input ends after {done} queries, but {journal.mark.items} of it are done "
            "already; give the input that the run began with."
        )
    # The model comes first: one that cannot be loaded must not cost an earlier output.
    with _ranker(task) as rank:
        journal.begin()
        with journal.output.open("ab") as results, journal.bad.open("ab") as put_aside:
            _run(task, rank, items, results, put_aside=put_aside, journal=journal)
    bad = journal.mark.bad_bytes > 0
    if not bad:
        journal.bad.unlink()
    journal.finish()
    return bad


@contextmanager
def _ranker(task: _Task) -> Generator[_Rank, None, None]:
    """Load the model, here or in the cluster."""
    if task.cluster is not None:
        # Imported here, since it is an extra.
        from bge_rerank_adapters.ray.cluster import chunk_ranker, connected

        # Ray tells of its troubles on standard output, where only results belong.
        with (
            redirect_stdout(sys.stderr),
            connected(task.cluster),
            chunk_ranker(
                task.settings, limits=task.limits, write=task.write, actors=task.actors
            ) as ranker,
        ):
            yield ranker.rank
        return
    # Imported here, since torch takes seconds.
    from bge_rerank_adapters.engine.reranker import Reranker

    with Reranker.from_settings(task.settings) as engine:
        yield lambda chunks: (
            (chunk, rank_and_write(engine, chunk, limits=task.limits, write=task.write))
            for chunk in chunks
        )


def _run(
    task: _Task,
    rank: _Rank,
    items: Iterator[Item | Bad],
    results: IO[bytes],
    *,
    put_aside: IO[bytes] | None = None,
    journal: Journal | None = None,
) -> int:
    """Rerank all items; return how many were bad."""
    bad = pairs = count = 0
    shown = not task.quiet and sys.stderr.isatty()
    with ProgressBar(items, shown=shown) as bar:
        for chunk, lines in rank(_chunks(items)):
            for told in lines:
                if isinstance(told, Bad):
                    bad += 1
                    _refuse_or_report(task, told)
                    if put_aside is not None:
                        put_aside.write(told.to_json())
                else:
                    results.write(told)
            results.flush()
            count += len(chunk)
            pairs += sum(len(each.texts) for each in chunk if isinstance(each, Item))
            if journal is not None and put_aside is not None:
                put_aside.flush()
                items_done = journal.mark.items + len(chunk)
                journal.set(Mark(items_done, results.tell(), put_aside.tell()))
            bar.advance(len(chunk))
    _tell(task, f"{count} queries, {pairs} pairs" + (f", {bad} put aside" if bad else "") + ".")
    return bad


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


def _refuse_or_report(task: _Task, bad: Bad) -> None:
    told = f"line {bad.line}: {bad.reason}"
    if task.on_error is OnError.STOP:
        raise RerankError(f"{told} (--on-error skip puts such lines aside and goes on.)")
    if not task.quiet:
        typer.echo(told, err=True)


def _tell(task: _Task, text: str) -> None:
    if not task.quiet:
        typer.echo(text, err=True)
