"""Ray Data on a real cluster of two actors: equal to one process, and nothing lost or doubled."""

import contextlib
import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

pytest.importorskip("ray.data")
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from fsspec.implementations.local import LocalFileSystem
from pyarrow import fs

from bge_rerank_adapters import Reranker
from bge_rerank_adapters.calls.items import Item, read_jsonl
from bge_rerank_adapters.calls.limits import Limits
from bge_rerank_adapters.errors import CheckpointNotFoundError, RerankError, SettingsError
from bge_rerank_adapters.ray import explode, rerank_dataset, rerank_files, split_errors
from bge_rerank_adapters.ray.cluster import chunk_ranker, connected, share
from bge_rerank_adapters.ray.corpus import CorpusFiles, corpus_source, with_texts
from bge_rerank_adapters.ray.dataset import RowRanker
from bge_rerank_adapters.ray.files import PartRanker
from bge_rerank_adapters.ray.job import Counts, Folder
from bge_rerank_adapters.ray.parts import Part
from bge_rerank_adapters.ray.recipe import Recipe, Resources, check_concurrency, make_recipe
from bge_rerank_adapters.ray.rows import exploded_table
from bge_rerank_adapters.ray.storage import read_lines, read_rows
from bge_rerank_adapters.settings import EngineSettings
from tests.checkpoints import build_xlm_roberta, read_queries, read_sentences
from tests.logs import own_records
from tests.ray_clusters import start_cluster
from tests.test_cli import invoke
from tests.test_imports import PACKAGE, loaded_after, run_python
from tests.texts import DOCUMENTS, QUERY

# Actors that are killed start again, and each start may take minutes on a busy machine.
pytestmark = pytest.mark.timeout(1800)

TINY = EngineSettings(model="tiny", device="cpu", dtype="float32")
FAST = ("--device", "cpu", "--dtype", "float32")
COMPANY = 1e-5
QUERIES = list(read_queries().values())
SENTENCES = list(read_sentences().values())


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A cluster of this module's own; its address."""
    start_cluster(cpus=2, object_store_memory=200_000_000)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def questions(count: int, *, depth: int = 5) -> list[dict]:
    return [
        {
            "query_id": number,
            "query": QUERIES[number % len(QUERIES)],
            "documents": [SENTENCES[(number * 7 + place) % 500] for place in range(depth)],
        }
        for number in range(count)
    ]


