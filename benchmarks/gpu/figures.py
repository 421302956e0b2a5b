"""How fast a device is: throughput beside a peer, latency, growth, memory, and where time goes."""

import statistics
import time
from collections.abc import Generator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.correctness import path_of
from benchmarks.gpu.device import (
    copy_rate,
    facts,
    forget_peak,
    peak_memory,
    product_rate,
    wall_seconds,
)
from benchmarks.gpu.models import checkpoint, pair_lengths, shape_of
from benchmarks.gpu.peers import load_peer
from benchmarks.gpu.profile import busiest_kernels, gaps_between_packs
from benchmarks.gpu.results import Row, Rows
from benchmarks.gpu.setting import QUERY_TOKENS, Setting, pairs_of, text_of
from bge_rerank_adapters import Reranker
from bge_rerank_adapters.engine.models.devices import dtype_timings, resolve_device

# Of the device's own product rate, as measured, over all that is not padding.
GOAL_SHARE = 0.45
GOAL_TIMES_PEER = 2.0
GOAL_PAIRS_PER_S = {"v2-m3": 3000.0}
GOAL_LATENCY_S = {"v2-m3": 0.045}
# Hugging Face's post on the ettin rerankers: CrossEncoder on Natural Questions, bfloat16, its best
# batch, one H100.
RECORDS = {"base": 2858.0, "large": 1659.0, "v2-m3": 1569.0}
_BATCHES = (32, 64, 128, 256)


def device_facts(setting: Setting) -> Rows:
    """Tell what the device is, and what it can do at most."""
    device = resolve_device(setting.device)
    for name, value in facts(device).items():
        yield Row(name, note=value)
    rows, width = setting.size(16_384, 512), setting.size(4096, 256)
    for dtype in ("float32", *setting.halves):
        rate = product_rate(device, getattr(torch, dtype), rows=rows, width=width)
        yield Row(f"product rate, {dtype}", rate, "TFLOP/s", note=f"{rows} x {width} x {width}")
    yield Row("copy rate", copy_rate(device, megabytes=setting.size(4000, 40)), "GB/s")
    for dtype, seconds in dtype_timings(device).items():
        yield Row(f"dtype_timings, {dtype}", 1e3 * seconds, "ms", note="of one feed-forward block")


def throughput(setting: Setting, *, shape: str) -> Rows:
    """Measure one shape in the half types beside the peer, and tell the records."""
    label = setting.shape_name(shape)
    yield Row(
        f"{shape}, a public record",
        RECORDS[shape],
        "pairs/s",
        note="CrossEncoder, bfloat16, one H100, Natural Questions; from the ettin rerankers' post",
    )
    for dtype in setting.halves[::-1]:
        yield from _throughput(setting, shape, label, dtype=dtype)


def _throughput(setting: Setting, shape: str, label: str, *, dtype: str) -> Rows:
    name = f"{label}, {dtype}"
    pairs = pairs_of(setting, setting.size(4096, 24))
    begin = time.perf_counter()
    with Reranker(str(checkpoint(setting, shape)), device=setting.device, dtype=dtype) as reranker:
        yield Row(f"{name}, loading", time.perf_counter() - begin, "s", note=path_of(reranker))
        ours = yield from _ours(setting, reranker, pairs, shape=shape, name=name)
        yield from _latency(setting, reranker, shape=shape, name=name)
        yield from gaps_between_packs(reranker, pairs, name=name)
        yield from busiest_kernels(reranker, pairs[: setting.size(512, 8)], name=name)
    yield from _peers(setting, pairs, ours, shape=shape, name=name, dtype=dtype)


def _ours(
    setting: Setting, reranker: Reranker, pairs: list[tuple[str, str]], *, shape: str, name: str
) -> Generator[Row, None, float]:
    """Measure what is asked for most; returns the pairs per second."""
    device = resolve_device(setting.device)
    reranker.score_pairs(pairs[: setting.size(512, 8)])
    forget_peak(device)
    before = reranker.stats()
    taken = wall_seconds(
        device, lambda: reranker.score_pairs(pairs), repeats=setting.size(3, 1), warm_ups=0
    )
    after = reranker.stats()
    tokens = (after.tokens - before.tokens) / (after.pairs - before.pairs)
    note = f"{len(pairs)} pairs of {tokens:.0f} tokens on average, median of {len(taken)} runs"
    rate = len(pairs) / statistics.median(taken)
    goal = GOAL_PAIRS_PER_S.get(shape)
    yield Row(f"{name}, ours", rate, "pairs/s", _reached(rate, goal, setting), note)
    yield _share(setting, reranker, pairs, before=before, after=after, shape=shape, name=name)
    yield Row(
        f"{name}, tokenising",
        (after.tokenizing_s - before.tokenizing_s) / sum(taken),
        "of the time",
        note=f"packs of {(after.tokens - before.tokens) / (after.packs - before.packs):.0f} tokens",
    )
    yield Row(f"{name}, most memory", peak_memory(device) / 1e9, "GB")
    return rate


