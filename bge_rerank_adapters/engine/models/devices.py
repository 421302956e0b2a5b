"""Which device and which dtype a model runs on."""

import logging
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from bge_rerank_adapters.engine.models.capabilities import Verdict, runs_natively
from bge_rerank_adapters.engine.models.cpu.onednn.ranges import int8_works
from bge_rerank_adapters.engine.models.cpu.threads import in_one_thread
from bge_rerank_adapters.engine.models.device_faults import check_not_forked
from bge_rerank_adapters.errors import DeviceError

# A faster dtype costs some exactness, so it has to be worth it.
WORTHWHILE_SPEEDUP = 1.3
"""How many times as fast as float32 a half type must be to be picked by a timing alone."""
# How far a timing must be from what the hardware's flags say to overrule them, and how often it
# must be so: other processes may make one timing twice as long, and hardly so many in a row.
_DISAGREEMENT = 2.0
_ROUNDS = 4
# Rows, inputs and outputs of the product that is timed, and how often it runs before each wait. A
# GPU is given so much that launching it takes no share of the time that counts.
_CPU_BLOCK, _CPU_REPEATS = (128, 768, 3072), 1
_GPU_BLOCK, _GPU_REPEATS = (4096, 1024, 4096), 4

_log = logging.getLogger(__name__)


def resolve_device(name: str) -> torch.device:
    """Return the device of a name that the settings allow.

    Args:
        name: `"auto"` takes an accelerator if there is one. Without a number it is the calling
            thread's current device of its kind, the first unless the program has set another.

    Raises:
        DeviceError: The device is not there, or cannot be used in a forked process.
    """
    if name == "auto":
        return torch.device(_accelerator() or "cpu")
    # Not read by torch, which fails on a kind that needs a plug-in ("npu") where that is absent.
    kind, _, number = name.partition(":")
    if kind == "cpu":
        return torch.device("cpu")
    count = _device_count(kind)
    index = int(number) if number else _current_index(kind)
    if index >= count:
        found = f"{count} found" if count else "none found"
        raise DeviceError(
            f"device {name!r} is not available on this machine ({found} of kind {kind}); "
            'use "cpu" or "auto", or install a torch built for it.'
        )
    # With its index, so that "cuda" does not follow a later change of the current device.
    return torch.device(name) if kind == "mps" else torch.device(kind, index)


def resolve_dtype(name: str, device: torch.device, *, wide_range: bool = False) -> torch.dtype:
    """Return the dtype of a name; `"auto"` is the fastest that the device runs natively.

    The hardware's capability flags decide, so that every start on a machine finds the same, and a
    timing overrules them only where it says the opposite each time. Of two half types that a CPU
    has, bfloat16 is taken; elsewhere float16, which keeps three more bits of the logit. int8 is
    for CPUs, and only where it is asked for.

    Args:
        name: `"auto"`, `"int8"`, or torch's name of a floating-point dtype.
        device: Where the model is to run.
        wide_range: Whether the model's activations may be too large for float16, as Gemma's are;
            `"auto"` leaves float16 out then.

    Raises:
        DeviceError: int8 is asked for and the device cannot run it.
    """
    if name == "int8":
        _check_int8(device)
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    choice = choose_dtype(device, wide_range=wide_range)
    _log.info('dtype "auto" is %s on %s: %s', dtype_name(choice.dtype), device, choice.reason)
    return choice.dtype


class Choice(NamedTuple):
    """What `dtype="auto"` is on a device, and why.

    Attributes:
        dtype: A floating-point dtype.
        reason: In words, for the log and for `bge-rerank info`.
    """

    dtype: torch.dtype
    reason: str


def choose_dtype(device: torch.device, *, wide_range: bool = False) -> Choice:
    """Return what `"auto"` is on a device, found once in a process; see `resolve_dtype`."""
    halves = (torch.bfloat16,) if wide_range else (torch.bfloat16, torch.float16)
    return _choose(device, halves if device.type == "cpu" else halves[::-1])


def dtype_name(dtype: torch.dtype) -> str:
    """Return torch's name of a dtype as the settings have it."""
    return str(dtype).removeprefix("torch.")


def _check_int8(device: torch.device) -> None:
    if device.type != "cpu":
        raise DeviceError(
            f"dtype 'int8' runs on a CPU alone, not on {str(device)!r}; "
            'use device="cpu", or dtype="auto".'
        )
    if not int8_works():
        raise DeviceError(
            "dtype 'int8' needs oneDNN's 8-bit product, which this build of torch or this "
            'CPU lacks; use dtype="auto".'
        )


