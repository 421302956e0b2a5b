"""`rerank_files` over `s3://`, against moto's server.

moto needs an older python-dateutil than others here, so `make .venv-moto/installed` puts it into an
environment of its own, as `make test` does.
"""

import json
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pa = pytest.importorskip("pyarrow")
ray = pytest.importorskip("ray")

from pyarrow import fs  # noqa: E402

from bge_rerank_adapters import SettingsError  # noqa: E402
from bge_rerank_adapters.ray import rerank_files  # noqa: E402
from tests.killed_jobs import start_job  # noqa: E402
from tests.rerank_servers import free_port  # noqa: E402
from tests.test_imports import PACKAGE  # noqa: E402
from tests.test_ray import (  # noqa: E402
    ENDLESS_JOB,
    JOB,
    TINY,
    actor_processes,
    cluster,
    questions,
    wait_until,
)

SERVER = PACKAGE.parent / ".venv-moto" / "bin" / "moto_server"
pytestmark = [
    pytest.mark.skipif(not SERVER.is_file(), reason="run `make .venv-moto/installed` for it"),
    pytest.mark.timeout(1800),
]
__all__ = ["cluster"]

KEY, SECRET = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMIbPxRfiCYEXAMPLEKEY"


class Store:
    """A bucket on moto's server."""

    def __init__(self, port: int) -> None:
        self.address = f"127.0.0.1:{port}"
        self.system = fs.S3FileSystem(
            access_key=KEY,
            secret_key=SECRET,
            endpoint_override=f"http://{self.address}",
            allow_bucket_creation=True,
        )

    def uri(self, path: str, *, key: str = KEY) -> str:
        return f"s3://{key}:{SECRET}@{path}?endpoint_override=http%3A%2F%2F{self.address}"

    def write(self, path: str, lines: list[str]) -> None:
        with self.system.open_output_stream(path) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())

    def names(self, path: str) -> set[str]:
        found = self.system.get_file_info(fs.FileSelector(path, allow_not_found=True))
        return {each.base_name for each in found}

    def rows(self, path: str, start: str) -> list[dict]:
        found = []
        for name in sorted(self.names(path)):
            if name.startswith(start):
                with self.system.open_input_stream(f"{path}/{name}") as file:
                    found += [json.loads(line) for line in file.read().splitlines()]
        return found

    def check_credentials(self, *, after: str) -> None:
        """Have the server check them, after so many requests."""
        url = f"http://{self.address}/moto-api/reset-auth"
        urllib.request.urlopen(
            urllib.request.Request(url, after.encode(), {"Content-Type": "text/plain"})
        ).close()


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    port = free_port()
    server = subprocess.Popen(
        [str(SERVER), "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        made = Store(port)
        wait_until(lambda: _answers(made.address))
        made.system.create_dir("bucket")
        yield made
    finally:
        server.kill()
        server.wait()


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"http://{address}/moto-api/", timeout=5).close()
    except OSError:
        return False
    return True


def test_a_job_reads_and_writes_s3_and_puts_bad_rows_aside(cluster, store, caplog):
    lines = [json.dumps(row) for row in questions(30)]
    lines[7] = '{"query": 7}'
    store.write("bucket/in/a.jsonl", lines[:20])
    store.write("bucket/in/b.jsonl", lines[20:])
    options = {"settings": TINY, "part_bytes": 4_000}
    report = rerank_files(store.uri("bucket/in"), store.uri("bucket/out"), **options)
    assert (report.queries, report.put_aside) == (29, 1)
    found = [row["query_id"] for row in store.rows("bucket/out", "part-")]
    assert found == [number for number in range(30) if number != 7]
    (aside,) = store.rows("bucket/out/_put_aside", "part-")
    assert aside["file"] == "bucket/in/a.jsonl"
    assert aside["input"] == lines[7]
    again = rerank_files(store.uri("bucket/in"), store.uri("bucket/out"), **options)
    assert again.parts_before == report.parts
    assert "_unfinished" not in store.names("bucket/out")
    assert_secret_in_no_log(caplog.text)


def test_a_job_killed_over_s3_is_finished_by_the_next(cluster, store):
    store.write("bucket/killed.jsonl", [json.dumps(row) for row in questions(140)])
    source, output = store.uri("bucket/killed.jsonl"), store.uri("bucket/killed")
    job = subprocess.Popen(
        [sys.executable, "-c", ENDLESS_JOB, cluster, source, output, "4000"], cwd=PACKAGE.parent
    )
    # "_unfinished" is one of the names.
    wait_until(lambda: len(store.names("bucket/killed/_done")) >= 3)
    job.kill()
    job.wait()
    wait_until(lambda: not actor_processes())
    report = rerank_files(source, output, settings=TINY, part_bytes=4_000)
    assert 2 <= report.parts_before < report.parts
    assert (report.queries, report.put_aside) == (140, 0)
    found = [row["query_id"] for row in store.rows("bucket/killed", "part-")]
    assert found == list(range(140)), "nothing lost, nothing twice"
    assert "_unfinished" not in store.names("bucket/killed")
    assert_secret_in_no_log("")


def with_bad_lines(count: int) -> list[str]:
    """Return lines of `count` rows, every seventh of which is bad."""
    rows = [json.dumps(row) for row in questions(count, depth=3)]
    return ["no JSON" if number % 7 == 3 else line for number, line in enumerate(rows)]


def assert_each_row_once(store: Store, path: str, lines: list[str]) -> None:
    good = {n: json.loads(line) for n, line in enumerate(lines) if line != "no JSON"}
    found = store.rows(path, "part-")
    assert [row["query_id"] for row in found] == [*good], "nothing lost, nothing twice"
    for row in found:
        texts = [result["text"] for result in row["results"]]
        assert sorted(texts) == sorted(good[row["query_id"]]["documents"])
    aside = store.rows(f"{path}/_put_aside", "part-")
    assert [row["input"] for row in aside] == ["no JSON"] * (len(lines) - len(good))
    assert "_unfinished" not in store.names(path)


def run_once(
    source: str, output: str, *, kill_in: int | None = None, after_s: float = 0.0
) -> float:
    """Let a job run until it ends or is killed; return the seconds of a step.

    Args:
        source: The input.
        output: The folder.
        kill_in: The step to kill it in: 0 is before the first part, 1 within it, and so on.
        after_s: Seconds from the step's beginning to the kill.
    """
    job, told = start_job(source, output, part_bytes=2_000)
    steps, begin = 0, time.monotonic()
    with told:
        # A job that failed breaks the pipe here.
        while told.recv() in ("begun", "part"):
            if steps:
                told.send("go on")
            if steps == kill_in:
                time.sleep(after_s)
                job.kill()
                break
            steps += 1
        job.join()
    return (time.monotonic() - begin) / steps if steps else 0.0


def test_a_job_killed_at_random_moments_loses_nothing_and_doubles_nothing(store):
    lines = with_bad_lines(24)
    store.write("bucket/random.jsonl", lines)
    source = store.uri("bucket/random.jsonl")
    step_s = run_once(source, store.uri("bucket/whole"))
    assert_each_row_once(store, "bucket/whole", lines)
    parts = len(store.names("bucket/whole/_done"))
    half_done = 0
    for seed in range(10):
        chance, path = random.Random(seed), f"bucket/random-{seed}"
        for _ in range(3):
            step, after_s = chance.randint(0, parts // 3), chance.uniform(0, step_s)
            run_once(source, store.uri(path), kill_in=step, after_s=after_s)
            half_done += 0 < len(store.names(f"{path}/_done")) < parts
        run_once(source, store.uri(path))
        assert_each_row_once(store, path, lines)
    assert half_done > 5, "killed too early or too late to tell"


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_job_on_a_cluster_killed_at_random_moments_loses_and_doubles_nothing(cluster, store):
    lines = with_bad_lines(280)
    store.write("bucket/soak.jsonl", lines)
    source = store.uri("bucket/soak.jsonl")
    for seed in range(10):
        chance, path = random.Random(seed), f"bucket/soak-{seed}"
        job = subprocess.Popen(
            [sys.executable, "-c", JOB, cluster, source, store.uri(path), "4000"],
            cwd=PACKAGE.parent,
        )
        wait_until(lambda path=path: "_job.json" in store.names(path))
        time.sleep(chance.uniform(0, 15))
        job.kill()
        job.wait()
        wait_until(lambda: not actor_processes())
        rerank_files(source, store.uri(path), settings=TINY, concurrency=2, part_bytes=4_000)
        assert_each_row_once(store, path, lines)


def test_a_bucket_that_is_not_there_is_named(store):
    with pytest.raises(SettingsError, match=r"nowhere/in cannot be read: .* or bucket"):
        rerank_files(store.uri("nowhere/in"), store.uri("bucket/out2"), settings=TINY)
    store.write("bucket/one.jsonl", [json.dumps(row) for row in questions(1)])
    with pytest.raises(SettingsError, match=r"output s3://nowhere/out cannot be used.*nowhere"):
        rerank_files(store.uri("bucket/one.jsonl"), store.uri("nowhere/out"), settings=TINY)


def test_wrong_credentials_are_told(store):
    store.write("bucket/one.jsonl", [json.dumps(row) for row in questions(1)])
    store.check_credentials(after="0")
    try:
        with pytest.raises(SettingsError, match=r"source s3://bucket/one\.jsonl cannot") as raised:
            rerank_files(
                store.uri("bucket/one.jsonl", key="AKIAWRONG"), store.uri("bucket/x"), settings=TINY
            )
    finally:
        store.check_credentials(after="inf")
    assert "credentials" in str(raised.value)
    assert SECRET not in str(raised.value)


def test_a_secret_in_a_uri_is_in_no_error():
    for uri in (f"s3://{KEY}:{SECRET}@bucket/in?colour=red", f"s4://{KEY}:{SECRET}@bucket/in"):
        with pytest.raises(SettingsError, match=r"://bucket/in cannot be reached") as raised:
            rerank_files(uri, "out", settings=TINY)
        assert SECRET not in str(raised.value)
        assert raised.value.__cause__ is None


def assert_secret_in_no_log(text: str) -> None:
    assert SECRET not in text
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    files = [path for path in logs.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
