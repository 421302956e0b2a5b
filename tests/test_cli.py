"""The command line, as a user calls it."""

import inspect
import json
import re
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from bge_rerank_adapters import Reranker
from bge_rerank_adapters.cli import app, verification
from bge_rerank_adapters.engine.checkpoints import published
from bge_rerank_adapters.engine.checkpoints.published import PublishedScores
from bge_rerank_adapters.engine.models.encoder.kit import KITS
from bge_rerank_adapters.settings import EngineSettings
from bge_rerank_adapters.settings.table import rows
from tests.checkpoints import XQUAD, build_xlm_roberta, read_queries, read_sentences
from tests.test_imports import PACKAGE, run_python
from tests.texts import DOCUMENTS, QUERY

PLAIN = {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "160"}
ENGINE_OPTIONS = {
    f"--{name.replace('_', '-')}" for name, row in rows(EngineSettings).items() if not row.secret
}
DEMO = """
from rich.console import Console
from bge_rerank_adapters.cli.demo import run
from bge_rerank_adapters.settings import EngineSettings
run(Console(width=160), EngineSettings(model="tiny", device="cpu"))
"""


def invoke(*arguments: str):
    return CliRunner().invoke(app, arguments, env=PLAIN)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bge_rerank_adapters", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=240,
        check=False,
        cwd=PACKAGE.parent,
    )


