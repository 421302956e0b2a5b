"""A server on loopback under load: throughput beside the engine alone, latency, nothing lost.

`python -m benchmarks.serving FOLDER` starts `bge-rerank serve` in a process of its own, prints a
table for each question and writes JSON:

- How many passages per second does it score, against the engine alone, in this process, on the
  same requests and as many at a time?
- How long does a small request take alone, and beside bulk requests?
- Is any answer lost, or other than the engine's?

The load comes from one process over plain sockets, since it runs on the cores that are measured,
and most HTTP clients take more of them for a request than the server does.
"""

import argparse
import asyncio
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.checkpoints import SHAPES, build
from benchmarks.concurrency import show
from benchmarks.texts import pick, read_collection
from bge_rerank_adapters import Reranker

_START_S = 120.0
_TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05}

Texts = list[str]
Scores = dict[int, float]
Ask = Callable[[Texts], Awaitable[Scores]]


@dataclass(frozen=True, slots=True)
class Timed:
    """What one request took and gave."""

    seconds: float
    scores: Scores


class Connection:
    """One keep-alive connection that posts JSON and reads the answer, one at a time."""

    def __init__(self, port: int) -> None:
        """Connect on first use."""
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, body: bytes) -> dict[str, Any]:
        """Return the answer.

        Raises:
            RuntimeError: Its status is not 200.
        """
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=2**24)
        reader, writer = self._streams
        writer.write(
            b"POST /v2/rerank HTTP/1.1\r\nHost: server\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        head = (await reader.readuntil(b"\r\n\r\n")).decode("ascii").lower()
        length = int(head.partition("content-length:")[2].partition("\r\n")[0])
        answer = await reader.readexactly(length)
        if not head.startswith("http/1.1 200"):
            raise RuntimeError(f"{head.partition(chr(13))[0]}: {answer[:200]!r}")
        parsed: dict[str, Any] = json.loads(answer)
        return parsed

    def close(self) -> None:
        """Close it."""
        if self._streams is not None:
            self._streams[1].close()


class Remote:
    """The server as something to ask, over so many connections."""

    def __init__(self, port: int, query: str, connections: int) -> None:
        """Connect when asked."""
        self._query = query
        self._free: asyncio.LifoQueue[Connection] = asyncio.LifoQueue()
        self._all = [Connection(port) for _ in range(connections)]
        for each in self._all:
            self._free.put_nowait(each)

    async def ask(self, texts: Texts) -> Scores:
        """Return the scores by index."""
        body = json.dumps({"query": self._query, "documents": texts}).encode()
        connection = await self._free.get()
        try:
            answer = await connection.post(body)
        finally:
            self._free.put_nowait(connection)
        return {each["index"]: each["relevance_score"] for each in answer["results"]}

    def close(self) -> None:
        """Close all connections."""
        for each in self._all:
            each.close()


def ask_engine(engine: Reranker, query: str) -> Ask:
    """Return the engine in this process as something to ask."""

    async def ask(texts: Texts) -> Scores:
        return {each.index: each.score for each in await engine.arerank(query, texts)}

    return ask


async def run_load(ask: Ask, requests: Sequence[Texts], *, at_a_time: int) -> list[Timed]:
    """Return what each request took, so many of them under way at a time."""
    coming = iter(enumerate(requests))
    done: dict[int, Timed] = {}

    async def work() -> None:
        for place, texts in coming:
            begin = time.perf_counter()
            scores = await ask(texts)
            done[place] = Timed(time.perf_counter() - begin, scores)

    await asyncio.gather(*(work() for _ in range(at_a_time)))
    return [done[place] for place in range(len(requests))]


async def run_mixed(
    ask: Ask, small: Sequence[Texts], bulk: Sequence[Texts], *, every_s: float
) -> tuple[list[Timed], list[Timed]]:
    """Return what small requests took that came at even times, while bulk ones were under way."""
    # As many as are needed: the first half of the bulk goes round until all small ones are done.
    under_way = True

    async def work() -> list[Timed]:
        found: list[Timed] = []
        while under_way:
            found += await run_load(ask, bulk, at_a_time=2)
        return found

    working = asyncio.create_task(work())
    calls = []
    for texts in small:
        calls.append(asyncio.create_task(run_load(ask, [texts], at_a_time=1)))
        await asyncio.sleep(every_s)
    timed = [each for call in calls for each in await call]
    under_way = False
    return timed, await working


@contextmanager
def server(folder: str, dtype: str) -> Iterator[int]:
    """Run a server in a process of its own, and return its port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    command = [sys.executable, "-m", "bge_rerank_adapters", "serve", "--model", folder]
    command += ["--device", "cpu", "--dtype", dtype, "--port", str(port)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BGE_RERANK_")}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)  # noqa: S603
    try:
        _await_port(process, port)
        yield port
    finally:
        process.terminate()
        process.wait(60)


def _await_port(process: "subprocess.Popen[bytes]", port: int) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"The server did not start; its exit code is {process.poll()}.")


async def timed_load(
    ask: Ask, requests: Sequence[Texts], at_a_time: int
) -> tuple[float, list[Timed]]:
    """Return how long all requests took, and each of them."""
    begin = time.perf_counter()
    timed = await run_load(ask, requests, at_a_time=at_a_time)
    return time.perf_counter() - begin, timed


def check(timed: Sequence[Timed], wanted: Sequence[Timed], *, within: float) -> float:
    """Return the largest difference between two runs' scores.

    Raises:
        RuntimeError: An answer is missing, or its scores are others.
    """
    if len(timed) != len(wanted):
        raise RuntimeError(f"{len(wanted)} requests were sent, {len(timed)} answered.")
    largest = 0.0
    for one, other in zip(timed, wanted, strict=True):
        if one.scores.keys() != other.scores.keys():
            raise RuntimeError("An answer has other documents than were sent.")
        differences = (abs(one.scores[index] - other.scores[index]) for index in one.scores)
        largest = max(largest, *differences)
    if largest > within:
        raise RuntimeError(f"Scores differ by {largest}, which is more than {within}.")
    return largest


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that so large a share of them does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def throughput(
    engine: Reranker, query: str, port: int, requests: Sequence[Texts], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return passages per second of both, in rounds that take turns."""
    ways: dict[str, list[float]] = {"engine": [], "server": []}
    apart = 0.0

    async def measure(name: str) -> tuple[float, list[Timed]]:
        if name == "engine":
            return await timed_load(ask_engine(engine, query), requests, options.at_a_time)
        remote = Remote(port, query, options.at_a_time)
        timed = await timed_load(remote.ask, requests, options.at_a_time)
        remote.close()
        return timed

    for round_ in range(options.rounds):
        found: dict[str, list[Timed]] = {}
        for name in ways if round_ % 2 == 0 else reversed(ways):
            seconds, found[name] = asyncio.run(measure(name))
            ways[name].append(seconds)
        within = _TOLERANCE.get(engine.dtype, 0.1)
        apart = max(apart, check(found["server"], found["engine"], within=within))
    passages = sum(map(len, requests))
    engine_s = statistics.median(ways["engine"])
    return [
        {
            "way": name,
            "seconds": seconds,
            "median_s": statistics.median(seconds),
            "requests_per_s": len(requests) / statistics.median(seconds),
            "passages_per_s": passages / statistics.median(seconds),
            "of_the_engine": engine_s / statistics.median(seconds),
            "largest_difference": apart,
        }
        for name, seconds in ways.items()
    ]


def latency(
    query: str, port: int, small: Sequence[Texts], bulk: Sequence[Texts], *, every_s: float
) -> list[dict[str, Any]]:
    """Return what small requests take one after the other, and beside bulk requests."""

    async def measure() -> list[dict[str, Any]]:
        remote = Remote(port, query, connections=64)
        alone = await run_load(remote.ask, small, at_a_time=1)
        beside, large = await run_mixed(remote.ask, small, bulk, every_s=every_s)
        remote.close()
        check(beside, alone, within=0.1)
        rows = {"small, alone": alone, "small, beside bulk": beside, "bulk": large}
        return [
            {
                "requests": name,
                "passages": len(timed[0].scores),
                "count": len(timed),
                "p50_ms": 1e3 * percentile([each.seconds for each in timed], 0.5),
                "p99_ms": 1e3 * percentile([each.seconds for each in timed], 0.99),
                "most_ms": 1e3 * max(each.seconds for each in timed),
            }
            for name, timed in rows.items()
        ]

    return asyncio.run(measure())


def parse() -> argparse.Namespace:
    """Read the command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder",
        help='a checkpoint\'s folder, "tiny", or one of '
        f"{', '.join(SHAPES)} for random weights of that shape",
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--passages", type=int, default=10, help="of each request")
    parser.add_argument("--at-a-time", type=int, default=16)
    parser.add_argument("--small", type=int, default=40, help="small requests under mixed load")
    parser.add_argument("--small-passages", type=int, default=5)
    parser.add_argument("--bulk-passages", type=int, default=200)
    parser.add_argument(
        "--small-share", type=float, default=0.25, help="of the engine's throughput, by small ones"
    )
    parser.add_argument("--words", type=int, help="of a passage; else about 130")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("build/benchmarks/serving.json"))
    return parser.parse_args()


def main() -> None:
    """Measure, print tables and write JSON."""
    options, console = parse(), Console(width=150)
    query, texts = read_collection(None)
    if options.words is not None:
        texts = [" ".join(text.split()[: options.words]) for text in texts]
    folder = options.folder
    if folder in SHAPES:
        folder = str(build(Path("build/checkpoints") / folder, SHAPES[folder], texts=texts))
    requests = _cut(pick(texts, options.requests * options.passages), options.passages)
    small = _cut(pick(texts, options.small * options.small_passages), options.small_passages)
    bulk = _cut(pick(texts, 4 * options.bulk_passages), options.bulk_passages)
    with server(folder, options.dtype) as port:
        with Reranker(folder, device="cpu", dtype=options.dtype) as engine:
            engine.rerank(query, requests[0])
            results: dict[str, Any] = {
                "throughput": throughput(engine, query, port, requests, options)
            }
        per_s = options.small_share * results["throughput"][0]["passages_per_s"]
        every_s = options.small_passages / per_s
        results["latency"] = latency(query, port, small, bulk, every_s=every_s)
    show(console, f"Throughput, {options.at_a_time} requests at a time", results["throughput"])
    show(console, "Latency at the server", results["latency"])
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")
    console.print(f"Written: {options.json}")


def _cut(texts: Texts, size: int) -> list[Texts]:
    return [texts[start : start + size] for start in range(0, len(texts), size)]


if __name__ == "__main__":
    main()