def _share(
    setting: Setting,
    reranker: Reranker,
    pairs: list[tuple[str, str]],
    *,
    before: Any,
    after: Any,
    shape: str,
    name: str,
) -> Row:
    """Return which part of the device's product rate the packs reach while they run."""
    device, dtype = resolve_device(setting.device), getattr(torch, reranker.dtype)
    layers = shape_of(setting, shape)
    rows, width = setting.size(16_384, 512), layers.hidden
    ceiling = product_rate(device, dtype, rows=rows, width=4 * width)
    lengths = pair_lengths(checkpoint(setting, shape), pairs)
    runs = (after.pairs - before.pairs) / len(lengths)
    rate = runs * layers.gigaflops(lengths) / 1e3 / (after.scoring_s - before.scoring_s)
    share = rate / ceiling
    note = f"{rate:.0f} of {ceiling:.0f} TFLOP/s, of a product {rows} x {4 * width} x {4 * width}"
    return Row(
        f"{name}, share of the product rate", share, "", _reached(share, GOAL_SHARE, setting), note
    )


def _latency(setting: Setting, reranker: Reranker, *, shape: str, name: str) -> Rows:
    device, query = resolve_device(setting.device), text_of(QUERY_TOKENS, 9)
    passages = [text_of(200, number) for number in range(setting.size(100, 4))]
    sets = {
        f"{len(passages)} passages of 200 tokens": passages,
        "4 passages of 12 words": [text_of(12, number) for number in range(4)],
    }
    for title, texts in sets.items():
        taken = wall_seconds(
            device, partial(reranker.rerank, query, texts), repeats=setting.size(15, 2), warm_ups=3
        )
        median = statistics.median(taken)
        goal = GOAL_LATENCY_S.get(shape) if texts is passages else None
        yield Row(
            f"{name}, {title}",
            1e3 * median,
            "ms",
            None if goal is None or setting.small else median <= goal,
            f"median of {len(taken)}, least {1e3 * min(taken):.2f}, most {1e3 * max(taken):.2f}",
        )


def _peers(
    setting: Setting,
    pairs: list[tuple[str, str]],
    ours: float,
    *,
    shape: str,
    name: str,
    dtype: str,
) -> Rows:
    """Measure the peer at each batch on a part of the pairs, then at its best on all."""
    device = resolve_device(setting.device)
    folder = checkpoint(setting, shape)
    try:
        title, score = load_peer(folder, str(device), getattr(torch, dtype))
    except Exception as error:  # noqa: BLE001 - told in the table
        yield Row(f"{name}, the peer", passed=False, note=f"{type(error).__name__}: {error}"[:300])
        return
    part = pairs[:: setting.size(4, 2)]
    score(part[:64], 32)
    rates = {}
    for batch in _BATCHES[: setting.size(len(_BATCHES), 1)]:
        [taken] = wall_seconds(device, partial(score, part, batch), repeats=1, warm_ups=0)
        rates[batch] = len(part) / taken
    best = max(rates, key=lambda batch: rates[batch])
    [taken] = wall_seconds(device, lambda: score(pairs, best), repeats=1, warm_ups=0)
    rate = len(pairs) / taken
    tried = ", ".join(f"{batch}: {each:.0f}" for batch, each in rates.items())
    yield Row(f"{name}, {title}", rate, "pairs/s", note=f"batch {best}; by batch: {tried}")
    yield Row(
        f"{name}, ours by the peer's",
        ours / rate,
        "times",
        _reached(ours / rate, GOAL_TIMES_PEER, setting),
    )


def growth(setting: Setting) -> Rows:
    """Measure whether a call of 10,000 passages costs as much for each as a call of 100."""
    device, query = resolve_device(setting.device), text_of(QUERY_TOKENS, 9)
    dtype = setting.halves[0]
    with Reranker(
        str(checkpoint(setting, "v2-m3")), device=setting.device, dtype=dtype
    ) as reranker:
        reranker.rerank(query, [text_of(140, number) for number in range(setting.size(200, 2))])
        for count in (100, 1000, 10_000)[: setting.size(3, 2)]:
            count = setting.size(count, count // 50)
            texts = [document for _, document in pairs_of(setting, count)]
            forget_peak(device)
            before = reranker.stats()
            [taken] = wall_seconds(
                device,
                partial(reranker.rerank, query, texts),
                repeats=1,
                warm_ups=0,
            )
            tokens = reranker.stats().tokens - before.tokens
            yield Row(
                f"{dtype}, {count} passages",
                1e6 * taken / tokens,
                "µs a token",
                note=f"{taken:.2f} s, most memory {peak_memory(device) / 1e9:.2f} GB",
            )


def _reached(value: float, goal: float | None, setting: Setting) -> bool | None:
    """Return whether a goal is reached; goals are for the full sizes."""
    return None if goal is None or setting.small else value >= goal
