"""The published rerankers as a table: what each needs, and how it is run."""

from rich.console import Console
from rich.table import Table

from bge_rerank_adapters.settings.checkpoints import CHECKPOINTS, DEFAULT_MODEL, Checkpoint

_DTYPES = ("float32", "bfloat16", "int8")
_NOTE = (
    "GB are those of the weights; packs come on top. float16 takes what "
    "bfloat16 takes. With cutoff_layers only the layers up to that one are loaded."
)


def run(console: Console) -> None:
    """Print one row for each checkpoint of the table."""
    table = Table(title="BGE rerankers")
    for heading in ("model", "family", "languages"):
        table.add_column(heading)
    for heading in ("parameters", "tokens", *(f"GB {dtype}" for dtype in _DTYPES)):
        table.add_column(heading, justify="right")
    for checkpoint in CHECKPOINTS.values():
        table.add_row(*_row(checkpoint))
    console.print(table)
    console.print(_NOTE, highlight=False)
    console.print(f"The default is {DEFAULT_MODEL}.", highlight=False)


def _row(checkpoint: Checkpoint) -> tuple[str, ...]:
    memory = checkpoint.gigabytes
    return (
        checkpoint.name,
        checkpoint.family,
        checkpoint.languages,
        _count(checkpoint.parameters),
        f"{checkpoint.max_tokens:,}",
        *(f"{memory[dtype]:.1f}" if dtype in memory else "-" for dtype in _DTYPES),
    )


def _count(millions: int) -> str:
    return f"{millions / 1000:.1f} B" if millions >= 1000 else f"{millions} M"
