"""The command line in a terminal and in a pipe: one question, progress, Ctrl-C, and its errors."""

import json
import os
import re
import select
import signal
import sys
import time
from importlib.metadata import version

import pytest

from bge_rerank_adapters import Reranker
from bge_rerank_adapters.cli import bulk, main
from bge_rerank_adapters.cli.bar import RunBar
from bge_rerank_adapters.cli.words import in_shell_words
from bge_rerank_adapters.settings.checkpoints import CHECKPOINTS
from tests.checkpoints import XQUAD, build_xlm_roberta
from tests.test_cli import command, invoke, plain
from tests.test_cli_rerank import big_input, into, line, piped, rows, write_run
from tests.test_imports import PACKAGE
from tests.texts import DOCUMENTS, QUERY

COLUMNS = 80
FAST = ("--device", "cpu", "--dtype", "float32")


def in_terminal(
    *arguments: str, interrupt_at: str = "", timeout_s: float = 200.0
) -> tuple[str, int]:
    """Return what a command shows in a terminal of 80 columns, and its exit code.

    Args:
        arguments: Of the command.
        interrupt_at: What must have been shown before Ctrl-C is typed; never if empty.
        timeout_s: When to give up.
    """
    pty = pytest.importorskip("pty")
    import fcntl
    import struct
    import termios

    child, terminal = pty.fork()
    if child == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
        os.chdir(PACKAGE.parent)
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")}
        program = [sys.executable, "-m", "bge_rerank_adapters", *arguments]
        os.execve(sys.executable, program, environment | {"TERM": "xterm"})  # noqa: S606
    shown, end, typed = b"", time.monotonic() + timeout_s, False
    while time.monotonic() < end:
        ready, _, _ = select.select([terminal], [], [], 0.1)
        try:
            more = os.read(terminal, 65536) if ready else b""
        except OSError:
            break
        if ready and not more:
            break
        shown += more
        if interrupt_at and not typed and re.search(interrupt_at, without_colours(shown)):
            os.write(terminal, b"\x03")
            typed = True
    else:
        os.kill(child, signal.SIGKILL)
    return without_colours(shown), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def without_colours(shown: bytes) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode(errors="replace"))


def test_version_and_short_help():
    assert invoke("--version").output == f"bge-rerank {version('bge-rerank-adapters')}\n"
    assert "Usage:" in invoke("-h").output
    assert "--query" in plain(invoke("rerank", "-h").output)


# Models


def test_the_models_fit_a_terminal_and_are_whole():
    text, code = in_terminal("models")
    assert code == 0
    assert max(len(each.rstrip()) for each in text.splitlines()) <= COLUMNS
    assert "…" not in text
    for known in CHECKPOINTS.values():
        [row] = [each for each in text.splitlines() if f" {known.name} " in each]
        assert f"{known.max_tokens:,}" in row
        assert f"{known.family}, {known.languages}" in text


def test_the_models_are_whole_in_a_pipe_each_in_one_line():
    text = command("models").stdout
    for known in CHECKPOINTS.values():
        [row] = [each for each in text.splitlines() if each.startswith(f"{known.name} ")]
        told = [known.family, known.languages, f"{known.gigabytes['float32']:.1f}"]
        assert all(f"  {each}" in row for each in told)


# One question


def test_one_question_is_a_table_of_its_documents(reranker: Reranker):
    done = command("rerank", "--query", QUERY, *DOCUMENTS, "--model", "tiny", "--top-k", "3", *FAST)
    assert done.returncode == 0, done.stderr
    head, *table = done.stdout.splitlines()
    assert head.split() == ["rank", "moved", "score", "document"]
    wanted = reranker.rerank(QUERY, DOCUMENTS, top_k=3)
    assert [each.split(maxsplit=3)[3] for each in table] == [each.text for each in wanted]
    first = f"{wanted[0].index:+d}" if wanted[0].index else "="
    assert table[0].split(maxsplit=3)[:3] == ["1", first, f"{wanted[0].score:.3f}"]


