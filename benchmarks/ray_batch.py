"""What Ray Data costs and gives on this machine: pairs per second beside the engine alone.

`python -m benchmarks.ray_batch` prints a table and writes JSON:

- Pairs per second of the engine in this process, with one thread and with all.
- The same through `rerank_dataset`, with one actor and with two, of one processor each, and with
  one actor of two; without what starting takes, which is told apart.
- What a row costs that has no documents: Ray's own part.
- Seconds until a cluster is there, and until a first dataset of two rows is ranked.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ray
from rich.console import Console
from rich.table import Table

from benchmarks.texts import pick, read_collection
from bge_rerank_adapters.ray import rerank_dataset
from bge_rerank_adapters.settings import EngineSettings

# Actors and the processors of each.
POOLS = ((1, 1), (2, 1), (1, 2))
_EMPTY_ROWS = 10_000

Rows = list[dict[str, Any]]


def make_rows(count: int, documents: int) -> Rows:
    """Return so many questions with so many passages each, no two of them alike."""
    query, texts = read_collection(None)
    passages = pick(texts, count * documents)
    return [
        {
            "query_id": number,
            "query": query,
            "documents": passages[number * documents : (number + 1) * documents],
        }
        for number in range(count)
    ]


def in_process(settings: EngineSettings, rows: Rows) -> float:
    """Return the seconds that the engine takes for all rows, loaded and warm."""
    from bge_rerank_adapters import Reranker

    with Reranker.from_settings(settings) as engine:
        engine.warm_up()
        begin = time.perf_counter()
        engine.rerank_many((row["query"], row["documents"]) for row in rows)
        return time.perf_counter() - begin


def through_ray(
    settings: EngineSettings, rows: Rows, *, actors: int, cpus: int, batch_size: int
) -> float:
    """Return the seconds that a dataset takes from nothing to its last row."""
    dataset = ray.data.from_items(rows, override_num_blocks=max(1, len(rows) // batch_size))
    dataset.context.enable_progress_bars = False
    begin = time.perf_counter()
    ranked = rerank_dataset(
        dataset, settings=settings, concurrency=actors, num_cpus=cpus, batch_size=batch_size
    )
    found = sum(1 for _ in ranked.iter_rows())
    if found != len(rows):
        raise RuntimeError(f"{found} rows came back of {len(rows)}.")
    return time.perf_counter() - begin


def in_fresh_process(threads: int) -> float:
    """Return what `in_process` takes with so many threads, which torch reads when it starts."""
    command = [sys.executable, "-m", "benchmarks.ray_batch", "--alone", *sys.argv[1:]]
    done = subprocess.run(  # noqa: S603 - this file's own module
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    return float(done.stdout)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row of figures for the engine alone and for each pool of actors."""
    settings = settings_of(options)
    rows = make_rows(options.rows, options.documents)
    pairs = options.rows * options.documents
    found: list[dict[str, Any]] = []
    for threads in (1, os.cpu_count() or 1):
        seconds = in_fresh_process(threads)
        found.append({"": f"engine alone, {threads} threads", "pairs per s": pairs / seconds})
    begin = time.perf_counter()
    ray.init(num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False)
    found.append({"": "starting a cluster", "seconds": time.perf_counter() - begin})
    for actors, cpus in POOLS:
        first = through_ray(settings, rows[:2], actors=actors, cpus=cpus, batch_size=1)
        whole = through_ray(settings, rows, actors=actors, cpus=cpus, batch_size=options.batch_size)
        found.append(
            {
                "": f"Ray Data, {actors} actors of {cpus} processors",
                "pairs per s": pairs / (whole - first),
                "seconds to the first rows": first,
                "seconds in all": whole,
            }
        )
    empty = [{**rows[0], "documents": [], "query_id": number} for number in range(_EMPTY_ROWS)]
    empty[0]["documents"] = ["a"]  # so that the column's type is known
    few = through_ray(settings, empty[:64], actors=1, cpus=1, batch_size=64)
    many = through_ray(settings, empty, actors=1, cpus=1, batch_size=64)
    cost = (many - few) / (_EMPTY_ROWS - 64)
    found.append({"": "a row without documents", "ms per row": 1e3 * cost})
    ray.shutdown()
    return found


def settings_of(options: argparse.Namespace) -> EngineSettings:
    """Return the settings that the command names."""
    return EngineSettings(model=options.model, dtype=options.dtype, device="cpu")


def show(found: list[dict[str, Any]]) -> None:
    """Print the figures as a table."""
    names = list(dict.fromkeys(name for row in found for name in row))
    table = Table(*names)
    for row in found:
        cells = [row.get(name, "") for name in names]
        table.add_row(*(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells))
    Console(width=150).print(table)


def parse() -> argparse.Namespace:
    """Read the command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help='a checkpoint\'s folder, or "tiny"')
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=80, help="questions")
    parser.add_argument("--documents", type=int, default=8, help="passages of each")
    parser.add_argument(
        "--batch-size", type=int, default=4, help="rows that an actor ranks at once"
    )
    parser.add_argument("--json", type=Path, default=Path("build/benchmarks/ray_batch.json"))
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, print the table and write JSON."""
    options = parse()
    if options.alone:
        rows = make_rows(options.rows, options.documents)
        print(in_process(settings_of(options), rows))  # noqa: T201
        return
    found = measure(options)
    show(found)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
