"""Times ours and the peers in turn on full-size checkpoints and prints one table per question.

`python -m benchmarks.compare --shape base` makes a checkpoint of random weights with the exact
shape of a BGE reranker, starts a process for each contender, and lets them score the same passages
in alternating order, so that a machine whose speed drifts is the same for all.
"""

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import kendalltau
from tokenizers import Tokenizer

from benchmarks.checkpoints import SHAPES, Shape, build
from benchmarks.contenders import CONTENDERS, MAX_LENGTH, ORDER_ALONE, OWN_CHOICE
from benchmarks.processes import Contender
from benchmarks.texts import pick, read_collection, short

REFERENCE = "ours float32"
RATE_TOKENS = 2048


@dataclass
class Row:
    """What one contender did with one set of passages.

    Attributes:
        name: The contender's.
        seconds: Of each round.
        scores: Of the last round, in input order.
        error: Why there are none.
        peak_bytes: Most memory ever resident in its process.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    error: str | None = None
    peak_bytes: float = 0.0

    @property
    def median_s(self) -> float:
        """Median of the rounds, in seconds."""
        return statistics.median(self.seconds)


def race(
    contenders: Sequence[Contender], query: str, documents: list[str], *, rounds: int
) -> list[Row]:
    """Let the contenders score the documents in turn, each round in the opposite order."""
    rows = {each.name: Row(each.name, error=each.error) for each in contenders}
    for round_ in range(rounds):
        for contender in contenders if round_ % 2 == 0 else reversed(contenders):
            row, answer = rows[contender.name], contender.score(query, documents)
            row.error = answer.get("error")
            if row.error is None:
                row.seconds.append(answer["seconds"])
                row.scores, row.peak_bytes = answer["scores"], answer["peak_bytes"]
    return list(rows.values())


def pair_lengths(folder: Path, query: str, documents: Sequence[str]) -> list[int]:
    """Return the number of tokens of each pair as the model sees it."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encodings = tokenizer.encode_batch([(query, document) for document in documents])
    return [min(MAX_LENGTH, len(each.ids)) for each in encodings]


def summarise(
    rows: Sequence[Row], *, shape: Shape, lengths: Sequence[int], rates: dict[str, float]
) -> list[dict[str, Any]]:
    """Return the figures of a table, one dictionary per contender."""
    by_name = {row.name: row for row in rows if row.seconds}
    reference, first = by_name.get(REFERENCE), next(iter(by_name.values()), None)
    work = shape.gigaflops(lengths)
    figures: list[dict[str, Any]] = []
    for row in rows:
        if not row.seconds:
            figures.append({"name": row.name, "error": row.error})
            continue
        compared = reference is not None and row is not reference
        figures.append(
            {
                "name": row.name,
                "seconds": row.seconds,
                "median_s": row.median_s,
                "passages_per_s": len(lengths) / row.median_s,
                "useful_gflops": work / row.median_s,
                "share_of_rate": _share(row, work, rates),
                "times_ours": row.median_s / first.median_s if first else 1.0,
                "largest_difference": _difference(row, reference) if compared else None,
                "kendall_tau": _agreement(row, reference) if compared else None,
                "peak_gb": row.peak_bytes / 1e9,
            }
        )
    return figures


def _share(row: Row, gigaflops: float, rates: dict[str, float]) -> float | None:
    if row.name in OWN_CHOICE:
        return None
    fitting = [dtype for dtype in rates if dtype in row.name]
    return gigaflops / row.median_s / rates[fitting[0] if fitting else "float32"]


def _difference(row: Row, reference: Row | None) -> float | None:
    if reference is None or row.name in ORDER_ALONE:
        return None
    scores = row.scores
    return max(abs(a - b) for a, b in zip(scores, reference.scores, strict=True))


def _agreement(row: Row, reference: Row | None) -> float | None:
    if reference is None or len(row.scores) < 2:
        return None
    return float(kendalltau(row.scores, reference.scores).statistic)