def assert_ranked(row: dict, results: list[dict], engine: Reranker, *, top_k=None) -> None:
    """Compare a row's results with what the engine says in this process."""
    wanted = engine.logits(row["query"], row["documents"])
    assert len(results) == min(top_k or len(wanted), len(wanted))
    assert [each["logit"] for each in results] == pytest.approx(
        sorted(wanted, reverse=True)[: len(results)], abs=COMPANY
    )
    for each in results:
        assert each["logit"] == pytest.approx(wanted[each["index"]], abs=COMPANY)
        assert each["text"] == row["documents"][each["index"]]


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def actor_processes() -> list[int]:
    """Return the processes of this cluster's actors, those alone."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name = (folder / "cmdline").read_bytes()
            if name.startswith((b"ray::MapWorker", b"ray::_Ranker")) and _is_ours(folder):
                found.append(int(folder.name))
    return found


def _is_ours(folder: Path) -> bool:
    parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    grandparent = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1]
    return int(grandparent) == os.getpid()


def wait_until(done, *, limit_s: float = 600.0) -> None:
    end = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def run_here(job, parts, actors, resources, *, progress) -> None:
    """Do a job in this process: an actor takes seconds to start, and others have shown that."""
    ranker = PartRanker(job)
    for part in parts:
        ranker(asdict(part))


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")


def test_two_actors_say_what_one_process_says_row_for_row(cluster, reranker: Reranker):
    rows = questions(24)
    rows[7]["documents"] = []
    rows[11]["documents"] = ["twice", "once", "twice"]
    rows[13]["documents"] = ["a text", {"id": 5, "text": "an object"}]
    dataset = ray.data.from_items(rows, override_num_blocks=8)
    ranked = rerank_dataset(dataset, settings=TINY, top_k=3, concurrency=2, batch_size=4)
    found = {row["query_id"]: row for row in ranked.materialize().iter_rows()}
    assert sorted(found) == list(range(24))
    for row in rows:
        told = found[row["query_id"]]
        assert told.keys() == {"query_id", "query", "results", "error"}
        assert told["error"] is None
        assert [each["rank"] for each in told["results"]] == [1, 2, 3][: len(told["results"])]
        row["documents"] = [d["text"] if isinstance(d, dict) else d for d in row["documents"]]
        assert_ranked(row, told["results"], reranker, top_k=3)
    assert {each["index"]: each["id"] for each in found[13]["results"]} == {0: None, 1: "5"}
    assert [each["index"] for each in found[11]["results"]].count(0) == 1


def test_bad_rows_are_put_aside_and_the_others_exploded(cluster, reranker: Reranker):
    rows = [
        {"query_id": "a", "query": QUERY, "documents": [{"id": "7", "text": DOCUMENTS[0]}]},
        {"query_id": "b", "query": None, "documents": [{"id": "8", "text": "x"}]},
        {"query_id": "c", "query": QUERY, "documents": None},
        {"query_id": "d", "query": QUERY, "documents": [{"id": "9", "text": None}]},
        {"query_id": "e", "query": QUERY, "documents": [{"id": None, "text": "y"}] * 2},
    ]
    dataset = ray.data.from_arrow(pa.Table.from_pylist(rows))
    good, bad = split_errors(rerank_dataset(dataset, settings=TINY))
    errors = {row["query_id"]: row["error"] for row in bad.iter_rows()}
    assert errors == {
        "b": "query must be a text, got nothing.",
        "c": "documents must be a list, got nothing.",
        "d": "documents[0] must be a text or an object with a text, got dict.",
    }
    assert sorted(row["query_id"] for row in good.iter_rows()) == ["a", "e"]
    assert good.columns() == ["query_id", "query", "results"]
    flat = explode(good).take_all()
    assert [(row["query_id"], row["rank"], row["index"], row["id"]) for row in flat] == [
        *(("a", 1, 0, "7"), ("e", 1, 0, None), ("e", 2, 1, None))
    ]
    assert flat[0]["text"] == DOCUMENTS[0]
    assert flat[0]["score"] == pytest.approx(reranker.score(QUERY, DOCUMENTS[:1])[0], abs=1e-5)


def interrupted_recipes(monkeypatch: pytest.MonkeyPatch, module: str, *, happening) -> None:
    """Let something happen in the processes of a job's actors whenever they begin to rank.

    Args:
        monkeypatch: Ends it with the test.
        module: Of the job.
        happening: Called with the texts, and how often the actor has ranked before.
    """

    # Local, so that they are sent to the actors by value.
    class Interrupted:
        def __init__(self, engine):
            self.engine, self.calls = engine, 0

        def rerank_many(self, requests, **limits):
            requests = [*requests]
            happening([text for _, texts in requests for text in texts], self.calls)
            self.calls += 1
            return self.engine.rerank_many(requests, **limits)

    class InterruptedRecipe(Recipe):
        def load(self):
            return Interrupted(super().load())

    def make_interrupted(*args, **options):
        made = make_recipe(*args, **options)
        return InterruptedRecipe(*(getattr(made, each.name) for each in fields(made)))

    monkeypatch.setattr(f"bge_rerank_adapters.ray.{module}.make_recipe", make_interrupted)


@linux_only
def test_an_actor_that_is_killed_loses_and_doubles_nothing(
    cluster, tmp_path, monkeypatch, reranker: Reranker
):
    killed_one = tmp_path / "killed-one"

    def wait_for_the_kill(_, calls):
        while calls and not killed_one.exists():
            time.sleep(0.01)

    interrupted_recipes(monkeypatch, "dataset", happening=wait_for_the_kill)
    rows = questions(120, depth=6)
    dataset = ray.data.from_items(rows, override_num_blocks=15)
    ranked = rerank_dataset(dataset, settings=TINY, concurrency=2, batch_size=8)
    found, killed = [], None
    for row in ranked.iter_rows():
        if killed is None:
            killed = actor_processes()[0]
            os.kill(killed, signal.SIGKILL)
            killed_one.touch()
        found.append(row)
    assert len(found) == 120
    assert sorted(row["query_id"] for row in found) == list(range(120))
    for row in found[::16]:
        assert_ranked(rows[row["query_id"]], row["results"], reranker)
    wait_until(lambda: killed not in actor_processes())


def deadly_recipes(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Let the processes of a job's actors end whenever they rank a text of poison."""

    def die_of_poison(texts, _):
        if any("poison" in text for text in texts):
            os.kill(os.getpid(), signal.SIGKILL)

    interrupted_recipes(monkeypatch, module, happening=die_of_poison)


def with_poison(rows: list[dict], *places: int) -> list[dict]:
    return [
        row | {"documents": [*row["documents"], "poison"]} if place in places else row
        for place, row in enumerate(rows)
    ]


@linux_only
def test_rows_on_which_actors_die_each_time_are_put_aside(cluster, reranker, monkeypatch):
    deadly_recipes(monkeypatch, "dataset")
    rows = with_poison(questions(24), 5, 6)
    dataset = ray.data.from_items(rows, override_num_blocks=3)
    found = rerank_dataset(dataset, settings=TINY, batch_size=8).take_all()
    assert sorted(row["query_id"] for row in found) == list(range(24))
    for row in found:
        if row["query_id"] in (5, 6):
            assert "ended, each of 2 times" in row["error"]
            assert not len(row["results"])
        else:
            assert row["error"] is None
            assert_ranked(rows[row["query_id"]], row["results"], reranker)


