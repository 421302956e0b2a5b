"""`bge-rerank evaluate`: a BEIR folder, before and after reranking."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bge_rerank_adapters.cli import options
from bge_rerank_adapters.evaluation import Report, bm25, evaluate, read_collection, read_run
from bge_rerank_adapters.evaluation.view import rows, title
from bge_rerank_adapters.settings import EngineSettings
from bge_rerank_adapters.settings.checkpoints import DEFAULT_MODEL

EXAMPLES = """
Examples:

    bge-rerank evaluate scifact --model tiny --depth 50

    bge-rerank evaluate scifact --run dense.trec -o results --plots

    bge-rerank evaluate scifact --model tiny --dtype float32 --dtype bfloat16

With --output a run that was stopped continues where it was. The folder gets
report.json, per-query.jsonl, TREC runs and, with --plots, pictures.
"""


@options.with_engine_options
def evaluate_folder(
    folder: Annotated[Path, typer.Argument(help="A BEIR folder.")],
    model: Annotated[
        list[str] | None, typer.Option(help="A model to compare; may be repeated.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="A dtype to compare; may be repeated.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="TREC run of the first stage; without it BM25 searches.")
    ] = None,
    language: Annotated[
        str, typer.Option(help='Language of the word stems in BM25; "none" for no stems.')
    ] = "english",
    depth: Annotated[int, typer.Option(help="Candidates for each query.", min=1)] = 100,
    queries: Annotated[
        int | None, typer.Option(help="Take only so many of the queries, evenly spread.", min=1)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write results to.")
    ] = None,
    plots: Annotated[
        bool, typer.Option("--plots", help="Also draw pictures; needs --output.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON in place of a table.")
    ] = False,
    device: options.Device = "auto",
    quiet: options.Quiet = False,
    *,
    engine: options.Given,
) -> None:
    """Measure what reranking changes on a test collection: quality, significance, speed."""
    if plots and output is None:
        raise typer.BadParameter("needs --output, a folder for the pictures", param_hint="--plots")
    collection = read_collection(folder)
    if queries is not None:
        collection = collection.sample(queries)
    base = options.engine_settings(
        (model or [DEFAULT_MODEL])[0], device=device, dtype="auto", engine=engine
    )
    engines = _engines(base, model or [DEFAULT_MODEL], dtype or ["auto"])
    stems = None if language == "none" else language
    watched = not quiet and sys.stderr.isatty()
    if watched:
        # Both take seconds, and the bar comes after them.
        typer.echo("Finding candidates, then loading the model ...", err=True)
    first = bm25(collection, depth=depth, language=stems) if run is None else read_run(run)
    try:
        report = evaluate(
            collection,
            first,
            engines,
            depth=depth,
            folder=output,
            progress=watched,
            time_depths=plots,
            first_stage_name="BM25" if run is None else run.stem,
        )
    except KeyboardInterrupt:
        if output is not None:
            typer.echo(
                f"Stopped: {output} keeps what is scored; the same command goes on.", err=True
            )
        raise
    if as_json:
        typer.echo(json.dumps(report.to_records()))
    else:
        _show(Console(), report)
    if output is not None:
        _save(report, output, plots=plots, quiet=quiet)


def _engines(
    base: EngineSettings, models: list[str], dtypes: list[str]
) -> dict[str, EngineSettings]:
    return {
        model if len(dtypes) == 1 else f"{model} {dtype}": replace(base, model=model, dtype=dtype)
        for model in models
        for dtype in dtypes
    }


def _save(report: Report, folder: Path, *, plots: bool, quiet: bool) -> None:
    """Write the results, and list the files."""
    paths = report.save(folder)
    if plots:
        from bge_rerank_adapters.evaluation.plots import save_plots

        paths += save_plots(report, folder)
    if not quiet:
        typer.echo(f"Written to {folder}:", err=True)
        for path in paths:
            typer.echo(f"  {path.name}", err=True)


def _show(console: Console, report: Report) -> None:
    """Print the sentences and the table; narrow terminals wrap the engines' names."""
    console.print(escape(title(report)), highlight=False)
    console.print()
    for each in report.scored:
        console.print(escape(report.answer(each.name)), highlight=False)
    console.print()
    head, *body = rows(report)
    table = Table()
    table.add_column(head[0], no_wrap=True)
    for name in head[1:]:
        table.add_column(escape(name), justify="right", overflow="fold")
    for row in body:
        table.add_row(*map(escape, row))
    console.print(table)