def test_the_documents_of_one_question_may_come_as_lines():
    text = "\n".join([*DOCUMENTS[:2], "  ", *DOCUMENTS[2:]])
    done = piped(text, "--query", QUERY, "--format", "jsonl")
    (row,) = rows(done.stdout.decode())
    assert row["query"] == QUERY
    assert {each["text"] for each in row["results"]} == set(DOCUMENTS)
    assert done.stderr == b""


def test_a_question_in_a_terminal_shows_texts_whole_within_its_columns():
    long = "words and words " * 12 + "[b]end"
    text, code = in_terminal("rerank", "--query", QUERY, long, "--model", "tiny", *FAST)
    assert code == 0
    assert max(map(len, text.splitlines())) <= COLUMNS
    assert "[b]end" in text
    assert text.replace("│", " ").split().count("words") == 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--query", "q", "a", "-o", "x"), "-o: is for files and streams"),
        (("--query", "q", "a", "--format", "trec"), "is for files and streams"),
        (("one.jsonl", "two.jsonl"), "one file at a time, got 2"),
        (("--top-k", "0"), "Invalid value for --top-k: must be at least 1, got 0; leave it out"),
    ],
)
def test_wrong_questions_are_wrong_usage(arguments, message):
    result = invoke("rerank", *arguments)
    assert result.exit_code == 2
    assert message in plain(result.output.replace("│", " "))


def test_nothing_is_waited_for_that_a_person_would_have_to_type():
    text, code = in_terminal("rerank", "--model", "tiny")
    assert code == 2
    assert "nothing to rerank: give a file" in plain(text.replace("│", " "))


# Progress and Ctrl-C