@linux_only
def test_rows_of_files_on_which_actors_die_are_put_aside(cluster, tmp_path, monkeypatch):
    deadly_recipes(monkeypatch, "files")
    source, output = tmp_path / "in.jsonl", tmp_path / "out"
    rows = with_poison(questions(12), 3)
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = rerank_files(source, output, settings=TINY, part_bytes=2_000)
    assert (report.queries, report.put_aside) == (11, 1)
    (aside,) = [row for path in (output / "_put_aside").iterdir() for row in json_lines(path)]
    assert "ended, each of 2 times" in aside["error"]
    assert json.loads(aside["input"])["query_id"] == 3


JOB = """
import sys, ray
from bge_rerank_adapters.ray import rerank_files
from bge_rerank_adapters.settings import EngineSettings
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
settings = EngineSettings(model="tiny", device="cpu", dtype="float32")
rerank_files(*sys.argv[2:4], settings=settings, concurrency=2, part_bytes=int(sys.argv[4]))
"""
# It is not done before it is killed: each actor stops after three parts.
ENDLESS_JOB = (
    """
import threading
from dataclasses import fields
from bge_rerank_adapters.ray import files
from bge_rerank_adapters.ray.recipe import Recipe, make_recipe

class Stopping:
    def __init__(self, engine):
        self.engine, self.left = engine, 3

    def rerank_many(self, requests, **limits):
        if not self.left:
            threading.Event().wait()
        self.left -= 1
        return self.engine.rerank_many(requests, **limits)

class StoppingRecipe(Recipe):
    def load(self):
        return Stopping(super().load())

def make_stopping(*args, **options):
    made = make_recipe(*args, **options)
    return StoppingRecipe(*(getattr(made, each.name) for each in fields(made)))

files.make_recipe = make_stopping
"""
    + JOB
)


@linux_only
def test_a_job_that_is_killed_as_a_whole_finishes_the_rest_only(cluster, tmp_path, reranker):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    rows = questions(140, depth=5)
    for number, start in enumerate((0, 90)):
        table = pa.Table.from_pylist(rows[start : start + 90])
        pq.write_table(table, source / f"{number}.parquet", row_group_size=64)
    part_bytes = 8_000
    job = subprocess.Popen(
        [sys.executable, "-c", ENDLESS_JOB, cluster, str(source), str(output), str(part_bytes)],
        cwd=PACKAGE.parent,
    )
    done = output / "_done"
    wait_until(lambda: done.exists() and len(list(done.glob("*.json"))) >= 3)
    job.kill()
    job.wait()
    wait_until(lambda: not actor_processes())
    before = {path: path.stat() for path in output.glob("part-*")}
    report = rerank_files(source, output, settings=TINY, concurrency=2, part_bytes=part_bytes)
    assert 3 <= report.parts_before < report.parts
    assert report.parts_before <= len(before)
    assert (report.queries, report.pairs, report.put_aside) == (140, 700, 0)
    after = {path: path.stat() for path in sorted(output.glob("part-*"))}
    finished = {f"{path.stem}.json" for path in before}
    kept = [path for path in before if (after[path].st_ino == before[path].st_ino)]
    assert len(kept) >= report.parts_before, "what was finished is not done again"
    assert all(after[path].st_mtime_ns == before[path].st_mtime_ns for path in kept)
    assert finished <= {path.name for path in done.iterdir()}
    found = [row for path in after for row in pq.read_table(path).to_pylist()]
    assert [row["query_id"] for row in found] == list(range(140)), "in the input's order"
    for row in found[::30]:
        assert_ranked(rows[row["query_id"]], row["results"], reranker)
    assert {path.name for path in output.iterdir() if not path.name.startswith("part-")} == {
        *("_job.json", "_done")
    }
    again = rerank_files(source, output, settings=TINY, part_bytes=part_bytes)
    assert (again.parts_before, again.queries) == (report.parts, 140)
    with pytest.raises(SettingsError, match="is of a job that differs in top_k;"):
        rerank_files(source, output, settings=TINY, part_bytes=part_bytes, top_k=2)


