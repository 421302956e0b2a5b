"""The table of checkpoints, as `bge-rerank models` shows it."""

import re

import pytest
from rich.console import Console
from typer.testing import CliRunner

from bge_rerank_adapters.cli import app, model_table
from bge_rerank_adapters.settings.checkpoints import CHECKPOINTS


def table(width: int = 200) -> list[list[str]]:
    console = Console(width=width, record=True, file=None, quiet=False)
    with console.capture() as shown:
        model_table.run(console)
    # Columns are two spaces or more apart.
    rows = [re.split(r"\s{2,}", line.strip()) for line in shown.get().splitlines()]
    return [row for row in rows if row[0] in CHECKPOINTS]


def test_every_checkpoint_has_a_row():
    rows = {row[0]: row[1:] for row in table()}
    assert list(rows) == list(CHECKPOINTS)
    assert rows["BAAI/bge-reranker-v2-m3"] == [
        *("encoder", "multilingual", "568 M", "8,192"),
        *("2.3", "1.1", "1.4"),
    ]
    assert rows["BAAI/bge-reranker-v2.5-gemma2-lightweight"] == [
        *("lightweight", "multilingual", "9.2 B", "8,192"),
        *("37.0", "18.5", "-"),
    ]


@pytest.mark.parametrize("known", CHECKPOINTS.values(), ids=lambda each: each.name)
def test_memory_is_what_the_weights_take(known):
    memory = known.gigabytes
    assert memory["float16"] == memory["bfloat16"] == memory["float32"] / 2
    assert ("int8" in memory) == (known.family == "encoder")
    assert memory.get("int8", 0.0) < memory["float32"]
    assert known.embeddings < known.parameters


def test_the_command_shows_the_table():
    result = CliRunner().invoke(app, ["models"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0
    for known in CHECKPOINTS.values():
        assert known.name in result.output
        assert known.family in result.output
