"""`bge-rerank rerank`: reranks a file or a stream of queries with documents, or one query."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from enum import StrEnum
from pathlib import Path
from typing import IO, Annotated

import typer

from bge_rerank_adapters.calls.items import Item, read_jsonl, with_unique_names
from bge_rerank_adapters.calls.limits import Limits
from bge_rerank_adapters.cli import options
from bge_rerank_adapters.cli.bulk import (
    OnError,
    Task,
    count_queries,
    run_into_file,
    run_into_stream,
)
from bge_rerank_adapters.cli.journal import Journal
from bge_rerank_adapters.cli.question import answer, documents_of
from bge_rerank_adapters.cli.trec_input import RunReader
from bge_rerank_adapters.cli.words import in_shell_words
from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.settings.checkpoints import DEFAULT_MODEL

PUT_ASIDE = 3
"""Exit code of a run that finished, but put bad lines aside."""

EXAMPLES = """
Examples:

    bge-rerank rerank --query "Who wrote Faust?" "It rains." "Goethe wrote it."

    grep -i faust notes.txt | bge-rerank rerank --query "Who wrote Faust?"

    bge-rerank rerank questions.jsonl -o ranked.jsonl --top-k 3

    cat questions.jsonl | bge-rerank rerank --model tiny | jq .results[0].text

    bge-rerank rerank bm25.trec --collection scifact -o reranked.trec --resume

    bge-rerank rerank questions.jsonl -o ranked.jsonl --ray head-node:6379

Each input line is an object, and what else it has is kept:

    {"id": "q1", "query": "...", "documents": ["...", {"text": "...", "id": 7}]}

With --collection the input is a TREC run whose texts are in a BEIR folder.