@linux_only
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_actors_and_jobs_killed_at_random_lose_and_double_nothing(cluster, tmp_path, reranker):
    source, output = tmp_path / "in.jsonl", tmp_path / "out"
    write_lines(source, 1000)
    arguments = [sys.executable, "-c", JOB, cluster, str(source), str(output), "20000"]
    chance = random.Random(5)
    kills = 0
    for _ in range(4):
        job = subprocess.Popen(arguments, cwd=PACKAGE.parent)
        wait_until(lambda: len(actor_processes()) == 2)
        for _ in range(3):
            time.sleep(1 + 4 * chance.random())
            for actor in actor_processes()[:1]:
                os.kill(actor, signal.SIGKILL)
                kills += 1
        assert job.poll() is None, "the job was too short to be killed"
        job.kill()
        job.wait()
        wait_until(lambda: not actor_processes())
    assert kills >= 8
    report = rerank_files(source, output, settings=TINY, concurrency=2, part_bytes=20_000)
    assert 0 < report.parts_before < report.parts
    assert (report.queries, report.pairs, report.put_aside) == (1000, 5000, 20)
    found = [row for path in sorted(output.glob("part-*")) for row in json_lines(path)]
    assert [row["number"] for row in found] == list(range(1000))
    aside = [row for path in (output / "_put_aside").iterdir() for row in json_lines(path)]
    assert len(aside) == 20
    for row, asked in zip(found[::50], questions(1000)[::50], strict=True):
        assert_ranked(asked, row["results"], reranker)


def test_json_lines_with_ids_of_a_corpus_come_back_in_both_formats(
    cluster, tmp_path, reranker, monkeypatch
):
    corpus, source = tmp_path / "corpus.parquet", tmp_path / "in.jsonl"
    texts = {f"d{place}": text for place, text in enumerate(SENTENCES[:50])}
    pq.write_table(pa.table({"doc_id": list(texts), "text": list(texts.values())}), corpus)
    lines = [
        {"query_id": f"q{n}", "query": QUERIES[n], "document_ids": [f"d{n}", f"d{n + 1}"], "n": n}
        for n in range(20)
    ]
    lines[4]["document_ids"] = ["d1", "lost"]
    text = "".join(json.dumps(line) + "\n" for line in lines) + "nonsense\n"
    source.write_text(text)
    for kind in ("jsonl", "parquet"):
        report = rerank_files(
            *(source, tmp_path / kind),
            settings=TINY,
            corpus=corpus,
            output_format=kind,
            part_bytes=1000,
            concurrency=2,
        )
        assert (report.queries, report.pairs, report.put_aside) == (19, 38, 2)
        monkeypatch.setattr("bge_rerank_adapters.ray.files._run", run_here)
    parts = sorted((tmp_path / "jsonl").glob("part-*.jsonl"))
    found = [row for path in parts for row in json_lines(path)]
    assert [row["n"] for row in found] == [n for n in range(20) if n != 4]
    for row in found:
        documents = [texts[f"d{row['n']}"], texts[f"d{row['n'] + 1}"]]
        assert_ranked({"query": row["query"], "documents": documents}, row["results"], reranker)
        assert {each["id"] for each in row["results"]} == {f"d{row['n']}", f"d{row['n'] + 1}"}
    table = pq.read_table(sorted((tmp_path / "parquet").glob("part-*.parquet")))
    assert table.column_names == ["query_id", "query", "rest", "results"]
    assert table["query_id"].to_pylist() == [row["query_id"] for row in found]
    assert [json.loads(rest) for rest in table["rest"].to_pylist()] == [
        {"n": row["n"]} for row in found
    ]
    aside = [
        row
        for path in sorted((tmp_path / "jsonl" / "_put_aside").iterdir())
        for row in json_lines(path)
    ]
    assert [row["error"][:32] for row in aside] == [
        *("document lost is not in the corp", "not JSON: Expecting value: line ")
    ]
    for row in aside:
        assert row["file"] == str(source)
        assert text.encode()[row["byte"] :].startswith(row["input"].encode())


def write_lines(path: Path, count: int) -> None:
    with path.open("w") as file:
        for row in questions(count):
            number = row.pop("query_id")
            file.write(json.dumps({**row, "number": number, "user": "é"}) + "\n")
            if number % 50 == 9:
                file.write('{"query": 5, "documents": []}\n')


def ray_command(*arguments: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "bge_rerank_adapters", "rerank", *arguments],
        cwd=PACKAGE.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def test_the_command_says_the_same_with_a_cluster_as_without(cluster, tmp_path):
    source, small = tmp_path / "in.jsonl", build_xlm_roberta(tmp_path / "small")
    write_lines(source, 800)
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    common = ("--on-error", "skip", "--top-k", "4", "--quiet", "--model", str(small), *FAST)
    assert invoke("rerank", str(source), "-o", str(here), *common).exit_code == 3
    arguments = (str(source), "-o", str(there), *common, "--ray", cluster, "--actors", "2")
    # Killed once it has written something, and gone on with.
    first = ray_command(*arguments)
    wait_until(lambda: (there.exists() and there.stat().st_size > 0) or first.poll() is not None)
    first.kill()
    first.communicate()
    second = ray_command(*arguments, "--resume")
    out, err = second.communicate(timeout=600)
    assert (second.returncode, out, err) == (3, b"", b"")
    one, other = json_lines(here), json_lines(there)
    assert [row["number"] for row in other] == list(range(800))
    for mine, theirs in zip(one, other, strict=True):
        assert [each.keys() for each in mine.pop("results")] == [
            each.keys() for each in theirs["results"]
        ]
        assert theirs.pop("results")
        assert list(mine.items()) == list(theirs.items())
    for mine, theirs in zip(json_lines(here), json_lines(there), strict=True):
        for name in ("logit", "score"):
            assert [each[name] for each in mine["results"]] == pytest.approx(
                [each[name] for each in theirs["results"]], abs=COMPANY
            )
    bad = ".bad.jsonl"
    assert (tmp_path / f"there.jsonl{bad}").read_text() == (
        tmp_path / f"here.jsonl{bad}"
    ).read_text()
    assert not (tmp_path / "there.jsonl.progress").exists()