def device_name(device: torch.device) -> str:
    """Return what a device is called, or how many threads a CPU computes with."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def dtype_timings(device: torch.device) -> dict[str, float]:
    """Return the seconds that each dtype takes for one feed-forward block; infinity if it fails."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return {dtype_name(dtype): _seconds(device, dtype) for dtype in dtypes}


def _accelerator() -> str | None:
    for kind in ("cuda", "xpu", "mps"):
        if _device_count(kind):
            return kind if kind == "mps" else f"{kind}:{_current_index(kind)}"
    return None


def _device_count(kind: str) -> int:
    check_not_forked(kind)
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    module = getattr(torch, kind, None)
    if module is None or not module.is_available():
        return 0
    return int(module.device_count())


def _current_index(kind: str) -> int:
    """Return the current device of a kind.

    Where nothing has used the kind yet, it is the first; asking would begin to use it, after which
    this process could not be forked.
    """
    module: Any = getattr(torch, kind, None)
    used = getattr(module, "is_initialized", None)
    return int(module.current_device()) if used is not None and used() else 0


@cache
def _choose(device: torch.device, halves: tuple[torch.dtype, ...]) -> Choice:
    verdicts = []
    for half in halves:
        verdicts.append(_timed_verdict(device, half, runs_natively(device, half)))
        if verdicts[-1].native:
            return Choice(half, verdicts[-1].reason)
    return Choice(torch.float32, "; ".join(verdict.reason for verdict in verdicts))


def _timed_verdict(device: torch.device, half: torch.dtype, told: Verdict) -> Verdict:
    """Return what flags say of a half type, unless every timing says clearly the opposite."""
    if told.native is None:
        fast = _always(device, half, lambda speed: speed >= WORTHWHILE_SPEEDUP)
        found = "fast enough" if fast else "too slow"
        return Verdict(fast, f"{told.reason}, and timings found {dtype_name(half)} {found}")
    if told.native and _always(device, half, lambda speed: speed < 1 / _DISAGREEMENT):
        reason = f"{told.reason}; yet {_ROUNDS} timings found it less than half as fast as float32"
        return Verdict(False, reason)
    if not told.native and _always(device, half, lambda speed: speed > _DISAGREEMENT):
        reason = f"{told.reason}; yet {_ROUNDS} timings found it over twice as fast as float32"
        return Verdict(True, reason)
    return told


def _always(device: torch.device, half: torch.dtype, holds: Callable[[float], bool]) -> bool:
    """Return whether something holds for each timing of a half type; ends with the first other."""
    return all(holds(_speed(device, half)) for _ in range(_ROUNDS))


def _speed(device: torch.device, half: torch.dtype) -> float:
    """Return how many times as fast as float32 a half type is; 0 if it cannot run.

    NaN, which agrees with nothing, where float32 itself cannot be timed, for want of memory, say.
    """
    full = _seconds(device, torch.float32)
    return full / _seconds(device, half) if full < float("inf") else float("nan")


def _seconds(device: torch.device, dtype: torch.dtype) -> float:
    """Return the best of some timings of one feed-forward block; infinity if it cannot run.

    On a CPU it is one thread's own time, which is the same beside busy processes.
    """
    if device.type == "cpu":
        return in_one_thread(
            lambda: _best(device, dtype, _CPU_BLOCK, _CPU_REPEATS, clock=time.thread_time)
        )
    return _best(device, dtype, _GPU_BLOCK, _GPU_REPEATS, clock=time.perf_counter)


def _best(
    device: torch.device,
    dtype: torch.dtype,
    block: tuple[int, int, int],
    repeats: int,
    *,
    clock: Callable[[], float],
) -> float:
    rows, inputs, outputs = block
    try:
        states = torch.ones(rows, inputs, device=device, dtype=dtype)
        weight = torch.ones(outputs, inputs, device=device, dtype=dtype)
        norm = torch.ones(outputs, device=device, dtype=dtype)

        def run() -> float:
            begin = clock()
            for _ in range(repeats):
                out = functional.linear(states, weight)
            functional.layer_norm(out, (outputs,), norm, norm)[0, 0].item()
            return clock() - begin

        with torch.inference_mode():
            run()
            return min(run() for _ in range(3))
    except (RuntimeError, NotImplementedError):
        return float("inf")