def test_ctrl_c_says_how_much_is_done_and_how_to_go_on(tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    big_input(source, 4000)
    model = build_xlm_roberta(tmp_path / "small")
    arguments = ("rerank", str(source), "-o", str(output), "--model", str(model), *FAST)
    # Interrupted once the second chunk is under way.
    text, code = in_terminal(
        *arguments, "--on-error", "skip", interrupt_at=r"\s(2[6-9]\d|[3-9]\d\d|\d{4,})/4042"
    )
    assert code == 130
    assert "Traceback" not in text
    told = plain(text)
    found = re.search(r"Stopped: ([\d,]+) of 4,042 queries are done and kept in (\S+);", told)
    assert found, told
    assert found[2] == str(output)
    assert "to go on, give the same command with --resume." in told
    done = int(found[1].replace(",", ""))
    assert done == json.loads((tmp_path / "out.jsonl.progress").read_bytes())["mark"]["items"]
    assert re.search(r"Reranking .* [\d.e+]+ queries/s \d:\d\d:\d\d", text), "rate and time left"


def test_ctrl_c_of_an_evaluation_says_what_is_kept(tmp_path):
    pytest.importorskip("bm25s")
    output = tmp_path / "report"
    arguments = ("evaluate", str(XQUAD), "--model", "tiny", "--depth", "50", "-o", str(output))
    text, code = in_terminal(*arguments, *FAST, interrupt_at="Reranking")
    assert code == 130
    assert "Traceback" not in text
    assert f"Stopped: {output} keeps what is scored; the same command goes on." in plain(text)


def test_ctrl_c_before_the_model_is_loaded_leaves_an_output_as_it_was(tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line())
    output.write_text("kept")
    arguments = ("rerank", str(source), "-o", str(output), "--model", "tiny")
    text, code = in_terminal(*arguments, interrupt_at="Loading the model")
    assert code == 130
    assert "Stopped before anything was done" in plain(text)
    assert output.read_text() == "kept"


def test_the_bar_moves_within_a_chunk(monkeypatch):
    scored = 100
    bar = RunBar(total=50, done=10, shown=True)
    bar.ready()
    bar.begin(20, 40, lambda: scored)
    shown = []
    for scored in (100, 110, 130, 140, 150):  # noqa: B007 - read by the bar
        bar._move()
        shown.append(bar._bar.tasks[0].completed)
    assert shown == [10, 15, 25, 30, 30], "the chunk's own queries, and no more"
    bar.advance(20)
    bar._move()
    assert bar._bar.tasks[0].completed == bar.done == 30


@pytest.mark.parametrize("kind", ["jsonl", "trec"])
def test_queries_of_a_file_are_counted(tmp_path, kind):
    if kind == "trec":
        write_run(tmp_path / "in", 7, 3)
    else:
        (tmp_path / "in").write_text(line() + "\n" + line() + "  \n" + line())
    counted = bulk.count_queries(tmp_path / "in", is_run=kind == "trec")
    assert counted == (7 if kind == "trec" else 3)


# Resuming what is finished


def test_resuming_a_finished_file_with_other_settings_says_which(tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line())
    assert into(output, source).exit_code == 0
    same = into(output, source, "--resume")
    assert same.exit_code == 0
    assert "is complete already, with the same options" in plain(same.output)
    other = into(output, source, "--resume", "--top-k", "2", "--max-length", "64")
    assert other.exit_code == 1
    assert "is complete, but was made with another max_length, top_k;" in str(other.exception)
    assert into(output, source, "--top-k", "2").exit_code == 0, "without it, it is made anew"
    assert "same options" in plain(into(output, source, "--top-k", "2", "--resume").output)
    (tmp_path / "out.jsonl.settings.json").unlink()
    assert "whatever its options were" in plain(into(output, source, "--resume").output)


# Errors


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ('use device="cpu", or dtype="auto".', "use --device cpu, or --dtype auto."),
        ("max_length must be at least 1", "--max-length must be at least 1"),
        ("compress_ratio=2 is a setting", "--compress-ratio 2 is a setting"),
        ("or local_files_only=True with a", "or --local-files-only with a"),
        ("give revision=None instead", "give no --revision instead"),
        ("model 'top_k' and /data/max_length.x", "model 'top_k' and /data/max_length.x"),
        ("/data/top_k/x and a-top_k", "/data/top_k/x and a-top_k"),
        ("other=1 device stays", "other=1 device stays"),
        (
            "give a token= with the right to read it, or set HF_TOKEN",
            "set HF_TOKEN to one that may read it",
        ),
    ],
)
def test_errors_speak_of_options(message, told):
    assert in_shell_words(message) == told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rerank", "-o", "."), "error: . is a folder; give --output the name of a file."),
        (("rerank", "-o", ".."), "error: .. is a folder"),
        (("rerank", str(PACKAGE)), "cannot be read: Is a directory"),
        (("rerank", "--collection", "README.md"), "README.md/corpus.jsonl cannot be read"),
        (("evaluate", str(XQUAD), "-o", "README.md", "--model", "tiny"), "error: "),
        (("evaluate", str(XQUAD), "--run", "docs", "--model", "tiny"), "error: "),
        (("demo", "--model", "tinny"), "error: model 'tinny' is neither a folder nor a valid"),
        (("demo", "--max-length", "1"), "error: --query-max-length 0 leaves no room"),
        (("demo", "--device", "cuda:99"), "error: device 'cuda:99' is not available"),
    ],
)
def test_no_error_is_a_traceback(arguments, message):
    done = command(*arguments)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (told,) = done.stderr.strip().splitlines()
    assert message in told


def test_a_bug_is_told_in_a_line_and_with_its_place_if_asked(monkeypatch, capsys):
    def broken():
        raise KeyError("lost")

    monkeypatch.setattr("bge_rerank_adapters.cli.app", broken)
    with pytest.raises(SystemExit):
        main()
    told = capsys.readouterr().err
    assert told == "error: KeyError: 'lost' (this is a bug; BGE_RERANK_TRACEBACK=1 shows where)\n"
    monkeypatch.setenv("BGE_RERANK_TRACEBACK", "1")
    with pytest.raises(KeyError):
        main()