@linux_only
def test_a_killed_actor_of_the_command_does_its_chunk_again(cluster, reranker: Reranker):
    rows = questions(80, depth=5)
    chunks = [
        [*read_jsonl(json.dumps(row).encode() for row in rows[start : start + 10])]
        for start in range(0, 80, 10)
    ]
    found, killed = [], False
    limits = Limits()
    with chunk_ranker(TINY, limits=limits, write=Item.to_json, actors=2) as ranker:
        for chunk, lines in ranker.rank(iter(chunks)):
            assert len(lines) == len(chunk)
            found += [json.loads(line) for line in lines]
            if not killed:
                os.kill(random.Random(3).choice(actor_processes()), signal.SIGKILL)
                killed = True
    assert [row["query_id"] for row in found] == list(range(80))
    for row in found[::10]:
        assert_ranked(rows[row["query_id"]], row["results"], reranker)


def test_a_model_that_is_not_there_is_told_as_it_is_in_one_process(cluster, tmp_path):
    settings = EngineSettings(model="./missing")
    write_lines(tmp_path / "in.jsonl", 1)
    with pytest.raises(RerankError, match=r"ended early: .*NotFoundError: model '\./missing'"):
        rerank_files(tmp_path / "in.jsonl", tmp_path / "out", settings=settings)
    assert not [*(tmp_path / "out").glob("part-*")]
    limits = Limits()
    with (
        pytest.raises(CheckpointNotFoundError, match=r"\./missing"),
        chunk_ranker(settings, limits=limits, write=Item.to_json, actors=1),
    ):
        pass


def test_a_dataset_without_its_columns_is_refused_at_once(cluster):
    with pytest.raises(SettingsError, match="must have a column documents, it has query, texts"):
        rerank_dataset(ray.data.from_items([{"query": "q", "texts": ["a"]}]), settings=TINY)
    with pytest.raises(SettingsError, match="has a column error already"):
        rerank_dataset(
            ray.data.from_items([{"query": "q", "documents": ["a"], "error": 1}]), settings=TINY
        )
    with pytest.raises(SettingsError, match=r"dataset must be a ray\.data\.Dataset, got list"):
        rerank_dataset([{"query": "q", "documents": ["a"]}])


def test_a_cluster_with_no_processor_left_for_reading_is_told(cluster, tmp_path, caplog):
    pq.write_table(pa.table({"query": ["q"], "documents": [["a"]]}), tmp_path / "a.parquet")
    rerank_dataset(ray.data.read_parquet(str(tmp_path)), settings=TINY, concurrency=2)
    rerank_dataset(ray.data.read_parquet(str(tmp_path)), settings=TINY, concurrency=1)
    (told,) = own_records(caplog)
    assert told.getMessage().startswith("The actors take 2 of the cluster's 2 CPUs")


# What follows needs no cluster.


def test_who_starts_a_job_needs_no_torch():
    assert loaded_after("import bge_rerank_adapters.ray.cluster", ("torch", "transformers")) == []


def test_a_row_that_the_model_fails_on_does_not_take_its_neighbours_along(monkeypatch):
    from bge_rerank_adapters.engine.models.encoder.model import EncoderModel

    honest = EncoderModel.logits

    def logits(self, pairs):
        found = honest(self, pairs)
        return [
            float("nan") if len(pair) > 100 else x for pair, x in zip(pairs, found, strict=True)
        ]

    monkeypatch.setattr(EncoderModel, "logits", logits)
    documents = [["a"], ["word " * 200], ["b", "c"]]
    table = pa.table({"query": ["q"] * 3, "documents": documents, "n": [1, 2, 3]})
    recipe = make_recipe(None, TINY, top_k=None, score_threshold=None, resources=Resources())
    ranked = RowRanker(recipe, None, with_text=False)(table).to_pylist()
    assert [len(row["results"]) for row in ranked] == [1, 0, 2]
    assert "nan" in ranked[1]["error"]
    assert [row["error"] for row in ranked[::2]] == [None, None]
    assert ranked[0]["results"][0]["text"] is None
    assert [row["n"] for row in ranked] == [1, 2, 3]


