"""Every code block of README and docs runs, on the bundled checkpoint.

The Python blocks of a page run one after the other, in one namespace, in a folder of their own.
Names of BAAI's checkpoints stand for small ones there, and `http://gpu-box:8000` for a server. A
block in the language `output` is what the block before it prints; numbers may differ by 0.05. What
cannot run anywhere has `<!-- not run: why -->` on the line before it.
"""

import json
import logging
import re
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from bge_rerank_adapters import Reranker
from bge_rerank_adapters.settings import EngineSettings
from bge_rerank_adapters.settings.table import Row, rows
from tests.checkpoints import XQUAD
from tests.doc_blocks import API_KEY, ROOT, SERVER, Block, blocks, check_command, commands, pages
from tests.family_checkpoints import build_family
from tests.rerank_servers import serving
from tests.test_cli import invoke

SHELLS = {"sh", "bash", "shell", "console"}
READERS: dict[str, Callable[[str], object]] = {
    "json": json.loads,
    "jsonl": lambda text: [json.loads(line) for line in text.splitlines()],
    "yaml": lambda text: list(yaml.safe_load_all(text)),
    "toml": tomllib.loads,
}
# Shown only: plain text, directives of the site, and other systems' languages and files.
SHOWN = {"text", "diff", "nginx", "java", "js", "ts", "go", "rust", "dockerfile", "ini", "bibtex"}
FAMILIES = {
    "BAAI/bge-reranker-v2-gemma": "decoder",
    "BAAI/bge-reranker-v2-minicpm-layerwise": "layerwise",
    "BAAI/bge-reranker-v2.5-gemma2-lightweight": "lightweight",
}
NUMBER = re.compile(r"\d+\.\d+")
TOLERANCE = 0.05
README_LINES = 150

BLOCKS = {page: blocks(page) for page in pages()}
ALL = [block for found in BLOCKS.values() for block in found]


def in_language(*languages: str) -> list[Block]:
    return [block for block in ALL if block.language in languages and block.run]


@pytest.fixture(scope="module")
def server(reranker: Reranker) -> Iterator[str]:
    for needed in ("httpx", "uvicorn", "fastapi"):
        pytest.importorskip(needed)
    with serving(reranker, api_key=API_KEY) as url:
        yield url


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """The folder that examples run in, with the files that they speak of."""
    shutil.copytree(XQUAD, tmp_path / "my-collection")
    row = {"query_id": "q1", "query": "Who wrote Faust?", "documents": ["Goethe wrote Faust."]}
    (tmp_path / "questions").mkdir()
    for path in ("questions.jsonl", "questions/part.jsonl"):
        (tmp_path / path).write_text(json.dumps(row) + "\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    loggers = [logging.getLogger(name) for name in (None, "bge_rerank_adapters")]
    before = [(each.level, each.handlers[:]) for each in loggers]
    yield tmp_path
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.fixture
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    from tests.ray_clusters import start_cluster

    start_cluster(cpus=2)
    yield
    ray.shutdown()


def with_small_models(text: str, folder: Path) -> str:
    """Return an example with small checkpoints in place of the hub's."""
    for name, family in FAMILIES.items():
        if f'"{name}"' in text:
            built = build_family(folder / family, family)
            text = text.replace(f'"{name}"', repr(str(built)))
    return re.sub(r'"BAAI/[^"]+"', '"tiny"', text)


def assert_shows(shown: str, wanted: str) -> None:
    """Compare outputs: words one for one, whatever the spaces, and numbers nearly."""
    assert NUMBER.sub("#", shown).split() == NUMBER.sub("#", wanted).split()
    told = [float(each) for each in NUMBER.findall(wanted)]
    assert [float(each) for each in NUMBER.findall(shown)] == pytest.approx(told, abs=TOLERANCE)


@pytest.mark.parametrize(
    "page",
    [page for page, found in BLOCKS.items() if any(b.language == "python" for b in found)],
    ids=lambda page: page.stem,
)
def test_the_python_of_a_page_runs(page, folder, capsys, request):
    found = [block for block in BLOCKS[page] if block.language == "python" and block.run]
    if any("import ray" in block.text for block in found):
        request.getfixturevalue("cluster")
    namespace: dict[str, object] = {"__name__": "example"}
    for block in found:
        text = with_small_models(block.text, folder)
        if SERVER in text:
            text = text.replace(SERVER, request.getfixturevalue("server"))
        capsys.readouterr()
        exec(Block(page, block.line, "python", text).code, namespace)  # noqa: S102
        shown = capsys.readouterr().out
        assert "It rains" not in shown.split("Goethe")[0], f"{block}: Goethe is not first"
        if block.output is not None:
            assert_shows(shown, block.output)


@pytest.mark.parametrize("block", in_language(*SHELLS), ids=str)
def test_a_command_can_run(block, folder, request):
    url = request.getfixturevalue("server") if "curl" in block.text else ""
    found = commands(block.text)
    assert found
    for words in found:
        check_command(words, url)
    if block.output is not None:
        assert_shows(invoke(*found[-1][1:]).stdout, block.output)


@pytest.mark.parametrize("block", in_language(*READERS), ids=str)
def test_data_can_be_read(block):
    assert READERS[block.language](block.text)


def test_no_block_is_of_an_unknown_language():
    known = {"python", *SHELLS, *READERS, *SHOWN}
    found = {block.language for block in ALL if not block.language.startswith("{")}
    assert found <= known


def test_every_host_has_an_example():
    text = {page.stem: "".join(b.text for b in found) for page, found in BLOCKS.items()}
    for name in ("BGEDocumentCompressor", "BGENodePostprocessor", "BGERerankFunction"):
        assert name in text["README"]


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text("utf-8")
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    assert text.count("\n") <= README_LINES
    assert len(links) > 20
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


def line(row: Row) -> str:
    """A setting's line in the table of settings."""
    default = f"{row.default:,}" if type(row.default) is int else f"`{row.default}`"
    default = f'`"{row.default}"`' if isinstance(row.default, str) else default
    return f"| `{row.name}` | {row.none or default} | {row.text} |"


def test_the_table_of_settings_is_that_of_the_code():
    table = [line(row) for row in rows(EngineSettings).values()]
    head = "| setting | default | |\n|---|---|---|"
    wanted = "\n".join([head, *table, ""])
    assert wanted in (ROOT / "docs" / "settings.md").read_text("utf-8"), f"put there:\n{wanted}"
