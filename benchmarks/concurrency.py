"""Many callers at once: throughput beside one large request and a locked peer, fairness, the loop.

`python -m benchmarks.concurrency FOLDER` prints a table for each question and writes JSON:

- Do 32 concurrent requests of 10 passages get through as fast as one request of 320, and how much
  faster than on sentence-transformers' CrossEncoder behind a lock?
- How long does a request of 10 passages wait while a bulk job runs, in pack times?
- How long does the event loop stand still, by the clock, while documents are tokenised and scored?
"""

import argparse
import asyncio
import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.contenders import Score, cross_encoder
from benchmarks.texts import pick, read_collection
from bge_rerank_adapters import Reranker

ONE, THREADS, TASKS, LOCKED = "one request", "threads", "tasks", "CrossEncoder, locked threads"
_BEAT_S = 0.001

Requests = list[list[str]]


def seconds(run: Callable[[], object]) -> float:
    """Return how long one call takes."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def in_threads(score: Score, query: str, requests: Requests) -> None:
    """Score all requests at once, each in a thread of its own."""
    start = threading.Barrier(len(requests))

    def ask(documents: Sequence[str]) -> None:
        start.wait()
        score(query, documents)

    with ThreadPoolExecutor(len(requests)) as pool:
        for call in [pool.submit(ask, documents) for documents in requests]:
            call.result()


def in_tasks(reranker: Reranker, query: str, requests: Requests) -> None:
    """Score all requests at once, each in a task of one event loop."""

    async def ask() -> None:
        await asyncio.gather(*(reranker.arerank(query, documents) for documents in requests))

    asyncio.run(ask())


def behind_lock(score: Score) -> Score:
    """Return what scores one request at a time, as a model with an unsafe tokenizer must."""
    lock = threading.Lock()

    def locked(query: str, documents: Sequence[str]) -> list[float]:
        with lock:
            return score(query, documents)

    return locked


def throughput(
    reranker: Reranker, peer: Score | None, query: str, requests: Requests, *, rounds: int
) -> list[dict[str, Any]]:
    """Return passages per second of each way to ask, in rounds that alternate their order."""
    whole = [text for documents in requests for text in documents]
    ways: dict[str, Callable[[], object]] = {
        ONE: lambda: reranker.rerank(query, whole),
        THREADS: lambda: in_threads(reranker.logits, query, requests),
        TASKS: lambda: in_tasks(reranker, query, requests),
    }
    if peer is not None:
        ways[LOCKED] = lambda: in_threads(peer, query, requests)
    timed: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds):
        for name in ways if round_ % 2 == 0 else reversed(ways):
            timed[name].append(seconds(ways[name]))
    medians = {name: statistics.median(each) for name, each in timed.items()}
    return [
        {
            "way": name,
            "seconds": timed[name],
            "median_s": median,
            "passages_per_s": len(whole) / median,
            "of_one_request": medians[ONE] / median,
            "times_locked_peer": medians[LOCKED] / median if LOCKED in medians else None,
        }
        for name, median in medians.items()
    ]


def fairness(
    reranker: Reranker, query: str, bulk: list[str], documents: list[str], *, rounds: int
) -> dict[str, Any]:
    """Return what a small request takes alone and under a bulk job, and what a pack takes."""
    alone = [seconds(lambda: reranker.rerank(query, documents)) for _ in range(rounds)]
    before = reranker.stats()
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(reranker.rerank, query, bulk)
        while reranker.stats().packs == before.packs and not job.done():
            time.sleep(0.001)
        beside: list[float] = []
        while len(beside) < rounds and not job.done():
            beside.append(seconds(lambda: reranker.rerank(query, documents)))
        # The last of them may have outlived the job.
        finished_early = job.done()
        job.result()
    after = reranker.stats()
    pack_s = (after.scoring_s - before.scoring_s) / (after.packs - before.packs)
    waited = [max(0.0, each - statistics.median(alone)) / pack_s for each in beside]
    return {
        "alone_s": alone,
        "beside_bulk_s": beside,
        "pack_s": pack_s,
        "median_extra_packs": statistics.median(waited) if waited else None,
        "most_extra_packs": max(waited, default=None),
        "bulk_was_done_early": finished_early,
    }


async def longest_pause(call: Callable[[], Any]) -> dict[str, float]:
    """Return the longest time that the loop stood still while a call ran, and the call's time."""
    pauses: list[float] = []

    async def beat() -> None:
        while True:
            begin = time.perf_counter()
            await asyncio.sleep(_BEAT_S)
            pauses.append(time.perf_counter() - begin - _BEAT_S)

    heart = asyncio.create_task(beat())
    await asyncio.sleep(0.02)
    # What the machine itself does to a loop that has nothing to do.
    await asyncio.sleep(0.2)
    idle = max(pauses)
    pauses.clear()
    begin = time.perf_counter()
    await call()
    took = time.perf_counter() - begin
    await asyncio.sleep(2 * _BEAT_S)
    heart.cancel()
    with suppress(asyncio.CancelledError):
        await heart
    return {"idle_pause_ms": 1e3 * idle, "longest_pause_ms": 1e3 * max(pauses), "call_s": took}