def test_what_an_attempt_put_aside_before_it_was_killed_is_not_kept_beside_the_ranking(
    tmp_path, monkeypatch
):
    from bge_rerank_adapters.engine.models.encoder.model import EncoderModel

    monkeypatch.setattr("bge_rerank_adapters.ray.files._run", run_here)
    monkeypatch.setattr("bge_rerank_adapters.ray.files.Attempts", lambda: None)
    source, output = tmp_path / "in.jsonl", tmp_path / "out"
    write_lines(source, 4)
    with monkeypatch.context() as patch:
        patch.setattr(EncoderModel, "logits", lambda self, pairs: [float("nan")] * len(pairs))
        assert rerank_files(source, output, settings=TINY).put_aside == 4
    # Killed after its files and before its mark.
    for mark in (output / "_done").iterdir():
        mark.unlink()
    report = rerank_files(source, output, settings=TINY)
    assert (report.queries, report.put_aside) == (4, 0)
    assert not [*(output / "_put_aside").iterdir()]


class Remembering(LocalFileSystem):
    """A file system of fsspec that keeps listings, as s3fs does, while others write."""

    protocol = "remembering"
    listings: ClassVar[dict] = {}

    def ls(self, path, detail=False, **options):
        path = self._strip_protocol(path)
        if path not in self.listings:
            self.listings[path] = super().ls(path, detail=True, **options)
        return self.listings[path] if detail else [each["name"] for each in self.listings[path]]

    def info(self, path, **options):
        path = self._strip_protocol(path)
        known = self.listings.get(self._parent(path))
        if known is not None and path not in [each["name"] for each in known]:
            raise FileNotFoundError(path)
        return super().info(path, **options)

    def invalidate_cache(self, path=None):
        self.listings.clear()


def test_a_job_goes_on_where_fsspec_keeps_listings_that_are_outdated(tmp_path, monkeypatch):
    fsspec.register_implementation("remembering", Remembering, clobber=True)
    monkeypatch.setattr("bge_rerank_adapters.ray.files._run", run_here)
    monkeypatch.setattr("bge_rerank_adapters.ray.files.Attempts", lambda: None)
    source, output = tmp_path / "in.jsonl", tmp_path / "out"
    write_lines(source, 6)
    uris = [f"fsspec+remembering://{each}" for each in (source, output)]
    first = rerank_files(*uris, settings=TINY, part_bytes=1_000)
    marks = sorted((output / "_done").iterdir())
    for mark in marks[::2]:
        mark.unlink()
    again = rerank_files(*uris, settings=TINY, part_bytes=1_000)
    assert (again.parts, again.parts_before) == (first.parts, len(marks) // 2)
    assert again.queries == 6


def test_rows_may_name_their_documents(reranker: Reranker):
    recipe = make_recipe(None, TINY, top_k=1, score_threshold=None, resources=Resources())
    source = corpus_source({1: DOCUMENTS[0], "2": "nothing"})
    table = pa.table({"query": [QUERY, QUERY], "document_ids": [[2, 1], [3]]})
    first, second = RowRanker(recipe, source, with_text=True)(table).to_pylist()
    (result,) = first["results"]
    wanted = reranker.rerank(QUERY, ["nothing", DOCUMENTS[0]], top_k=1)[0]
    assert (result["id"], result["index"], result["text"]) == ("1", wanted.index, wanted.text)
    assert second["error"] == "document 3 is not in the corpus."


def test_an_empty_table_explodes_to_an_empty_one():
    recipe = make_recipe(None, TINY, top_k=None, score_threshold=None, resources=Resources())
    table = pa.table({"query": pa.array([], pa.string()), "documents": pa.array([], pa.string())})
    ranked = RowRanker(recipe, None, with_text=True)(table)
    flat = exploded_table(ranked)
    assert flat.num_rows == 0
    assert flat.column_names[0] == "query"
    assert flat.column_names[1:4] == ["rank", "index", "id"]
    with pytest.raises(SettingsError, match="has a column rank of its own"):
        exploded_table(ranked.append_column("rank", ranked["query"]))


@pytest.mark.parametrize("step", [1, 2, 3, 7, 64, 1000])
def test_however_a_file_is_cut_each_line_is_in_one_part(tmp_path, step):
    text = b'one\n\n{"a": 1}\r\n' + b"x" * 50 + b"\nlast without an end"
    path = tmp_path / "a.jsonl"
    path.write_bytes(text)
    found, places = [], []
    for start in range(0, len(text), step):
        stop = min(start + step, len(text))
        lines, where = read_lines(fs.LocalFileSystem(), str(path), start=start, stop=stop)
        found += lines
        places += where
        assert all(start <= place < stop for place in where)
    assert found == text.splitlines(keepends=True)
    assert [text[place:].startswith(line) for place, line in zip(places, found, strict=True)]


@pytest.mark.parametrize("start", [0, 1, 9, 10, 11, 24, 25])
def test_rows_of_parquet_begin_where_they_are_asked_to(tmp_path, start):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": list(range(25))}), path, row_group_size=10)
    batches = read_rows(fs.LocalFileSystem(), str(path), start=start)
    found = [n for batch in batches for n in batch["n"].to_pylist()]
    assert found == list(range(start, 25))


def test_a_corpus_is_copied_once_and_found_by_id(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "own"))
    (tmp_path / "own").mkdir()
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"doc_id": 1, "text": "one"}\n\n{"doc_id": "b", "text": "two"}\n')
    source = pickle.loads(pickle.dumps(corpus_source(path)))  # noqa: S301
    assert isinstance(source, CorpusFiles)
    row = {"query": "q", "document_ids": ["b", 1], "n": 3}
    for _ in range(2):
        assert with_texts(row, source.open()) == {
            "query": "q",
            "n": 3,
            "documents": [{"id": "b", "text": "two"}, {"id": "1", "text": "one"}],
        }
    (database,) = (tmp_path / "own").rglob("*.sqlite")
    assert database.parent.stat().st_mode & 0o077 == 0
    for ids, message in (
        ("b", "document_ids must be a list of ids"),
        (["no"], "document no is not in the corpus"),
    ):
        with pytest.raises(TypeError, match=message):
            with_texts({"query": "q", "document_ids": ids}, source.open())
    path.write_text('{"doc_id": 1, "text": "one"}\n{"doc_id": "1", "text": "two"}\n')
    with pytest.raises(SettingsError, match="Two documents of the corpus have one doc_id"):
        corpus_source(path).open()


