"""Every Python example of the README runs, on the bundled checkpoint."""

import re
from pathlib import Path

import pytest

from bge_rerank_adapters.settings import EngineSettings
from bge_rerank_adapters.settings.table import Row, rows
from tests.rerank_servers import serving

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), flags=re.DOTALL)


def test_readme_shows_engine_and_every_host():
    assert len(BLOCKS) == 9


@pytest.mark.parametrize(
    "block",
    BLOCKS[:7],
    ids=["engine", "langchain", "llama_index", "milvus", "documents", "windows", "callers"],
)
def test_example_runs_and_puts_goethe_first(block, capsys):
    exec(block.replace("BAAI/bge-reranker-v2-m3", "tiny"), {"__name__": "example"})  # noqa: S102
    shown = capsys.readouterr().out
    assert "Goethe wrote Faust." in shown
    assert "It rains" not in shown.split("Goethe")[0]


def test_the_server_elsewhere_answers(capsys, reranker):
    for needed in ("httpx", "uvicorn", "fastapi", "langchain_core"):
        pytest.importorskip(needed)
    with serving(reranker, api_key="change-me") as url:
        exec(BLOCKS[7].replace("http://gpu-box:8000", url), {"__name__": "example"})  # noqa: S102
    assert capsys.readouterr().out.startswith("Goethe wrote Faust. 0.")


def test_the_experiment_runs(capsys, monkeypatch):
    monkeypatch.chdir(README.parent)
    exec(BLOCKS[8].replace("BAAI/bge-reranker-v2-m3", "tiny"), {"__name__": "example"})  # noqa: S102
    shown = capsys.readouterr().out
    assert "10 queries, 600 documents, 5 candidates" in shown
    assert "p_value" in shown


def line(row: Row) -> str:
    """A setting's line in the README."""
    default = f"{row.default:,}" if type(row.default) is int else f"`{row.default}`"
    default = f'`"{row.default}"`' if isinstance(row.default, str) else default
    return f"| `{row.name}` | {row.none or default} | {row.text} |"


def test_the_table_of_settings_is_that_of_the_code():
    table = [line(row) for row in rows(EngineSettings).values()]
    head = "| setting | default | |\n|---|---|---|"
    wanted = "\n".join([head, *table, ""])
    assert wanted in README.read_text("utf-8"), f"put this under Settings:\n{wanted}"