Bad lines that --on-error skip put aside can be corrected and given again:

    jq -r .input ranked.jsonl.bad.jsonl > again.jsonl

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but bad lines were put
aside, 130 stopped by Ctrl-C.
"""


class Format(StrEnum):
    """How results are written."""

    JSONL = "jsonl"
    TREC = "trec"


@options.with_engine_options
def rerank(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE | DOCUMENT...]",
            help="JSONL, or a TREC run; - or nothing is standard input. With --query the "
            "documents, or nothing for lines of standard input.",
        ),
    ] = None,
    query: Annotated[
        str | None, typer.Option(help="One question; the result is a table of its documents.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write; without it standard output."),
    ] = None,
    collection: Annotated[
        Path | None, typer.Option(help="BEIR folder with the texts of a TREC run.")
    ] = None,
    output_format: Annotated[
        Format | None, typer.Option("--format", help="Of the output; without it that of the input.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Maximum results for each query; without it all.")
    ] = None,
    score_threshold: Annotated[
        float | None, typer.Option(help="Lowest score to keep, from 0 to 1.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a run that was stopped; needs --output.")
    ] = False,
    on_error: Annotated[
        OnError, typer.Option(help="What to do at a bad line: stop, or skip it and put it aside.")
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
            help="Models to load in the cluster; without it one per GPU, or per machine.",
            min=1,
            rich_help_panel="Many machines",
        ),
    ] = None,
    *,
    engine: options.Given,
) -> None:
    """Rerank the documents of one question, or of each query of a file or a stream."""
    _check_usage(resume, output, actors, cluster)
    limits = _limits(top_k, score_threshold)
    settings = options.engine_settings(model, device=device, dtype=dtype, engine=engine)
    if query is not None:
        given = {"-o": output, "--collection": collection, "--resume": resume, "--ray": cluster}
        _refuse_beside_query(given, output_format)
        documents = documents_of(_checked_input(arguments))
        answer(query, documents, settings, limits=limits, as_json=output_format is not None)
        return
    source = _one_source(arguments)
    kind = output_format or (Format.JSONL if collection is None else Format.TREC)
    write = Item.to_json if kind is Format.JSONL else Item.to_trec
    with ExitStack() as files:
        lines = _opened(source, files)
        run = None if collection is None else files.enter_context(RunReader(collection))
        items = read_jsonl(lines) if run is None else run.read(lines)
        items = items if kind is Format.JSONL else with_unique_names(items)
        task = Task(
            settings,
            limits,
            on_error,
            write,
            quiet=quiet,
            cluster=cluster,
            actors=actors,
            count=lambda: (
                count_queries(source, is_run=run is not None)
                if source is not None and source.is_file()
                else None
            ),
        )
        if output is None:
            bad = run_into_stream(task, items)
        else:
            settled = {
                "settings": settings.to_dict(),
                "format": str(kind),
                "input": _named(source),
                "collection": _named(collection),
                **limits.to_dict(),
            }
            journal = Journal(output, options=settled, resume=resume)
            journal.refuse_inputs(_inputs(lines, run))
            bad = run_into_file(task, items, journal)
    if bad:
        raise typer.Exit(code=PUT_ASIDE)


def _check_usage(
    resume: bool, output: Path | None, actors: int | None, cluster: str | None
) -> None:
    if actors is not None and cluster is None:
        raise typer.BadParameter("needs --ray, the cluster they are for", param_hint="--actors")
    if resume and output is None:
        raise typer.BadParameter(
            "needs --output: a stream cannot be continued", param_hint="--resume"
        )


def _refuse_beside_query(given: Mapping[str, object], output_format: Format | None) -> None:
    found = next((name for name, value in given.items() if value), None)
    if found is not None or output_format is Format.TREC:
        raise typer.BadParameter(
            "is for files and streams of queries, not for one --query",
            param_hint=found or "--format trec",
        )


def _checked_input(arguments: list[str] | None) -> list[str]:
    """Return the arguments; refuse to read from a terminal."""
    if not arguments and sys.stdin.isatty():
        raise typer.BadParameter(
            "nothing to rerank: give a file, or --query QUERY and documents, or pipe lines in; "
            "`bge-rerank rerank -h` shows examples",
            param_hint="[FILE | DOCUMENT...]",
        )
    return arguments or []


def _one_source(arguments: list[str] | None) -> Path | None:
    """Return the file to read; `None` for standard input."""
    given = _checked_input(arguments)
    if len(given) > 1:
        raise typer.BadParameter(
            f"one file at a time, got {len(given)}; documents of one question go with --query",
            param_hint="[FILE | DOCUMENT...]",
        )
    return Path(given[0]) if given and given[0] != "-" else None


def _limits(top_k: int | None, score_threshold: float | None) -> Limits:
    """Return the limits of each ranking; a bad one is reported as wrong usage."""
    try:
        return Limits(top_k, score_threshold)
    except SettingsError as error:
        hint = "--top-k" if str(error).startswith("top_k") else "--score-threshold"
        text = in_shell_words(str(error)).removeprefix(f"{hint} ")
        text = text.replace("None returns all documents", "leave it out for all")
        raise typer.BadParameter(text, param_hint=hint) from error


def _named(path: Path | None) -> str | None:
    """Return an input's path for the journal; `None` for a stream, or for none."""
    return None if path is None else str(path.resolve())


def _opened(source: Path | None, files: ExitStack) -> IO[bytes]:
    if source is None:
        return sys.stdin.buffer
    try:
        return files.enter_context(source.open("rb"))
    except OSError as error:
        raise SettingsError(
            f"{source} cannot be read: {error.strerror}; give a file of JSON lines, or the "
            "documents of one question after --query QUERY."
        ) from error


def _inputs(lines: IO[bytes], run: RunReader | None) -> Iterator[os.stat_result]:
    """Yield the `os.stat` of each file that is read, including standard input."""
    # Standard input may be replaced by something that is not a file.
    with suppress(OSError):
        yield os.fstat(lines.fileno())
    for path in run.files if run is not None else ():
        yield path.stat()
