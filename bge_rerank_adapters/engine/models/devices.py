"""Chooses the device and dtype of a model."""

import logging
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from bge_rerank_adapters.engine.models.capabilities import Verdict, dtype_name, runs_natively
from bge_rerank_adapters.engine.models.cpu.onednn.ranges import int8_works
from bge_rerank_adapters.engine.models.cpu.threads import in_one_thread
from bge_rerank_adapters.engine.models.device_faults import check_not_forked
from bge_rerank_adapters.errors import DeviceError

# A smaller gain is not worth the loss of exactness.
WORTHWHILE_SPEEDUP = 1.3
"""How many times as fast as float32 a half type must be to be chosen by a timing alone."""
# A timing overrules the hardware's flags only if it contradicts them by this factor, this many
# times in a row: other processes may double one timing, but hardly all of them.
_DISAGREEMENT = 2.0
_ROUNDS = 4
# Rows, inputs and outputs of the timed product, and how often it runs before each synchronisation.
# The sizes for GPUs are large enough that launching kernels does not matter.
_CPU_BLOCK, _CPU_REPEATS = (128, 768, 3072), 1
_GPU_BLOCK, _GPU_REPEATS = (4096, 1024, 4096), 4

_log = logging.getLogger(__name__)


def resolve_device(name: str) -> torch.device:
    """Return the device of a name that the settings allow.

    Args:
        name: `"auto"` is an accelerator if there is one. A kind without an index is the calling
            thread's current device of that kind, by default the first.

    Raises:
        DeviceError: The device does not exist, or cannot be used in a forked process.
    """
    if name == "auto":
        return torch.device(_accelerator() or "cpu")
    # Not parsed by torch, which fails on a kind ("npu") whose plug-in is not installed.
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

    The hardware's capability flags decide, so that the choice is the same at every start. A timing
    overrules them only if it clearly contradicts them several times. If both half types are native,
    it is bfloat16 on a CPU, and elsewhere float16, which keeps three more bits of the logit. int8
    is never chosen automatically.

    Args:
        name: `"auto"`, `"int8"`, or torch's name of a floating-point dtype.
        device: The model's device.
        wide_range: Whether the model's activations may be too large for float16, as Gemma's are;
            `"auto"` is never float16 then.

    Raises:
        DeviceError: The name is `"int8"`, and the device cannot run it.
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
    """What `dtype="auto"` resolves to on a device, and why.

    Attributes:
        dtype: A floating-point dtype.
        reason: The reason, for the log and for `bge-rerank info`.
    """

    dtype: torch.dtype
    reason: str


def choose_dtype(device: torch.device, *, wide_range: bool = False) -> Choice:
    """Return what `"auto"` resolves to on a device, cached for the process; see `resolve_dtype`."""
    halves = (torch.bfloat16,) if wide_range else (torch.bfloat16, torch.float16)
    return _choose(device, halves if device.type == "cpu" else halves[::-1])


def _check_int8(device: torch.device) -> None:
    if device.type != "cpu":
        raise DeviceError(
            f"dtype 'int8' runs on a CPU only, not on {str(device)!r}; "
            'use device="cpu", or dtype="auto".'
        )
    if not int8_works():
        raise DeviceError(
            "dtype 'int8' needs oneDNN's 8-bit product, which this build of torch or this "
            'CPU lacks; use dtype="auto".'
        )


def device_name(device: torch.device) -> str:
    """Return a device's product name, or the number of threads that torch uses on a CPU."""
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
    """Return the index of the current device of a kind.

    If the process has not used the kind yet, it is 0: asking torch would initialise the device, and
    the process could not be forked afterwards.
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


def _timed_verdict(device: torch.device, half: torch.dtype, flags: Verdict) -> Verdict:
    """Return the verdict of the flags, unless every timing clearly contradicts it."""
    if flags.native is None:
        fast = _always(device, half, lambda speed: speed >= WORTHWHILE_SPEEDUP)
        found = "fast enough" if fast else "too slow"
        return Verdict(fast, f"{flags.reason}, and timings found {dtype_name(half)} {found}")
    if flags.native and _always(device, half, lambda speed: speed < 1 / _DISAGREEMENT):
        reason = f"{flags.reason}; yet {_ROUNDS} timings found it less than half as fast as float32"
        return Verdict(False, reason)
    if not flags.native and _always(device, half, lambda speed: speed > _DISAGREEMENT):
        reason = f"{flags.reason}; yet {_ROUNDS} timings found it over twice as fast as float32"
        return Verdict(True, reason)
    return flags


def _always(device: torch.device, half: torch.dtype, holds: Callable[[float], bool]) -> bool:
    """Return whether a condition holds for each of several timings of a half type."""
    return all(holds(_speed(device, half)) for _ in range(_ROUNDS))


def _speed(device: torch.device, half: torch.dtype) -> float:
    """Return how many times as fast as float32 a half type is; 0 if it cannot run.

    If float32 cannot be timed, for example for lack of memory, it is NaN, which satisfies no
    condition.
    """
    full = _seconds(device, torch.float32)
    return full / _seconds(device, half) if full < float("inf") else float("nan")


def _seconds(device: torch.device, dtype: torch.dtype) -> float:
    """Return the shortest of several timings of one feed-forward block; infinity if it fails.

    On a CPU it is the CPU time of one thread, which other processes hardly change.
    """
    if device.type == "cpu":
        return in_one_thread(
            lambda: _shortest(device, dtype, _CPU_BLOCK, _CPU_REPEATS, clock=time.thread_time)
        )
    return _shortest(device, dtype, _GPU_BLOCK, _GPU_REPEATS, clock=time.perf_counter)


def _shortest(
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
