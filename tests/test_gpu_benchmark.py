"""The benchmark of a GPU: the same program on a CPU, at its smallest size."""

import json
import math
import subprocess
import sys

import pytest
import torch

from benchmarks.gpu import correctness, peers, robustness, run
from benchmarks.gpu.models import checkpoint
from benchmarks.gpu.results import Report, Row
from benchmarks.gpu.setting import Setting, pairs_of, spread_lengths
from bge_rerank_adapters import Reranker

pytestmark = pytest.mark.timeout(300)

# What a machine that can reach nothing may lack.
LACKING = (
    *("sentence_transformers", "FlagEmbedding", "langchain_core", "llama_index", "pymilvus"),
    *("fastapi", "bm25s", "ir_measures", "openvino"),
)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting("cpu", True, tmp_path_factory.mktemp("gpu"))


def test_a_stage_runs_with_the_package_alone_and_tells_all_figures(setting):
    block = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {LACKING!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
from benchmarks.gpu.run import main
main(["--only", "base", "--device", "cpu", "--shape", "small", "--folder", {str(setting.folder)!r}])
"""
    done = subprocess.run(
        [sys.executable, "-c", block], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("row ")]
    rows = {row.name: row for row in (Row.from_json(line[4:]) for line in lines)}
    assert not [row for row in rows.values() if row.passed is False]
    for name in (
        *("base, a public record", "small, bfloat16, ours", "small, bfloat16, most memory"),
        *("small, bfloat16, share of the product rate", "small, bfloat16, 4 passages of 12 words"),
        *(f"small, bfloat16, {peers.STAND_IN}", "small, bfloat16, ours by the peer's"),
    ):
        assert rows[name].value > 0
    assert "24 pairs" in rows["small, bfloat16, ours"].note


@pytest.mark.parametrize("installed", [True, False])
def test_the_peers_give_the_same_logits(setting, monkeypatch, installed):
    if not installed:
        monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    else:
        pytest.importorskip("sentence_transformers")
    pairs = pairs_of(setting, 6)
    folder = checkpoint(setting, "base")
    name, score = peers.load_peer(folder, "cpu", torch.float32)
    assert (name == peers.STAND_IN) is not installed
    with Reranker(str(folder), device="cpu", dtype="float32") as reranker:
        wanted = [reranker.logits(query, [document])[0] for query, document in pairs]
    assert score(pairs, 4) == pytest.approx(wanted, abs=1e-4)


def test_what_can_go_wrong_on_a_device_is_checked(setting):
    rows = list(robustness.robustness(setting))
    assert [row.passed for row in rows] == [True] * 5, rows


def only_bert(monkeypatch):
    whole = correctness.cases
    monkeypatch.setattr(
        correctness, "cases", lambda setting: {"BERT": whole(setting)["encoder, BERT"]}
    )


def test_every_dtype_of_a_family_is_compared(setting, monkeypatch):
    only_bert(monkeypatch)
    rows = list(correctness.correctness(setting))
    assert [row.name for row in rows] == ["BERT, float32", "BERT, float16", "BERT, bfloat16"]
    assert [row.passed for row in rows] == [True] * 3, rows
    assert all("allowed" in row.note for row in rows)


@pytest.mark.parametrize("error", [0.5, math.nan])
def test_a_device_that_is_wrong_is_seen(setting, monkeypatch, error):
    only_bert(monkeypatch)
    given, calls = correctness.logits, []

    def shifted(*args, **options):
        found, path = given(*args, **options)
        calls.append(options)
        # The first is of the processor, in float32.
        return (found, path) if len(calls) == 1 else ([found[0] + error, *found[1:]], path)

    monkeypatch.setattr(correctness, "logits", shifted)
    row = next(correctness.correctness(setting))
    assert row.passed is False
    assert "allowed 1.0e-03" in row.note


def test_a_path_that_is_not_the_fastest_is_seen(setting, monkeypatch):
    only_bert(monkeypatch)
    monkeypatch.setattr(correctness, "expected_path", lambda *_: "flash, ahead")
    row = next(correctness.correctness(setting))
    assert row.passed is False
    assert "grouped_attention, waiting" in row.note
    assert "expected flash, ahead" in row.note


def test_all_families_and_layouts_are_among_the_cases(setting):
    names = " ".join(correctness.cases(setting))
    assert all(family in names for family in ("encoder", "decoder", "layerwise", "lightweight"))


def test_a_stage_that_is_cut_off_leaves_what_it_has_and_the_next_ones_are_told(tmp_path, capsys):
    arguments = ["--device", "cpu", "--shape", "small", "--output", str(tmp_path)]
    arguments += ["--stages", "device", "growth", "--stage-limit-s", "0.05", "--limit-s", "0.04"]
    assert run.main(arguments) == 1
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert "cut off" in written["stages"]["device"]["ended"]
    assert written["stages"]["growth"]["ended"].startswith("not begun")
    assert "cut off" in capsys.readouterr().out


def test_a_stage_that_fails_says_why_and_the_run_fails(tmp_path):
    arguments = ["--device", "cuda:77", "--shape", "small", "--output", str(tmp_path)]
    assert run.main([*arguments, "--stages", "growth"]) == 1
    ended = json.loads((tmp_path / "gpu.json").read_text())["stages"]["growth"]["ended"]
    assert ended.startswith("with code 1")
    assert "cuda:77" in ended


def test_results_are_complete_after_each_row(tmp_path):
    report = Report(tmp_path, {"device": "none"})
    report.add("first", Row("a figure", 1234.5, "pairs/s", True, "a | note"))
    report.add("first", Row("a check", passed=False, note="was 3"))
    text = (tmp_path / "gpu.md").read_text()
    assert "| a figure | 1,234 pairs/s, yes | a / note |" in text.replace("1,235", "1,234")
    assert "| a check | **no** | was 3 |" in text
    assert "cut off here" in text
    report.end("first", "after 3 s")
    assert "Ended: after 3 s" in (tmp_path / "gpu.md").read_text()
    assert report.failures == ["a check"]
    rows = json.loads((tmp_path / "gpu.json").read_text())["stages"]["first"]["rows"]
    assert [row["value"] for row in rows] == [1234.5, None]


def test_lengths_are_spread_about_their_mean_and_pairs_differ(setting):
    lengths = spread_lengths(1000, 140)
    assert sum(lengths) / 1000 == pytest.approx(140, abs=1)
    assert (min(lengths), max(lengths)) == (20, 260)
    assert lengths != sorted(lengths)
    assert len(set(pairs_of(setting, 10_000))) == 10_000
