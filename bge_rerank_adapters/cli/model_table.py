"""Prints the published rerankers as a table."""

from itertools import groupby

from rich.console import Console
from rich.table import Table

from bge_rerank_adapters.settings.checkpoints import CHECKPOINTS, DEFAULT_MODEL, Checkpoint

_DTYPES = ("float32", "bfloat16", "int8")
_NOTES = (
    "GB are for the weights; packs need more. float16 needs the same as bfloat16.",
    "With --cutoff-layers only the layers up to that one are loaded.",
    f"The default is {DEFAULT_MODEL}.",
)
_NUMBERS = ("parameters", "tokens", *(f"GB {dtype}" for dtype in _DTYPES))


def run(console: Console) -> None:
    """Print the checkpoints: one line each in a pipe or a wide terminal."""
    lines = _lines()
    if console.is_terminal and console.width < max(map(len, lines)):
        console.print(_narrow())
    else:
        for line in lines:
            console.print(line, highlight=False, soft_wrap=True)
    console.print()
    for note in _NOTES:
        console.print(note, highlight=False, soft_wrap=not console.is_terminal)


def _lines() -> list[str]:
    rows = [("model", "family", "languages", *_NUMBERS)]
    rows += [
        (each.name, each.family, each.languages, *_numbers(each)) for each in CHECKPOINTS.values()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    texts = len(rows[0]) - len(_NUMBERS)
    return [
        "  ".join(
            cell.ljust(width) if place < texts else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _narrow() -> Table:
    """Return a table for 80 columns, grouped by family and languages."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True)
    for heading in _NUMBERS:
        # Two short lines in place of a long one.
        table.add_column(heading.replace(" ", "\n").replace("parameters", "size"), justify="right")
    for group, found in groupby(CHECKPOINTS.values(), lambda each: (each.family, each.languages)):
        table.add_row(f"[bold]{', '.join(group)}[/bold]")
        for each in found:
            table.add_row(f" {each.name}", *_numbers(each))
    return table


def _numbers(checkpoint: Checkpoint) -> tuple[str, ...]:
    memory = checkpoint.gigabytes
    return (
        _count(checkpoint.parameters),
        f"{checkpoint.max_tokens:,}",
        *(f"{memory[dtype]:.1f}" if dtype in memory else "-" for dtype in _DTYPES),
    )


def _count(millions: int) -> str:
    return f"{millions / 1000:.1f} B" if millions >= 1000 else f"{millions} M"
