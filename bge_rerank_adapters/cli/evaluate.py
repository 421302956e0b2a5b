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
from bge_rerank_adapters.settings import EngineSettings
from bge_rerank_adapters.settings.checkpoints import DEFAULT_MODEL

EXAMPLES = """
Examples:

    bge-rerank evaluate scifact --model tiny --depth 50

    bge-rerank evaluate scifact --run dense.trec --model BAAI/bge-reranker-base
    --model BAAI/bge-reranker-v2-m3 --dtype float32 --dtype bfloat16 -o results --plots

With --output a run that was stopped continues where it was, and the folder gets report.json,
per-query.jsonl, TREC runs and, with --plots, pictures.
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
        Path | None, typer.Option(help="TREC run of the first stage; else BM25 searches.")
    ] = None,
    language: Annotated[
        str, typer.Option(help='Whose word stems BM25 uses; "none" for none.')
    ] = "english",
    depth: Annotated[int, typer.Option(help="Candidates of a query.", min=1)] = 100,
    queries: Annotated[
        int | None, typer.Option(help="Only so many queries, evenly spread.", min=1)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for results.")
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
    engine: options.Asked,
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
    first = bm25(collection, depth=depth, language=stems) if run is None else read_run(run)
    report = evaluate(
        collection,
        first,
        engines,
        depth=depth,
        folder=output,
        progress=not quiet and sys.stderr.isatty(),
    )
    if output is not None:
        report.save(output)
    if output is not None and plots:
        from bge_rerank_adapters.evaluation.plots import save_plots

        save_plots(report, output)
    if as_json:
        typer.echo(json.dumps(report.to_records()))
    else:
        Console().print(_table(report))


def _engines(
    base: EngineSettings, models: list[str], dtypes: list[str]
) -> dict[str, EngineSettings]:
    return {
        model if len(dtypes) == 1 else f"{model} {dtype}": replace(base, model=model, dtype=dtype)
        for model in models
        for dtype in dtypes
    }


def _table(report: Report) -> Table:
    """Return the report as a table that stands on its side: narrow terminals have few columns."""
    records = report.to_records()
    title = (
        f"{report.collection.name}: {len(report.collection.queries)} queries, "
        f"{len(report.collection.documents)} documents, {report.depth} candidates"
    )
    table = Table(title=escape(title), title_justify="left")
    table.add_column("")
    for record in records:
        table.add_column(escape(str(record["engine"])), justify="right", overflow="fold")
    for name in list(records[-1])[1:]:
        table.add_row(escape(name), *(_cell(record.get(name)) for record in records))
    return table


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 10 else f"{value:.4f}"
    return "" if value is None else str(value)