@pytest.mark.parametrize(
    ("num_gpus", "device"), [(0, "cpu"), (0.5, "cuda"), (1, "cuda"), (2, ("cuda:0", "cuda:1"))]
)
def test_a_device_of_auto_is_what_the_actor_has(num_gpus, device):
    settings = EngineSettings(model="tiny")
    assert Resources(num_gpus=num_gpus).fit(settings).device == device
    assert Resources(num_gpus=num_gpus).fit(TINY).device == "cpu"


def test_a_token_reaches_the_actors_and_nothing_shows_it():
    settings = EngineSettings(model="tiny", token="hf_hidden")  # noqa: S106
    recipe = make_recipe(None, settings, top_k=3, score_threshold=None, resources=Resources())
    assert "hf_hidden" not in repr(recipe)
    assert "hf_hidden" not in str(recipe.settings.to_dict())
    carried = pickle.loads(pickle.dumps(recipe))  # noqa: S301
    assert carried.secret.text == "hf_hidden"


@pytest.mark.parametrize(
    ("nodes", "asked", "count", "cpus", "gpus"),
    [
        ([{"CPU": 2.0}], None, 1, 2, 0),
        ([{"CPU": 2.0}], 2, 2, 1, 0),
        ([{"CPU": 2.0}], 5, 5, 1, 0),
        ([{"CPU": 16.0}, {"CPU": 8.0}, {}], None, 2, 8, 0),
        ([{"CPU": 16.0}, {"CPU": 8.0}], 4, 4, 4, 0),
        ([{"CPU": 16.0, "GPU": 4.0}, {"CPU": 8.0}], None, 4, 1, 1),
    ],
)
def test_a_cluster_is_shared_out(nodes, asked, count, cpus, gpus):
    assert share(nodes, asked) == (count, Resources(num_gpus=gpus, num_cpus=cpus))


@pytest.mark.parametrize("wrong", [0, True, 1.5, "2", (2, 1), (0, 1), (1, 2, 3), None])
def test_a_wrong_concurrency_is_refused(wrong):
    assert check_concurrency((1, 4)) == (1, 4)
    with pytest.raises(SettingsError, match="concurrency must be"):
        check_concurrency(wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_gpus": -1}, "num_gpus must be a number of at least 0"),
        ({"num_cpus": "1"}, "num_cpus must be a number"),
        ({"num_gpus": 1.5}, "num_gpus above 1 must be a whole number"),
    ],
)
def test_wrong_resources_are_refused(wrong, message):
    with pytest.raises(SettingsError, match=message):
        Resources(**wrong)


