"""`bge-rerank rerank`, as a shell calls it: streams, bad lines, and runs that are killed."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from bge_rerank_adapters import Reranker
from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.evaluation import read_run
from tests.checkpoints import XQUAD, build_xlm_roberta, read_queries, read_sentences
from tests.test_cli import command, invoke, plain
from tests.test_imports import PACKAGE
from tests.texts import DOCUMENTS, QUERY

FAST = ("--device", "cpu", "--dtype", "float32")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    """A model of three narrow layers, so that a run is all reading and writing."""
    return str(build_xlm_roberta(tmp_path_factory.mktemp("small")))


def rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def piped(text: str | bytes, *arguments: str, model: str = "tiny"):
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "bge_rerank_adapters",
            "rerank",
            "--model",
            model,
            *FAST,
            *arguments,
        ],
        input=text.encode() if isinstance(text, str) else text,
        capture_output=True,
        timeout=240,
        check=False,
        cwd=PACKAGE.parent,
    )


def line(query=QUERY, documents=DOCUMENTS, **extra) -> str:
    return json.dumps({"query": query, "documents": documents, **extra}) + "\n"


def test_a_stream_in_and_a_stream_out_with_all_fields_kept(reranker: Reranker):
    documents = [DOCUMENTS[0], {"text": DOCUMENTS[1], "id": 7, "tags": ["é"]}, *DOCUMENTS[2:]]
    done = piped("\n" + line(documents=documents, user="me") + line("", []), "--top-k", "3")
    assert done.returncode == 0, done.stderr
    first, second = rows(done.stdout.decode())
    wanted = reranker.rerank(QUERY, DOCUMENTS, top_k=3)
    assert (first["query"], first["user"]) == (QUERY, "me")
    assert [each["index"] for each in first["results"]] == [each.index for each in wanted]
    for told, result in zip(first["results"], wanted, strict=True):
        assert told["text"] == result.text
        assert told["score"] == pytest.approx(result.score, abs=1e-5)
        assert told["logit"] == pytest.approx(result.logit, abs=1e-4)
        assert ("tags" in told) == (result.index == 1)
    assert second == {"query": "", "results": []}
    assert done.stderr.decode().splitlines()[-1] == "2 queries, 4 pairs."
    assert b"\x1b" not in done.stderr, "no colours or bars where nobody watches"


def test_quiet_leaves_standard_error_empty():
    done = piped(line(), "--quiet", "--score-threshold", "1.0")
    assert (done.returncode, done.stderr) == (0, b"")
    assert rows(done.stdout.decode())[0]["results"] == []


BAD = {
    2: ("nonsense", "not JSON"),
    3: ('{"query": 5, "documents": []}', "query must be a text, got int"),
    4: ('{"query": "q"}', "documents must be a list, got nothing"),
    5: ('{"query": "q", "documents": ["a", 5]}', "documents[1] must be a text"),
    6: ("[1]", "must be an object with query and documents, got list"),
    7: ("[" * 100_000, "not JSON"),
}


def bad_input() -> bytes:
    lines = [line(), *(text + "\n" for text, _ in BAD.values())]
    return "".join(lines).encode() + b'{"query": "\xff"}\n' + line(number=9).encode()


def test_a_bad_line_stops_the_run_and_is_told_by_number():
    done = piped(bad_input())
    assert done.returncode == 1
    assert done.stderr.decode().startswith("error: line 2: not JSON")
    assert 'each line is an object such as {"query": "..."' in done.stderr.decode()
    assert "--on-error skip" in done.stderr.decode()
    assert len(rows(done.stdout.decode())) == 1, "what came before is written"


def test_bad_lines_are_put_aside_and_the_rest_is_done(tmp_path):
    output = tmp_path / "out.jsonl"
    (tmp_path / "in.jsonl").write_bytes(bad_input())
    result = invoke(
        *("rerank", str(tmp_path / "in.jsonl"), "-o", str(output), "--on-error", "skip"),
        *("--model", "tiny", *FAST),
    )
    assert result.exit_code == 3
    first, last = rows(output.read_text())
    assert (last["number"], last["results"]) == (9, first["results"])
    aside = rows((tmp_path / "out.jsonl.bad.jsonl").read_text())
    assert [each["line"] for each in aside] == [*BAD, 8]
    for each in aside[:-1]:
        text, reason = BAD[each["line"]]
        assert reason in each["error"]
        assert each["input"] == text
        assert f"line {each['line']}: {reason}" in plain(result.output)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("in.jsonl", "out.jsonl", "out.jsonl.bad.jsonl", "out.jsonl.settings.json")
    }


def test_a_query_that_the_model_fails_on_does_not_take_its_neighbours_along(monkeypatch, tmp_path):
    from bge_rerank_adapters.engine.models.encoder.model import EncoderModel

    honest = EncoderModel.logits

    def logits(self, pairs):
        found = honest(self, pairs)
        return [
            float("nan") if len(pair) > 100 else x for pair, x in zip(pairs, found, strict=True)
        ]

    monkeypatch.setattr(EncoderModel, "logits", logits)
    failing = line(documents=["word " * 200])
    (tmp_path / "in.jsonl").write_text(line(n=1) + failing + line(n=3))
    output = tmp_path / "out.jsonl"
    arguments = ("rerank", str(tmp_path / "in.jsonl"), "-o", str(output), "--model", "tiny", *FAST)
    assert invoke(*arguments, "--on-error", "skip").exit_code == 3
    assert [each["n"] for each in rows(output.read_text())] == [1, 3]
    (aside,) = rows((tmp_path / "out.jsonl.bad.jsonl").read_text())
    assert aside["line"] == 2
    assert "nan" in aside["error"]
    assert aside["input"] + "\n" == failing


def test_lone_surrogates_come_back_as_they_went_in():
    done = piped(line(documents=["a \ud800 b"]))
    assert rows(done.stdout.decode())[0]["results"][0]["text"] == "a \ud800 b"


def test_windows_tell_their_span():
    text = "word " * 300 + "Nikola Tesla died in 1943."
    arguments = ("--long-documents", "window", "--window-tokens", "64")
    (row,) = rows(piped(line("When did Tesla die?", [text]), *arguments).stdout.decode())
    start, end = row["results"][0]["span"]
    assert text[start:end].endswith("1943.")


def write_run(path, queries: int, depth: int) -> None:
    texts = list(read_sentences())
    lines = [
        f"{query} Q0 {texts[(number * 7 + place) % len(texts)]} {place + 1} {50 - place} bm25\n"
        for number, query in enumerate([*read_queries()][:queries])
        for place in range(depth)
    ]
    path.write_text("".join(lines))


def test_a_trec_run_comes_back_in_another_order(tmp_path, reranker: Reranker):
    write_run(tmp_path / "bm25.trec", 5, 6)
    output = tmp_path / "out.trec"
    done = command(
        *("rerank", str(tmp_path / "bm25.trec"), "--collection", str(XQUAD), "-o", str(output)),
        *("--model", "tiny", *FAST),
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    before, after = read_run(tmp_path / "bm25.trec"), read_run(output)
    assert before.keys() == after.keys()
    for query, found in before.items():
        names = list(found)
        ranked = reranker.rerank(read_queries()[query], [read_sentences()[name] for name in names])
        assert list(after[query]) == [names[each.index] for each in ranked]


def test_a_trec_run_can_become_jsonl_and_jsonl_a_trec_run(tmp_path):
    write_run(tmp_path / "bm25.trec", 2, 3)
    run = (tmp_path / "bm25.trec").read_text()
    (first, _) = rows(piped(run, "--collection", str(XQUAD), "--format", "jsonl").stdout.decode())
    assert first["query"] == read_queries()[first["id"]]
    assert {each["text"] for each in first["results"]} <= set(read_sentences().values())
    text = line(documents=[{"text": "a", "id": "my doc"}, "b"], id="q 1") + line(documents=["a"])
    text += line(documents=["a"], query_id="third")
    done = piped(text, "--format", "trec")
    columns = [each.split()[:4] for each in done.stdout.decode().splitlines()]
    assert {(query, name) for query, _, name, _ in columns} == {
        *(("q_1", "my_doc"), ("q_1", "1"), ("2", "0"), ("third", "0"))
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q1 Q0 d\n", "line 1: must be query, Q0, document"),
        ("nobody Q0 en-s0 1 2.0 t\n", "line 1: query nobody is not in queries.jsonl"),
        ("{0} Q0 nothing 1 2.0 t\n", "line 1: document nothing of query"),
        ("{0} Q0 en-s0 1 2 t\n{1} Q0 en-s0 1 2 t\n{0} Q0 en-s1 1 2 t\n", "line 3: query"),
    ],
)
def test_bad_runs_are_told_by_line(text, message):
    run = text.format(*read_queries())
    done = piped(run, "--collection", str(XQUAD))
    assert done.returncode == 1
    assert message in done.stderr.decode()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.jsonl",), "missing.jsonl cannot be read: No such file or directory; give a fi"),
        (("--window-tokens", "9"), "--window-tokens had no effect"),
        (("--collection", "nowhere"), "corpus.jsonl cannot be read"),
    ],
)
def test_wrong_options_are_told_in_one_line(arguments, message):
    done = piped("", *arguments)
    assert done.returncode == 1
    (told,) = done.stderr.decode().splitlines()
    assert message in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--resume",), "needs --output"),
        (("--top-k", "0"), "--top-k: must be at least 1, got 0"),
        (("--score-threshold", "2"), "--score-threshold: must be from 0 to 1"),
    ],
)
def test_wrong_usage_has_an_exit_code_of_its_own(arguments, message):
    result = invoke("rerank", *arguments)
    assert result.exit_code == 2
    assert message in plain(result.output)


def into(output, source, *arguments):
    """Rerank in this process with the small model, from file to file."""
    return invoke("rerank", str(source), "-o", str(output), "--model", "tiny", *FAST, *arguments)


@pytest.mark.parametrize("suffix", ["", ".bad.jsonl"])
def test_an_input_is_never_written_over(tmp_path, suffix):
    source = tmp_path / f"s.jsonl{suffix}"
    source.write_text(line())
    result = into(tmp_path / "s.jsonl", source)
    assert result.exit_code == 1
    assert "is read by this run" in str(result.exception)
    link = tmp_path / "link.jsonl"
    link.symlink_to(source)
    assert suffix or into(link, source).exit_code == 1
    assert source.read_text() == line()


def test_neither_standard_input_nor_a_corpus_is_written_over(tmp_path):
    source = tmp_path / "s.jsonl"
    source.write_text(line())
    with source.open("rb") as stream:
        done = subprocess.run(
            [sys.executable, "-m", "bge_rerank_adapters", "rerank", "-o", str(source), *FAST],
            stdin=stream,
            capture_output=True,
            check=False,
            cwd=PACKAGE.parent,
        )
    assert b"is read by this run" in done.stderr
    assert source.read_text() == line()
    folder = tmp_path / "folder"
    shutil.copytree(XQUAD, folder)
    write_run(tmp_path / "a.trec", 1, 2)
    result = into(folder / "corpus.jsonl", tmp_path / "a.trec", "--collection", str(folder))
    assert "is read by this run" in str(result.exception)
    assert (folder / "corpus.jsonl").read_bytes() == (XQUAD / "corpus.jsonl").read_bytes()


def test_an_earlier_output_outlives_a_model_that_is_not_there(tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line())
    output.write_text("kept")
    result = invoke("rerank", str(source), "-o", str(output), "--model", "./missing", *FAST)
    assert result.exit_code == 1
    assert output.read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}


@pytest.mark.parametrize(
    "ids", [["a", "a"], ["a b", "a_b"], [1, "1"]], ids=["equal", "once joined", "as text"]
)
def test_documents_that_a_run_cannot_tell_apart_are_bad(tmp_path, ids):
    documents = [{"text": "one", "id": ids[0]}, {"text": "two", "id": ids[1]}]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.trec"
    source.write_text(line(documents=documents) + line(documents=["a"]))
    result = into(output, source, "--format", "trec", "--on-error", "skip")
    assert result.exit_code == 3
    assert [each.split()[0] for each in output.read_text().splitlines()] == ["2"]
    (aside,) = rows((tmp_path / "out.trec.bad.jsonl").read_text())
    assert "both documents[0] and documents[1]" in aside["error"]
    assert aside["input"] + "\n" == line(documents=documents)


def test_an_empty_id_is_none_and_a_place_may_meet_a_real_one(tmp_path):
    documents = [{"text": "one", "id": None}, {"text": "two", "id": ""}, {"text": "3", "id": "x"}]
    text = line(documents=documents, id=None) + line(documents=["a", {"text": "b", "id": 0}])
    done = piped(text, "--format", "trec", "--on-error", "skip")
    assert done.returncode == 3
    found = {tuple(each.split()[:3:2]) for each in done.stdout.decode().splitlines()}
    assert found == {("1", "0"), ("1", "1"), ("1", "x")}
    same = piped(line(id="q") + line(id="q"), "--format", "trec")
    assert "a TREC run calls this query q, as that of line 1" in same.stderr.decode()


@pytest.mark.parametrize("changed", ["input", "collection"])
def test_a_run_goes_on_with_its_own_input_alone(tmp_path, changed):
    first, other = tmp_path / "a", tmp_path / "b"
    shutil.copytree(XQUAD, other)
    write_run(first, 1, 2)
    with first.open("a") as file:
        file.write("broken\n")
    output = tmp_path / "out.trec"
    assert into(output, first, "--collection", str(XQUAD)).exit_code == 1
    source, folder = first, XQUAD
    if changed == "input":
        source = shutil.copy(first, tmp_path / "c")
    else:
        folder = other
    result = into(output, source, "--collection", str(folder), "--resume")
    assert f"differs in {changed};" in str(result.exception)


def test_a_broken_line_within_a_query_parts_nothing(tmp_path):
    query = next(iter(read_queries()))
    names = list(read_sentences())[:3]
    lines = [f"{query} Q0 {name} 1 2.0 t" for name in names]
    (tmp_path / "in.trec").write_text("\n".join([lines[0], "broken", *lines[1:]]))
    output = tmp_path / "out.trec"
    result = into(output, tmp_path / "in.trec", "--collection", str(XQUAD), "--on-error", "skip")
    assert result.exit_code == 3
    assert set(read_run(output)[query]) == set(names)
    (aside,) = rows((tmp_path / "out.trec.bad.jsonl").read_text())
    assert (aside["line"], aside["input"]) == (2, "broken")


def test_what_is_put_aside_of_a_run_can_be_given_again(tmp_path):
    text = "nobody Q0 en-s0 1 2.0 t\nnobody Q0 en-s1 2 1.0 t"
    (tmp_path / "in.trec").write_text(text)
    output = tmp_path / "out.trec"
    into(output, tmp_path / "in.trec", "--collection", str(XQUAD), "--on-error", "skip")
    (aside,) = rows((tmp_path / "out.trec.bad.jsonl").read_text())
    assert aside["input"] == text


def test_an_earlier_ranking_is_not_taken_for_this_one():
    document = {"text": "short", "score": 9.5, "logit": 1, "truncated": True, "span": [0, 1]}
    again = {"text": "other", "score": 0.5, "retrieval_score": 12.0}
    (row,) = rows(piped(line(documents=[document, again])).stdout.decode())
    first, second = sorted(row["results"], key=lambda each: each["index"])
    assert (first["retrieval_score"], second["retrieval_score"]) == (9.5, 12.0)
    assert first.keys() == {"text", "score", "logit", "index", "retrieval_score"}
    assert 0 <= first["score"] <= 1


def test_an_output_that_cannot_be_is_told(tmp_path):
    (tmp_path / "in.jsonl").write_text(line())
    missing = into(tmp_path / "no" / "out.jsonl", tmp_path / "in.jsonl")
    assert isinstance(missing.exception, SettingsError)
    assert "there is no folder" in str(missing.exception)
    folder = into(tmp_path, tmp_path / "in.jsonl")
    assert "is a folder" in str(folder.exception)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"asked": {}, "mark": {"x": 1}}', "\udcff"])
def test_a_damaged_journal_is_told(tmp_path, text):
    (tmp_path / "in.jsonl").write_text(line())
    journal = tmp_path / "out.jsonl.progress"
    journal.write_bytes(text.encode("utf-8", "surrogateescape"))
    result = into(tmp_path / "out.jsonl", tmp_path / "in.jsonl", "--resume")
    assert isinstance(result.exception, SettingsError)
    assert "out.jsonl.progress is damaged" in str(result.exception)


def test_a_run_without_its_collection_is_told_what_it_needs():
    done = piped("q1 Q0 d1 1 2.0 bm25\n")
    assert "a TREC run needs --collection" in done.stderr.decode()
    assert "--collection" not in piped("nonsense\n").stderr.decode()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("corpus", '{"_id": "1"}\n', "corpus.jsonl, line 1"),
        ("queries", '{"_id": "1", "text": null}\n', "queries.jsonl, line 1"),
        ("corpus", '{"_id": 1, "text": ""}\n{"_id": "1", "text": ""}\n', "corpus.jsonl, line 2"),
        ("corpus", '{"_id": null, "text": ""}\n', "corpus.jsonl, line 1"),
    ],
)
def test_a_damaged_collection_is_told_by_file_and_line(tmp_path, name, text, message):
    for each in ("corpus", "queries"):
        (tmp_path / f"{each}.jsonl").write_text('{"_id": "a", "text": "x"}\n')
    (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "run").write_text("a Q0 a 1 1 t\n")
    result = into(tmp_path / "out", tmp_path / "run", "--collection", str(tmp_path))
    assert isinstance(result.exception, SettingsError)
    assert str(tmp_path / message) in str(result.exception)


def test_the_corpus_is_closed(tmp_path):
    write_run(tmp_path / "a.trec", 1, 2)
    code = (
        "import gc, sys, warnings\n"
        "sys.unraisablehook = lambda told: print('left open:', told.exc_value)\n"
        "warnings.simplefilter('error', ResourceWarning)\n"
        "from bge_rerank_adapters.cli import main\n"
        "main()"
    )
    arguments = (str(tmp_path / "a.trec"), "--collection", str(XQUAD), "--model", "tiny", *FAST)
    done = subprocess.run(
        [sys.executable, "-c", code, "rerank", *arguments, "-q", "-o", str(tmp_path / "out")],
        capture_output=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    assert b"corpus.jsonl" not in done.stdout


def test_help_shows_examples_and_exit_codes():
    text = plain(invoke("rerank", "--help").output)
    assert "Examples:" in text
    assert "bge-rerank rerank questions.jsonl -o ranked.jsonl" in text
    assert "Exit codes: 0 done" in text


def big_input(path, items: int) -> None:
    sentences = list(read_sentences().values())
    queries = list(read_queries().values())
    with path.open("w") as file:
        for number in range(items):
            documents = sentences[number % 500 : number % 500 + 4]
            file.write(line(queries[number % 200], documents, number=number))
            if number % 97 == 5:
                file.write("bad line\n")


@pytest.mark.timeout(900)
def test_a_run_killed_at_random_moments_loses_and_doubles_nothing(tmp_path, small):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    big_input(source, 2500)
    arguments = [
        *(sys.executable, "-m", "bge_rerank_adapters", "rerank", str(source), "-o", str(output)),
        *("--model", small, *FAST, "--resume", "--on-error", "skip", "--quiet"),
    ]
    chance = random.Random(7)
    kills = 0
    for _ in range(60):
        process = subprocess.Popen(arguments, cwd=PACKAGE.parent)
        seen = output.stat().st_size if output.exists() else -1
        while process.poll() is None and (
            (output.stat().st_size if output.exists() else -1) <= seen
        ):
            time.sleep(0.005)
        time.sleep(chance.random() * 0.4)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        if kills == 3:
            process = subprocess.Popen(arguments, cwd=PACKAGE.parent)
            process.wait(600)
            break
    assert process.returncode == 3
    assert kills >= 2, "the run was too short to be killed"
    found = rows(output.read_text())
    assert [each["number"] for each in found] == list(range(2500))
    assert all(len(each["results"]) == 4 for each in found)
    aside = rows((tmp_path / "out.jsonl.bad.jsonl").read_text())
    assert len(aside) == len([n for n in range(2500) if n % 97 == 5])
    assert not (tmp_path / "out.jsonl.progress").exists()
    again = subprocess.run(arguments[:-1], capture_output=True, check=False, cwd=PACKAGE.parent)
    assert again.returncode == 3, "something is still put aside"
    assert b"is complete already" in again.stderr
    assert len(rows(output.read_text())) == 2500


def test_an_unfinished_run_is_neither_overwritten_nor_mixed(tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line() + "bad\n")
    arguments = ("rerank", str(source), "-o", str(output), "--model", "tiny", *FAST)
    assert command(*arguments).returncode == 1
    refused = command(*arguments)
    assert refused.returncode == 1
    assert "is of an unfinished run; continue it with --resume" in refused.stderr
    other = command(*arguments, "--resume", "--top-k", "2")
    assert "differs in --top-k" in other.stderr
    source.write_text(line())
    assert command(*arguments, "--resume").returncode == 0
    assert len(rows(output.read_text())) == 1


def test_memory_does_not_grow_with_the_input(tmp_path, small):
    peaks = []
    for items in (1000, 4000):
        source = tmp_path / f"{items}.jsonl"
        padding = "x" * 20_000
        with source.open("w") as file:
            for number in range(items):
                file.write(line(documents=["a b c"], padding=padding, number=number))
        code = (
            "import resource, sys; sys.argv = ['x', *sys.argv[1:]]\n"
            "from bge_rerank_adapters.cli import main\n"
            "try: main()\n"
            "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, "rerank", str(source), "--model", small, *FAST, "-q"],
            capture_output=True,
            check=True,
            cwd=PACKAGE.parent,
        )
        assert done.stdout.count(b"\n") == items
        peaks.append(int(done.stderr.split()[-1]) / 1024)
    # 60 MB more to read.
    assert peaks[1] < peaks[0] + 30
