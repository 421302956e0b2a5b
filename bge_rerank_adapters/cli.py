"""The command line: `bge-rerank`."""

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from bge_rerank_adapters.checkpoints import DEFAULT_MODEL, TINY
from bge_rerank_adapters.errors import RerankError

app = typer.Typer(
    help="Score how well documents answer a query with BAAI's BGE rerankers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

Model = Annotated[str, typer.Option(help='A folder, a name on the hub, or "tiny".')]
Device = Annotated[str, typer.Option(help='"auto", "cpu", "cuda", "cuda:1", "mps", ...')]
Dtype = Annotated[str, typer.Option(help='"auto", "float32", "bfloat16" or "float16".')]


@app.callback()
def _commands() -> None:
    """Score how well documents answer a query with BAAI's BGE rerankers."""


@app.command()
def demo(model: Model = TINY, device: Device = "auto") -> None:
    """Rerank real documents: the engine, a LangChain chain, a LlamaIndex query engine."""
    from bge_rerank_adapters.demo import run

    run(Console(), model=model, device=device)


@app.command()
def verify(
    model: Model = DEFAULT_MODEL,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Compare this installation's scores with those that authors published."""
    from bge_rerank_adapters.verification import run

    if not run(Console(), model=model, device=device, dtype=dtype):
        raise typer.Exit(code=1)


def main() -> None:
    """Run the command line; the package's own errors are told in one line."""
    try:
        app()
    except RerankError as error:
        told = f"[red]error:[/red] {escape(str(error))}"
        Console(stderr=True).print(told, highlight=False, soft_wrap=True)
        raise SystemExit(1) from error