def test_wrong_settings_are_refused():
    common = {"top_k": None, "score_threshold": None, "resources": Resources()}
    with pytest.raises(SettingsError, match="give one or the other"):
        make_recipe("tiny", TINY, **common)
    with pytest.raises(SettingsError, match="settings must be EngineSettings or None, got dict"):
        make_recipe(None, {}, **common)
    assert make_recipe("tiny", None, **common).settings.model == "tiny"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "has no files"),
        (["a.csv"], "is of an unknown format"),
        (["a.jsonl", "b.parquet"], "has both Parquet and JSONL"),
    ],
)
def test_files_that_cannot_be_read_are_refused(tmp_path, names, message):
    source = tmp_path / "in"
    source.mkdir()
    (source / "_SUCCESS").touch()
    for name in names:
        (source / name).touch()
    with pytest.raises(SettingsError, match=message):
        rerank_files(source, tmp_path / "out", settings=TINY)


def test_an_output_with_other_files_is_refused_without_a_cluster(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "bge_rerank_adapters.ray.files.Attempts", lambda: pytest.fail("needs a cluster")
    )
    (tmp_path / "in.jsonl").write_text("{}\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(SettingsError, match=r"no earlier job's, such as mine\.txt"):
        rerank_files(tmp_path / "in.jsonl", tmp_path / "out", settings=TINY)
    with pytest.raises(SettingsError, match="is within the input"):
        rerank_files(tmp_path, tmp_path / "out", settings=TINY)


def test_parquet_without_its_columns_is_refused_before_anything_is_written(tmp_path):
    pq.write_table(pa.table({"n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(SettingsError, match="must have the columns query and documents, it has n"):
        rerank_files(tmp_path / "a.parquet", tmp_path / "new", settings=TINY)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense", "host:x"])
def test_an_address_that_does_not_answer_is_told(address):
    with (
        pytest.raises(SettingsError, match=f"No Ray cluster answers at {address!r}"),
        connected(address),
    ):
        pass


def test_what_is_no_cluster_is_told_soon(monkeypatch):
    with monkeypatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as mute:
        patch.setattr("bge_rerank_adapters.ray.cluster._ANSWER_S", 0.2)
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        with (
            pytest.raises(SettingsError, match=f"No Ray cluster answers at '{address}'"),
            connected(address),
        ):
            pass
    monkeypatch.setattr("bge_rerank_adapters.ray.cluster._ANSWER_S", 60.0)
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    threading.Thread(target=server.handle_request, daemon=True).start()
    with (
        server.socket,
        pytest.raises(SettingsError, match="it is not a head node"),
        connected(f"127.0.0.1:{server.server_port}"),
    ):
        pass


def test_without_ray_the_extra_is_named_and_the_command_works_without_it(tmp_path):
    done = run_python("import bge_rerank_adapters.ray", blocked=("ray",))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: bge_rerank_adapters.ray needs ray[data]; ")
    assert last.endswith('run: pip install "bge-rerank-adapters[ray]"')
    (tmp_path / "in.jsonl").write_text(json.dumps({"query": QUERY, "documents": DOCUMENTS}) + "\n")
    code = (
        "import sys\n"
        "from bge_rerank_adapters.cli import main\n"
        f"sys.argv = ['x', 'rerank', {str(tmp_path / 'in.jsonl')!r}, *{FAST!r}, *MORE]\n"
        "sys.argv += ['--model', 'tiny']\n"
        "main()\n"
    )
    plain = run_python("MORE = []\n" + code, blocked=("ray", "pyarrow"))
    assert plain.returncode == 0, plain.stderr
    assert json.loads(plain.stdout)["query"] == QUERY
    asked = run_python("MORE = ['--ray', 'local']\n" + code, blocked=("ray",))
    assert asked.returncode == 1
    assert 'pip install "bge-rerank-adapters[ray]"' in asked.stderr


def test_actors_without_a_cluster_are_wrong_usage():
    assert invoke("rerank", "--actors", "2").exit_code == 2
    assert issubclass(SettingsError, RerankError)


def test_a_job_that_has_written_nothing_may_be_asked_otherwise(tmp_path):
    folder = Folder(fs.LocalFileSystem(), str(tmp_path / "out"))
    parts = [Part(0, "in.jsonl", 0, 10), Part(1, "in.jsonl", 10, 20)]
    assert folder.begin({"model": "mistyped"}, parts) == parts
    assert folder.begin({"model": "right"}, parts) == parts
    folder.finish_part(parts[0], Counts(1, 2, 3), {"part-000000.jsonl": b"{}\n"})
    assert folder.begin({"model": "right"}, parts) == parts[1:]
    assert (folder.counts(parts[0]), folder.counts(parts[1])) == (Counts(1, 2, 3), None)
    with pytest.raises(SettingsError, match="is of a job that differs in model;"):
        folder.begin({"model": "mistyped"}, parts)
    folder.finish()
    assert not [*(tmp_path / "out").rglob("_unfinished")]
    (tmp_path / "out" / "_job.json").write_text("{")
    with pytest.raises(SettingsError, match=r"_job\.json is damaged"):
        folder.begin({"model": "right"}, parts)
