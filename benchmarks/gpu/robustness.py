"""Whether an engine stands what a device does to it: no memory, company, event loops, forks."""

import asyncio
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.gpu.correctness import documents, largest_error
from benchmarks.gpu.device import forget_peak, peak_memory
from benchmarks.gpu.models import checkpoint
from benchmarks.gpu.results import Rows, checked
from benchmarks.gpu.setting import Setting, text_of
from bge_rerank_adapters import DeviceError, Reranker, WorkerDiedError
from bge_rerank_adapters.engine.models.devices import resolve_device

# Between two packs of one dtype, logits of a random model move by this much at most.
_COMPANY = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.3}
# What the package promises of one pair in other company, in float32.
_PROMISED_COMPANY = 1e-5
_FORK_S = 60


def robustness(setting: Setting) -> Rows:
    """Check what may go wrong on a device and must not end in wrong or missing scores."""
    yield checked("company in float32", lambda: _company(setting))
    yield checked("out of memory is survived", lambda: _out_of_memory(setting))
    yield checked("two engines in one process", lambda: _two_engines(setting))
    yield checked("an event loop", lambda: asyncio.run(_event_loop(setting)))
    # Last, since a child process has what this one had at that moment.
    yield checked("a fork is refused", lambda: _fork(setting))


def _company(setting: Setting) -> str:
    """Compare logits in a large pack with those of each document alone."""
    query, texts = documents()
    folder = str(checkpoint(setting, "base"))
    with Reranker(folder, device=setting.device, dtype="float32") as reranker:
        together = reranker.logits(query, texts)
        alone = [reranker.logits(query, [text])[0] for text in texts]
    error = largest_error(alone, together)
    if not error <= _PROMISED_COMPANY:
        raise AssertionError(f"off by {error:.1e}, promised {_PROMISED_COMPANY:.0e}")
    return f"off by {error:.1e}, promised {_PROMISED_COMPANY:.0e}"


def _out_of_memory(setting: Setting) -> str:
    device = resolve_device(setting.device)
    query = text_of(8, 1)
    texts = [text_of(200, number) for number in range(setting.size(400, 24))]
    with Reranker(
        str(checkpoint(setting, "base")), device=setting.device, dtype="float32", pack_tokens=16_384
    ) as reranker:
        wanted = reranker.logits(query, texts)
        forget_peak(device)
        reranker.logits(query, texts)
        packs = reranker.stats().packs
        with short_memory(reranker, device, peak=peak_memory(device)):
            found = reranker.logits(query, texts)
        more = reranker.stats().packs - packs
    error = largest_error(found, wanted)
    if not error <= _COMPANY["float32"] or more <= packs // 2:
        raise AssertionError(f"off by {error:.1e} after {more} packs, {packs // 2} before")
    return f"{more} packs instead of {packs // 2}, off by {error:.1e}"


@contextmanager
def short_memory(reranker: Reranker, device: torch.device, *, peak: float) -> Iterator[None]:
    """Leave a device two thirds of the way from an idle engine's memory to a busy one's.

    A processor is not to be limited: there the model itself refuses packs above half their size.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        idle = torch.cuda.memory_allocated(device)
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction((idle + (peak - idle) * 2 / 3) / total, device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        return
    model: Any = reranker._core.workers[0].model  # noqa: SLF001 - a fault is put in its place
    give = model.logits

    def refuse(pairs: Sequence[Any]) -> list[float]:
        if len(pairs) > 4:
            raise torch.OutOfMemoryError("a pack of more than four pairs, to try this out")
        return list(give(pairs))

    model.logits = refuse
    try:
        yield
    finally:
        model.logits = give


def _two_engines(setting: Setting) -> str:
    query, texts = documents()
    folder = str(checkpoint(setting, "base"))
    dtypes = setting.halves if len(setting.halves) > 1 else ("float32", "bfloat16")
    engines = [Reranker(folder, device=setting.device, dtype=dtype) for dtype in dtypes]
    try:
        alone = [engine.logits(query, texts) for engine in engines]
        with ThreadPoolExecutor(2 * len(engines)) as pool:
            calls = [pool.submit(each.logits, query, texts) for each in engines for _ in range(4)]
            together = [call.result() for call in calls]
    finally:
        for engine in engines:
            engine.close()
    errors = [largest_error(found, alone[place // 4]) for place, found in enumerate(together)]
    within = [_COMPANY[dtypes[place // 4]] for place in range(len(together))]
    if not all(error <= most for error, most in zip(errors, within, strict=True)):
        raise AssertionError(f"off by {errors}, allowed {within}")
    return f"{len(together)} calls at once, off by at most {max(errors):.1e}"


async def _event_loop(setting: Setting) -> str:
    query, texts = documents()
    dtype = setting.halves[0]
    with Reranker(str(checkpoint(setting, "base")), device=setting.device, dtype=dtype) as reranker:
        wanted = {each.index: each.score for each in reranker.rerank(query, texts)}
        calls = [reranker.arerank(query, texts) for _ in range(8)]
        answers = await asyncio.gather(*calls)
    errors = [abs(each.score - wanted[each.index]) for found in answers for each in found]
    if not max(errors) <= _COMPANY[dtype]:
        raise AssertionError(f"off by {max(errors):.1e}")
    return f"8 calls at once, scores off by at most {max(errors):.1e}"


def _fork(setting: Setting) -> str:
    """Fork once the device is in use; the child tells by a pipe what becomes of its call."""
    query, texts = documents()
    with Reranker(str(checkpoint(setting, "base")), device=setting.device) as reranker:
        reranker.logits(query, texts[:1])
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            _in_child(setting, reranker, write)
        os.close(write)
        with os.fdopen(read) as pipe:
            said = pipe.read()
        os.waitpid(child, 0)
    if not said.startswith("refused"):
        raise AssertionError(said or "the child process ended without a word")
    return said


def _in_child(setting: Setting, parents: Reranker, write: int) -> None:
    import signal

    # Whatever hangs is ended by the system, so that the parent need not wait.
    signal.alarm(_FORK_S)
    try:
        try:
            if setting.kind == "cpu":
                parents.logits("a", ["b"])
            else:
                Reranker("tiny", device=setting.device)
            said = "a forked process was let in"
        except (DeviceError, WorkerDiedError) as error:
            said = f"refused by {type(error).__name__}"
        except BaseException as error:  # noqa: BLE001 - told to the parent
            said = f"{type(error).__name__}: {error}"
        os.write(write, said[:2000].encode())
    finally:
        sys.stderr.flush()
        os._exit(0)
