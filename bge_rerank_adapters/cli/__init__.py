"""The command line: `bge-rerank`."""

import os
import sys
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from bge_rerank_adapters.cli import evaluate as evaluate_command
from bge_rerank_adapters.cli import options
from bge_rerank_adapters.cli import rerank as rerank_command
from bge_rerank_adapters.cli import serve as serve_command
from bge_rerank_adapters.cli.bulk import INTERRUPTED
from bge_rerank_adapters.cli.info import info
from bge_rerank_adapters.cli.words import in_shell_words
from bge_rerank_adapters.errors import RerankError
from bge_rerank_adapters.settings.checkpoints import DEFAULT_MODEL, TINY

_TRACEBACK = "BGE_RERANK_TRACEBACK"

app = typer.Typer(
    help="Score how well documents answer a query with BAAI's BGE rerankers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"bge-rerank {version('bge-rerank-adapters')}")
        raise typer.Exit


@app.callback()
def _commands(
    asked: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Score how well documents answer a query with BAAI's BGE rerankers."""


@app.command()
@options.with_engine_options
def demo(
    model: options.Model = TINY,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    *,
    engine: options.Given,
) -> None:
    """Rerank real documents: the engine, a LangChain chain, a LlamaIndex query engine."""
    from bge_rerank_adapters.cli.demo import run

    settings = options.engine_settings(model, device=device, dtype=dtype, engine=engine)
    run(Console(), settings)


@app.command()
@options.with_engine_options
def verify(
    model: options.Model = DEFAULT_MODEL,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    *,
    engine: options.Given,
) -> None:
    """Compare this installation's scores with those that authors published."""
    from bge_rerank_adapters.cli.verification import run

    settings = options.engine_settings(model, device=device, dtype=dtype, engine=engine)
    if not run(Console(), settings):
        raise typer.Exit(code=1)


@app.command()
def models() -> None:
    """List the BGE rerankers: family, languages, size, and memory needed in each dtype."""
    from bge_rerank_adapters.cli.model_table import run

    run(Console())


app.command(epilog=rerank_command.EXAMPLES)(rerank_command.rerank)
app.command("evaluate", epilog=evaluate_command.EXAMPLES)(evaluate_command.evaluate_folder)
app.command(epilog=serve_command.EXAMPLES)(serve_command.serve)
app.command()(info)


def main() -> None:
    """Run the command line; errors are printed in one line, with the names of options."""
    try:
        app()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            _exit_at_once()
        raise
    except (RerankError, ImportError) as error:
        _fail(in_shell_words(str(error)), error)
    except OSError as error:
        _fail(f"{error.filename or 'The system'}: {error.strerror or error}", error)
    except Exception as error:
        if _TRACEBACK in os.environ:
            raise
        kind = type(error).__name__
        _fail(f"{kind}: {error} (this is a bug; {_TRACEBACK}=1 shows where)", error)


def _exit_at_once() -> NoReturn:
    # If a model is loading in another thread, C++ may abort a process that ends normally.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED)


def _fail(text: str, error: Exception) -> NoReturn:
    line = f"[red]error:[/red] {escape(text)}"
    Console(stderr=True).print(line, highlight=False, soft_wrap=True)
    raise SystemExit(1) from error