def plain(text: str) -> str:
    """Return text in one line, as no width of a terminal breaks it."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_help_names_the_commands(arguments):
    result = invoke(*arguments)
    for name in ("demo", "rerank", "evaluate", "models", "verify", "info"):
        assert name in result.output
    assert result.exit_code == (0 if arguments else 2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("demo", set()),
        ("verify", set()),
        ("rerank", {"--output", "--resume", "--quiet"}),
        ("evaluate", {"--run", "--depth", "--plots", "--json"}),
    ],
)
def test_help_names_the_options(name, options):
    result = invoke(name, "--help")
    assert result.exit_code == 0
    assert options | ENGINE_OPTIONS <= set(re.findall(r"--[\w-]+", plain(result.output)))


@pytest.mark.parametrize("name", ["demo", "verify", "rerank", "evaluate"])
def test_every_command_hands_the_engine_settings_over(name):
    arguments = (str(XQUAD),) if name == "evaluate" else ()
    known = ("--model", "BAAI/bge-reranker-base", "--compress-layers", "8", "--query-instruction")
    result = invoke(name, *arguments, *known, "", "--compress-ratio", "2")
    assert result.exit_code == 1
    assert "compress_ratio=2 is a setting of the lightweight family" in str(result.exception)
    result = invoke(name, *arguments, "--backend", "onnx")
    assert "backend must be one of 'native', 'flagembedding', got 'onnx'" in str(result.exception)


def test_options_are_read_as_the_settings_they_are():
    with_a_list = invoke("verify", "--model", "tiny", "--device", "cpu,gpu")
    assert "device 'gpu' is not known" in str(with_a_list.exception)
    no_number = invoke("verify", "--model", "tiny", "--pack-tokens", "many")
    assert no_number.exit_code == 2
    assert "must be a whole number, got 'many'" in plain(no_number.output)
    refused = invoke("verify", "--model", "tiny", "--device", "gpu", "--pack-tokens", "4096")
    assert "device 'gpu' is not known" in str(refused.exception)
    assert "--token" not in ENGINE_OPTIONS


def test_the_server_has_an_option_for_each_setting_that_is_not_left_to_its_environment():
    pytest.importorskip("fastapi")
    from bge_rerank_adapters.serve import ServerSettings

    shown = set(re.findall(r"--([\w-]+)", plain(invoke("serve", "--help").output)))
    left = {"api_key", "body_timeout_s", "max_reading_requests", "max_reading_bytes"}
    left |= {"strict", "cors_origins"}
    wanted = {name for name in rows(ServerSettings) if name.replace("_", "-") not in shown}
    assert wanted == left
    assert {each.removeprefix("--") for each in ENGINE_OPTIONS} <= shown


def test_the_servers_options_say_what_its_table_says():
    pytest.importorskip("fastapi")
    from bge_rerank_adapters.serve import ServerSettings

    server = next(each for each in app.registered_commands if each.callback.__name__ == "serve")
    options = inspect.signature(server.callback, eval_str=True).parameters
    said = {name: each.annotation.__metadata__[0].help for name, each in options.items()}
    table = rows(EngineSettings) | rows(ServerSettings)
    compared = [name for name in said if name in table and not name.startswith("engine")]
    assert {"model", "served_model", "timeout_s"} <= {*compared}
    for name in compared:
        row = table[name]
        default = "" if name not in rows(ServerSettings) else f"; else {row.none or row.default}"
        assert said[name].startswith(f"{row.text}{default}".replace("`", ""))


def test_the_engine_settings_change_what_is_computed(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"query": QUERY, "documents": DOCUMENTS}) + "\n")
    arguments = ("--query-max-length", "7", "--max-length", "20", "--passage-instruction", "So: ")
    done = invoke("rerank", str(source), "-q", "--model", "tiny", "--device", "cpu", *arguments)
    assert done.exit_code == 0, done.output
    told = [each["logit"] for each in json.loads(done.stdout)["results"]]
    settings = {"query_max_length": 7, "max_length": 20, "passage_instruction": "So: "}
    with Reranker("tiny", device="cpu", **settings) as engine:
        wanted = [each.logit for each in engine.rerank(QUERY, DOCUMENTS)]
    assert told == pytest.approx(wanted, abs=1e-4)


def test_demo_prints_tables_before_and_after():
    pytest.importorskip("langchain_core")
    pytest.importorskip("llama_index.core")
    result = invoke("demo", "--device", "cpu")
    assert result.exit_code == 0, result.output
    text = plain(result.output)
    assert text.count("Before: ") == 2
    assert text.count("After: ") == 3
    for wanted in ("rank", "score", "index", "text", QUERY, "Reranker(", "LangChain", "LlamaIndex"):
        assert wanted in text
    after = text[text.index("After: reranked") :]
    assert after.index("The Dartmouth Conference in 1956") < after.index("In 1950, Alan Turing")
    assert "not installed" not in text


@pytest.mark.parametrize(
    ("blocked", "missing", "kept"),
    [
        (("langchain_core", "langchain_classic"), {"langchain"}, {"After: LlamaIndex"}),
        (("llama_index",), {"llama-index"}, {"After: LangChain"}),
        (("langchain_core", "llama_index", "pydantic"), {"langchain", "llama-index"}, set()),
    ],
    ids=["langchain", "llama-index", "both"],
)
def test_demo_leaves_an_absent_host_out_and_names_its_extra(blocked, missing, kept):
    done = run_python(DEMO, blocked=blocked)
    assert done.returncode == 0, done.stderr
    text = plain(done.stdout)
    assert "The Dartmouth Conference in 1956" in text
    assert set(re.findall(r'pip install "bge-rerank-adapters\[([\w-]+)\]"', text)) == missing
    assert {part for part in ("After: LlamaIndex", "After: LangChain") if part in text} == kept


def test_demo_uses_the_core_retriever_where_langchain_classic_is_absent():
    pytest.importorskip("langchain_core")
    done = run_python(DEMO, blocked=("langchain_classic",))
    assert "After: LangChain, compressor.wrap(retriever)" in plain(done.stdout), done.stderr


def test_brackets_in_texts_and_names_are_printed_as_they_are(tmp_path):
    folder = build_xlm_roberta(tmp_path / "a[b] [/c]")
    result = invoke("demo", "--model", str(folder), "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "a[b]" in plain(result.output)
    assert "[/c]" in plain(result.output)


@pytest.mark.parametrize("name", ["./missing", "./missing [bold] [/x]"])
def test_a_missing_folder_is_told_in_one_line(name):
    done = command("demo", "--model", name)
    assert done.returncode == 1
    [line] = done.stderr.strip().splitlines()
    assert line.startswith(f"error: model '{name}' does not exist; give the folder")
    assert done.stdout == ""


@pytest.mark.parametrize("option", [("--device", "gpu"), ("--dtype", "float8")])
def test_a_bad_setting_is_told_in_one_line(option):
    done = command("verify", "--model", "BAAI/bge-reranker-base", *option)
    assert done.returncode == 1
    [line] = done.stderr.strip().splitlines()
    assert line.startswith(f"error: {option[0].removeprefix('--')} '{option[1]}' is not known")


def test_verify_without_weights_says_so(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("down")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    result = invoke("verify", "--device", "cpu")
    assert result.exit_code == 1
    text = plain(result.output)
    assert text.startswith(
        "Nothing was compared, since the weights are missing: model 'BAAI/bge-rer"
    )
    assert "could not be downloaded from the hub" in text


def test_verify_of_an_unknown_model_says_what_is_known():
    result = invoke("verify", "--model", "some/[model]")
    assert result.exit_code == 1
    text = plain(result.output)
    assert text.startswith("No scores were published for 'some/[model]'; there are some for ")
    assert {entry.model for entry in published.PUBLISHED_SCORES} <= set(
        re.findall(r"BAAI/[\w.-]*\w", text)
    )


@pytest.mark.parametrize(
    ("shift", "dtype", "passed"),
    [(0.0, "float32", True), (0.01, "float32", False), (0.01, "bfloat16", True)],
)
def test_verify_passes_and_fails(monkeypatch, reranker: Reranker, shift, dtype, passed):
    logits = reranker.logits(QUERY, DOCUMENTS)
    pairs = tuple((QUERY, document) for document in DOCUMENTS)
    expected = {1: logits[1], 2: logits[2] + shift}
    table = (PublishedScores("a/tiny", "the [bench]", "logit", 0.001, pairs, expected),)
    monkeypatch.setattr(verification, "PUBLISHED_SCORES", table)
    result = invoke("verify", "--model", "tiny", "--device", "cpu", "--dtype", dtype)
    text = plain(result.output)
    assert result.exit_code == (0 if passed else 1), text
    assert (text.count("pass"), text.count("FAIL")) == ((2, 0) if passed else (1, 1))
    assert f"tiny, cpu, {dtype}" in text
    assert "the [bench]" in text
    assert f"{logits[1]:.4f}" in text


def evaluate(*arguments: str):
    options = ("--model", "tiny", "--device", "cpu", "--queries", "3", "--depth", "4")
    return invoke("evaluate", str(XQUAD), *options, *arguments)


def test_evaluate_prints_a_table_of_all_models_and_dtypes():
    result = evaluate("--dtype", "float32", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    text = plain(result.output)
    for wanted in (
        "3 queries, 600 documents, 4 candidates",
        "BM25",
        "nDCG@10",
        "95 % interval",
        "helps",
    ):
        assert wanted in text
    assert "tiny float32" in text
    assert "tiny bfloat16" in text


def test_evaluate_fills_a_folder_from_a_run_and_continues(tmp_path):
    queries, sentences = [*read_queries()], [*read_sentences()]
    run = tmp_path / "first.trec"
    run.write_text("".join(f"{query} Q0 {sentences[0]} 1 1.0 x\n" for query in queries))
    arguments = ("--run", str(run), "-o", str(tmp_path / "out"), "--json", "--plots")
    first = evaluate(*arguments)
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout)[1]["engine"] == "tiny"
    assert json.loads(evaluate(*arguments).stdout) == json.loads(first.stdout), "times too"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"report.json", "per-query.jsonl", "tiny.trec", "depth.png"} < names
    told = first.stderr.split(f"Written to {tmp_path / 'out'}:")[1].split()
    assert set(told) == names - {"tiny.scores.jsonl", "tiny.times.jsonl"}


def test_brackets_in_names_are_shown_as_they_are(tmp_path):
    folder, collection = build_xlm_roberta(tmp_path / "a[b] [/c]"), tmp_path / "xquad[bold]"
    shutil.copytree(XQUAD, collection)
    options = ("--device", "cpu", "--queries", "2", "--depth", "2")
    result = invoke("evaluate", str(collection), "--model", str(folder), *options)
    assert result.exit_code == 0, result.output
    assert "xquad[bold]: 2 queries" in plain(result.output)
    assert "[/c]" in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("evaluate", "nowhere"), 1, "corpus.jsonl cannot be read"),
        (("evaluate", str(XQUAD), "--plots"), 2, "needs --output"),
        (("evaluate", str(XQUAD), "--language", "latin"), 1, "has no stemmer"),
    ],
)
def test_wrong_evaluations_are_told(arguments, code, message):
    done = command(*arguments)
    assert done.returncode == code
    assert message in plain(done.stderr)
    assert done.stdout == ""


def test_info_names_devices_dtypes_and_what_auto_takes():
    result = invoke("info")
    assert result.exit_code == 0, result.output
    text = plain(result.output)
    for wanted in ('device "auto": ', 'dtype "auto": ', "float32", "bfloat16", "picked", "torch"):
        assert wanted in text
    for kit in KITS:
        assert re.search(rf"│ {kit.label} +│ (used|not used: )", text)
    assert "│ used " in text
    assert text.count("picked") == 2, "one dtype, and the rule"


def test_no_colour_where_it_is_not_wanted(tmp_path):
    done = command("info")
    assert "\x1b" not in done.stdout