def show(console: Console, title: str, figures: Sequence[dict[str, Any]]) -> None:
    """Print a table; a contender that did not run says why."""
    table = Table(title=title)
    for column in ("contender", "median s", "passages/s", "useful GFLOP/s", "of product rate"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for column in ("time / first", "largest difference", "Kendall tau", "peak GB"):
        table.add_column(column, justify="right")
    for each in figures:
        if "error" in each:
            continue
        table.add_row(
            each["name"],
            f"{each['median_s']:.3f}",
            f"{each['passages_per_s']:.1f}",
            f"{each['useful_gflops']:.0f}",
            _maybe(each["share_of_rate"], "{:.0%}"),
            f"{each['times_ours']:.2f}",
            _maybe(each["largest_difference"], "{:.1e}"),
            _maybe(each["kendall_tau"], "{:.4f}"),
            f"{each['peak_gb']:.2f}",
        )
    console.print(table)
    for each in figures:
        if "error" in each:
            console.print(f"{each['name']} did not run: {each['error']}", markup=False)


def _maybe(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def chart(path: Path, title: str, figures: Sequence[dict[str, Any]]) -> None:
    """Draw useful GFLOP/s as bars."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    ran = sorted(
        (each for each in figures if "error" not in each), key=lambda each: each["useful_gflops"]
    )
    figure, axes = plt.subplots(figsize=(9, 1 + 0.4 * len(ran)), layout="constrained")
    colours = ["#c44e52" if each["name"].startswith("ours") else "#8c9bb0" for each in ran]
    bars = axes.barh([each["name"] for each in ran], [each["useful_gflops"] for each in ran])
    for bar, colour in zip(bars, colours, strict=True):
        bar.set_color(colour)
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set_xlabel("useful GFLOP/s (more is better)")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def processor() -> dict[str, Any]:
    """Return what this machine's processor is and can do."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    model = next(
        (line.split(":")[1].strip() for line in text.splitlines() if "model name" in line), ""
    )
    known = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    flags = set(text.split())
    # These make a processor pass for an older one.
    limits = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
    return {
        "model": model,
        "features": [name for name in known if name in flags],
        "limited by": {name: os.environ[name] for name in limits if name in os.environ},
        "cores": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def measure_rates(folder: Path, shape: Shape) -> dict[str, float]:
    """Return the machine's own product rate in GFLOP/s, by dtype."""
    with Contender("rate", folder) as process:
        answer = process.ask(
            {"tokens": RATE_TOKENS, "hidden": shape.hidden, "intermediate": shape.intermediate}
        )
    if "error" in answer:
        raise RuntimeError(f"The product rate could not be measured: {answer['error']}")
    rates: dict[str, float] = answer["rates"]
    return rates


def throughput_and_latency(
    options: argparse.Namespace, folder: Path, query: str, texts: list[str]
) -> dict[str, Any]:
    """Return the tables of warm processes."""
    shape = SHAPES[options.shape]
    sets = {f"{count} passages": pick(texts, count) for count in options.passages}
    sets |= {f"{count} short passages": short(texts, count) for count in options.short}
    tables: dict[str, Any] = {}
    with ExitStack() as stack:
        racers = [stack.enter_context(Contender(name, folder)) for name in options.contenders]
        for each in racers:
            each.score(query, texts[:2])
        for title, documents in sets.items():
            rates = [measure_rates(folder, shape)]
            rows = race(racers, query, documents, rounds=options.rounds)
            rates.append(measure_rates(folder, shape))
            tables[title] = summarise(
                rows,
                shape=shape,
                lengths=pair_lengths(folder, query, documents),
                rates={dtype: max(each[dtype] for each in rates) for dtype in rates[0]},
            )
            tables[f"{title}: rates"] = rates
    return tables


def cold_start(
    options: argparse.Namespace, folder: Path, query: str, texts: list[str]
) -> list[dict[str, Any]]:
    """Return seconds from the start of a process to its first score, and its memory."""
    seconds: dict[str, list[float]] = {name: [] for name in options.contenders}
    figures: dict[str, dict[str, Any]] = {}
    for _ in range(options.rounds):
        for name in options.contenders:
            with Contender(name, folder) as process:
                answer = process.score(query, texts[:1])
                if "error" in answer:
                    figures[name] = {"name": name, "error": answer["error"]}
                    continue
                seconds[name].append(process.start_s + answer["seconds"])
                figures[name] = {
                    "name": name,
                    "seconds": seconds[name],
                    "median_s": statistics.median(seconds[name]),
                    "peak_gb": answer["peak_bytes"] / 1e9,
                    "anonymous_gb": answer.get("anonymous_bytes", 0.0) / 1e9,
                }
    return list(figures.values())


def growth(
    options: argparse.Namespace, folder: Path, query: str, texts: list[str]
) -> list[dict[str, Any]]:
    """Return microseconds per token and memory of ours, for more and more passages."""
    figures = []
    with Contender(options.contenders[0], folder) as process:
        process.score(query, texts[:2])
        for count in options.growth:
            documents = pick(texts, count)
            tokens = sum(pair_lengths(folder, query, documents))
            answer = process.score(query, documents)
            figures.append(
                {
                    "passages": count,
                    "tokens": tokens,
                    "microseconds_per_token": 1e6 * answer["seconds"] / tokens,
                    "peak_gb": answer["peak_bytes"] / 1e9,
                }
            )
    return figures


def parse() -> argparse.Namespace:
    """Read the command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="base")
    parser.add_argument("--folder", type=Path, default=Path("build/benchmarks"), help="for files")
    parser.add_argument("--beir", type=Path, help="BEIR folder to take passages from")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer to use")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--passages", type=int, nargs="*", default=[100])
    parser.add_argument("--short", type=int, nargs="*", default=[4, 20])
    parser.add_argument("--growth", type=int, nargs="*", default=[])
    parser.add_argument("--cold", action="store_true", help="measure cold starts as well")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    """Measure what was asked for, print it, and write JSON and a chart."""
    options, console = parse(), Console(width=150)
    query, texts = read_collection(options.beir)
    shape = SHAPES[options.shape]
    # Named as on the hub: FlagEmbedding's FlagAutoReranker goes by a folder's name.
    folder = build(
        options.folder / f"bge-reranker-{options.shape}",
        shape,
        texts=[query, *texts],
        tokenizer=options.tokenizer,
    )
    results: dict[str, Any] = {"processor": processor(), "shape": options.shape}
    console.print(results["processor"])
    if options.passages or options.short:
        results |= throughput_and_latency(options, folder, query, texts)
    for title, figures in results.items():
        if title.endswith("passages"):
            show(console, f"{options.shape}, {title}", figures)
            console.print(results[f"{title}: rates"])
    if options.cold:
        results["cold start"] = cold_start(options, folder, query, texts)
        console.print(results["cold start"])
    if options.growth:
        results["growth"] = growth(options, folder, query, texts)
        console.print(results["growth"])
    path = options.folder / f"{options.shape}.json"
    path.write_text(json.dumps(results, indent=2), encoding="utf-8")
    if options.passages:
        title = f"{options.passages[0]} passages"
        chart(path.with_suffix(".png"), f"bge-reranker-{options.shape}, {title}", results[title])
    console.print(f"Written: {path}")


if __name__ == "__main__":
    main()
