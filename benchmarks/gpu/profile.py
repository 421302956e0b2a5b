"""Where the time of a device goes: idle between packs, and which of its kernels take most."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from benchmarks.gpu.device import Marks, synchronize
from benchmarks.gpu.results import Row, Rows
from benchmarks.gpu.setting import mean
from bge_rerank_adapters import Reranker

_KERNELS_SHOWN = 8


@contextmanager
def _marked(model: Any, marks: Marks) -> Iterator[list[tuple[Any, Any]]]:
    """Put points before and after each pack that the model is given."""
    found: list[tuple[Any, Any]] = []
    method = "launch" if model.runs_ahead else "logits"
    run = getattr(model, method)

    def marked(pairs: Any) -> Any:
        begin = marks.mark()
        coming = run(pairs)
        found.append((begin, marks.mark()))
        return coming

    setattr(model, method, marked)
    try:
        yield found
    finally:
        setattr(model, method, run)


def gaps_between_packs(reranker: Reranker, pairs: list[tuple[str, str]], *, name: str) -> Rows:
    """Measure how long the device has nothing to do between one pack and the next."""
    worker: Any = reranker._core.workers[0]  # noqa: SLF001 - no setting tells
    model = worker.model
    if not hasattr(model, "runs_ahead"):
        yield Row(
            f"{name}, idle between packs", note="not measured: packs are shared among threads"
        )
        return
    marks = Marks(model.device)
    with _marked(model, marks) as found:
        # The worker holds on to what it launches with.
        launch, worker._launch = worker._launch, worker._launch and model.launch  # noqa: SLF001
        try:
            reranker.score_pairs(pairs)
        finally:
            worker._launch = launch  # noqa: SLF001
    synchronize(model.device)
    gaps = [marks.seconds(end, begin) for (_, end), (begin, _) in pairwise(found)]
    if not gaps:
        yield Row(f"{name}, idle between packs", note="there was one pack alone")
        return
    whole = marks.seconds(found[0][0], found[-1][1])
    packs = [marks.seconds(*each) for each in found]
    yield Row(
        f"{name}, idle between packs",
        sum(gaps) / whole,
        "of the time",
        note=f"{len(found)} packs of {1e3 * mean(packs):.2f} ms, "
        f"gaps of {1e3 * mean(gaps):.3f} ms on average, {1e3 * max(gaps):.3f} at most",
    )


def busiest_kernels(reranker: Reranker, pairs: list[tuple[str, str]], *, name: str) -> Rows:
    """Tell the operators that the device spends most of its time on."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = reranker.device.startswith("cuda")
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    try:
        with profile(activities=activities) as taken:
            reranker.score_pairs(pairs)
        rows = [
            (each.key, _self_time(each, on_gpu=on_gpu), each.count) for each in taken.key_averages()
        ]
    except Exception as error:  # noqa: BLE001 - profilers need rights that a machine may not give
        yield Row(f"{name}, profile", note=f"not there: {type(error).__name__}: {error}"[:300])
        return
    if not rows:
        yield Row(f"{name}, profile", note="nothing of the scoring thread was recorded")
        return
    whole = sum(seconds for _, seconds, _ in rows) or 1.0
    for key, seconds, count in sorted(rows, key=lambda row: -row[1])[:_KERNELS_SHOWN]:
        yield Row(f"{name}, time in {key[:70]}", 100 * seconds / whole, "%", note=f"{count} calls")


def _self_time(each: Any, *, on_gpu: bool) -> float:
    """Return microseconds, by the name that this release of torch has for them."""
    if not on_gpu:
        return float(each.self_cpu_time_total)
    new = getattr(each, "self_device_time_total", None)
    return float(each.self_cuda_time_total if new is None else new)
