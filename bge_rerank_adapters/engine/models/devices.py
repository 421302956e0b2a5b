"""Which device and which dtype a model runs on."""

import time
from functools import cache

import torch
from torch.nn import functional

from bge_rerank_adapters.engine.models.cpu.onednn.ranges import int8_works
from bge_rerank_adapters.engine.models.device_faults import check_not_forked
from bge_rerank_adapters.errors import DeviceError

# A faster dtype costs some exactness, so it has to be worth it.
WORTHWHILE_SPEEDUP = 1.3
"""How many times as fast as float32 a half type must be to be picked."""
# A dtype whose first run takes so many times the limit is emulated; it is not timed further, since
# that could take a second.
_HOPELESS = 3.0


def resolve_device(name: str) -> torch.device:
    """Return the device of a name that the settings allow.

    Args:
        name: `"auto"` takes an accelerator if there is one, the first of its kind.

    Raises:
        DeviceError: The device is not there, or cannot be used in a forked process.
    """
    if name == "auto":
        return torch.device(_accelerator() or "cpu")
    # Not read by torch, which fails on a kind that needs a plug-in ("npu") where that is absent.
    kind, _, number = name.partition(":")
    if kind == "cpu":
        return torch.device("cpu")
    index, count = int(number or 0), _device_count(kind)
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

    Half types are taken where a short timing finds them faster than float32 by a third at least;
    bfloat16 before float16 on a CPU, the other way round elsewhere, since float16 keeps
    three more bits of the logit. int8 is for CPUs, and only where it is asked for.

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
    halves = (torch.bfloat16,) if wide_range else (torch.bfloat16, torch.float16)
    return _fastest_dtype(device.type, device.index, halves)


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
    return {str(dtype).removeprefix("torch."): _seconds(device, dtype) for dtype in dtypes}


def _accelerator() -> str | None:
    for kind in ("cuda", "xpu", "mps"):
        if _device_count(kind):
            return kind if kind == "mps" else f"{kind}:0"
    return None


def _device_count(kind: str) -> int:
    check_not_forked(kind)
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    module = getattr(torch, kind, None)
    if module is None or not module.is_available():
        return 0
    return int(module.device_count())


@cache
def _fastest_dtype(
    kind: str, index: int | None, halves: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
) -> torch.dtype:
    device = torch.device(kind, index) if index is not None else torch.device(kind)
    if kind != "cpu":
        halves = halves[::-1]
    limit = _seconds(device, torch.float32) / WORTHWHILE_SPEEDUP
    timed = [
        (seconds, half) for half in halves if (seconds := _seconds(device, half, limit)) < limit
    ]
    if not timed:
        return torch.float32
    fastest = min(seconds for seconds, _ in timed)
    # The preferred one wins unless the other is clearly faster.
    return next(half for seconds, half in timed if seconds <= 1.2 * fastest)


def _seconds(device: torch.device, dtype: torch.dtype, limit_s: float = float("inf")) -> float:
    """Return the best of some timings of one feed-forward block.

    Infinity if it cannot run, or if its first run is far from `limit_s`.
    """
    try:
        states = torch.ones(512, 768, device=device, dtype=dtype)
        weight = torch.ones(3072, 768, device=device, dtype=dtype)
        norm = torch.ones(3072, device=device, dtype=dtype)

        def run() -> float:
            begin = time.perf_counter()
            out = functional.layer_norm(functional.linear(states, weight), (3072,), norm, norm)
            out[0, 0].item()
            return time.perf_counter() - begin

        with torch.inference_mode():
            run()
            if run() > _HOPELESS * limit_s:
                return float("inf")
            return min(run() for _ in range(5))
    except (RuntimeError, NotImplementedError):
        return float("inf")