def event_loop(
    reranker: Reranker, query: str, bulk: list[str], requests: Requests
) -> list[dict[str, Any]]:
    """Return how long the loop stands still for one large call and for many small ones."""
    calls: dict[str, Callable[[], Any]] = {
        f"1 call of {len(bulk)}": lambda: reranker.arerank(query, bulk),
        f"{len(requests)} calls of {len(requests[0])}": lambda: asyncio.gather(
            *(reranker.arerank(query, documents) for documents in requests)
        ),
        "arerank_many of the same": lambda: reranker.arerank_many(
            [(query, documents) for documents in requests]
        ),
    }
    return [{"what": name} | asyncio.run(longest_pause(call)) for name, call in calls.items()]


def show(console: Console, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a table; lists stay out, they are for the JSON."""
    table = Table(title=title)
    names = [name for name, value in rows[0].items() if not isinstance(value, list)]
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(_text(row[name]) for name in names))
    console.print(table)


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def load_peer(folder: Path) -> Score | None:
    """Return the peer behind a lock, or `None` where sentence-transformers is not installed."""
    try:
        return behind_lock(cross_encoder("float32", 32)(folder))
    except ImportError:
        return None


def parse() -> argparse.Namespace:
    """Read the command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help='a checkpoint\'s folder, or "tiny" (then without the peer)')
    parser.add_argument("--dtype", default="float32", help="of ours; the peer runs in float32")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--passages", type=int, default=10, help="of each request")
    parser.add_argument("--bulk", type=int, default=10_000, help="passages of the bulk job")
    parser.add_argument("--words", type=int, help="of a passage; else about 130")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("build/benchmarks/concurrency.json"))
    return parser.parse_args()


def main() -> None:
    """Measure, print tables and write JSON."""
    options, console = parse(), Console(width=150)
    query, texts = read_collection(None)
    if options.words is not None:
        texts = [" ".join(text.split()[: options.words]) for text in texts]
    passages = pick(texts, options.requests * options.passages)
    requests = [
        passages[start : start + options.passages]
        for start in range(0, len(passages), options.passages)
    ]
    bulk = pick(texts, options.bulk)
    peer = None if options.folder == "tiny" else load_peer(Path(options.folder))
    with Reranker(options.folder, dtype=options.dtype, device="cpu") as reranker:
        reranker.rerank(query, passages)
        if peer is not None:
            peer(query, passages[:2])
        results: dict[str, Any] = {
            "throughput": throughput(reranker, peer, query, requests, rounds=options.rounds),
            "fairness": fairness(reranker, query, bulk, requests[0], rounds=options.rounds),
            "event loop": event_loop(reranker, query, bulk, requests),
            "stats": reranker.stats().to_dict(),
        }
    count = f"{options.requests} requests of {options.passages}"
    show(console, f"Throughput, {count}", results["throughput"])
    show(console, f"{options.passages} beside {options.bulk} passages", [results["fairness"]])
    show(console, "Event loop", results["event loop"])
    show(console, "Engine", [results["stats"]])
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")
    console.print(f"Written: {options.json}")


if __name__ == "__main__":
    main()
