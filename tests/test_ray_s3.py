"""`rerank_files` over `s3://`, against moto's server (`pip install "moto[server,s3]"`).

moto needs an older python-dateutil than others here, so it is in an environment of its own:
`MOTO_SERVER` names its `moto_server`. One that is merely on the path may be of any age, and is left
alone.
"""

import json
import os
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
from tests.test_imports import PACKAGE  # noqa: E402
from tests.test_ray import (  # noqa: E402
    JOB,
    TINY,
    actor_processes,
    cluster,
    questions,
    wait_until,
)

SERVER = os.environ.get("MOTO_SERVER")
pytestmark = [
    pytest.mark.skipif(SERVER is None, reason="MOTO_SERVER names no moto_server"),
    pytest.mark.timeout(300),
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
    port = random.Random(os.getpid()).randrange(20_000, 30_000)
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
        [sys.executable, "-c", JOB, cluster, source, output, "4000"], cwd=PACKAGE.parent
    )
    # "_unfinished" is one of the names.
    wait_until(lambda: len(store.names("bucket/killed/_done")) >= 3)
    time.sleep(random.random())
    job.kill()
    job.wait()
    wait_until(lambda: not actor_processes())
    report = rerank_files(source, output, settings=TINY, part_bytes=4_000)
    assert 2 <= report.parts_before < report.parts, "killed too late to tell"
    assert (report.queries, report.put_aside) == (140, 0)
    found = [row["query_id"] for row in store.rows("bucket/killed", "part-")]
    assert found == list(range(140)), "nothing lost, nothing twice"
    assert "_unfinished" not in store.names("bucket/killed")
    assert_secret_in_no_log("")


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
