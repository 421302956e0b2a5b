"""A device's clock, memory and rates, by the same names for a GPU and for a processor."""

import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

Run = Callable[[], object]


def synchronize(device: torch.device) -> None:
    """Wait for all that the device has been given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Marks:
    """Points in the work of a device, which are reached when it gets there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Any:
        """Put a point after all that the device has been given."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """Return the time between two points that were reached."""
        if self._device.type != "cuda":
            return float(end - begin)
        return float(begin.elapsed_time(end)) / 1e3


def median_seconds(device: torch.device, run: Run, *, repeats: int, warm_ups: int = 2) -> float:
    """Return the median time of some runs by the device's clock."""
    marks, taken = Marks(device), []
    for _ in range(warm_ups):
        run()
    for _ in range(repeats):
        synchronize(device)
        begin = marks.mark()
        run()
        end = marks.mark()
        synchronize(device)
        taken.append(marks.seconds(begin, end))
    return statistics.median(taken)


def wall_seconds(device: torch.device, run: Run, *, repeats: int, warm_ups: int = 1) -> list[float]:
    """Return the times of some runs by the wall clock, the device idle before and after each."""
    for _ in range(warm_ups):
        run()
    taken = []
    for _ in range(repeats):
        synchronize(device)
        begin = time.perf_counter()
        run()
        synchronize(device)
        taken.append(time.perf_counter() - begin)
    return taken


def peak_memory(device: torch.device) -> float:
    """Return the most bytes of tensors since `forget_peak`; on a processor, ever in the process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak(device: torch.device) -> None:
    """Begin anew with the most memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


@torch.inference_mode()
def product_rate(device: torch.device, dtype: torch.dtype, *, rows: int, width: int) -> float:
    """Return the TFLOP/s of a large product of random numbers: the ceiling of a model's layers.

    Args:
        device: Where.
        dtype: Of both factors.
        rows: Of the states.
        width: Inputs and outputs.
    """
    # Random, since a product of equal numbers takes less power and can be faster.
    states = torch.randn(rows, width, device=device, dtype=dtype)
    weight = torch.randn(width, width, device=device, dtype=dtype)
    seconds = median_seconds(device, lambda: functional.linear(states, weight), repeats=10)
    return 2e-12 * rows * width * width / seconds


@torch.inference_mode()
def copy_rate(device: torch.device, *, megabytes: int) -> float:
    """Return the GB/s of a copy on the device, bytes read and bytes written counted."""
    source = torch.randn(megabytes * 250_000, device=device)
    target = torch.empty_like(source)
    return 2e-3 * megabytes / median_seconds(device, lambda: target.copy_(source), repeats=10)


def facts(device: torch.device) -> dict[str, str]:
    """Return what the device and the software are."""
    import transformers

    found = {"torch": torch.__version__, "transformers": transformers.__version__}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {
            "card": card.name,
            "compute capability": f"{card.major}.{card.minor}",
            "multiprocessors": str(card.multi_processor_count),
            "memory": f"{card.total_memory / 2**30:.0f} GiB",
            "CUDA": str(torch.version.cuda),
        }
    return found
