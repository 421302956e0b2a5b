"""`bge-rerank info`: what this machine has, and what "auto" makes of it."""

import platform
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.table import Table

_PACKAGES = (
    *("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy"),
    *("langchain-core", "llama-index-core", "pymilvus", "FlagEmbedding"),
)


def info() -> None:
    """Show devices, dtypes with their timings, what "auto" picks and why, and versions."""
    # Imported here, since torch takes seconds.
    import torch

    from bge_rerank_adapters import __version__
    from bge_rerank_adapters.models.devices import (
        WORTHWHILE_SPEEDUP,
        dtype_timings,
        resolve_device,
        resolve_dtype,
    )

    console = Console()
    device = resolve_device("auto")
    picked = resolve_dtype("auto", device)
    timings = dtype_timings(device)
    full = timings[torch.float32]
    console.print(f'device "auto": {device} ({_device_name(device)})', highlight=False)
    console.print(f'dtype "auto":  {str(picked).removeprefix("torch.")}', highlight=False)
    table = Table("dtype", "a feed-forward block", "against float32", "verdict")
    for dtype, seconds in timings.items():
        name = str(dtype).removeprefix("torch.")
        if seconds == float("inf"):
            table.add_row(name, "-", "-", "cannot run here, or is emulated")
            continue
        speed = full / seconds
        verdict = "picked" if dtype == picked else "float32 is as fast or nearly so"
        if dtype == torch.float32 and dtype != picked:
            verdict = "slower"
        elif dtype != picked and speed >= WORTHWHILE_SPEEDUP:
            verdict = "another half type is preferred"
        table.add_row(name, f"{1000 * seconds:.2f} ms", f"{speed:.2f}x", verdict)
    console.print(table)
    console.print(
        f"A half type is picked where it is {WORTHWHILE_SPEEDUP} times as fast as float32; int8 "
        "never unless asked for.\n",
        highlight=False,
    )
    versions = Table("package", "version", title=f"bge-rerank-adapters {__version__}")
    versions.add_row("python", f"{platform.python_version()} on {platform.platform(terse=True)}")
    for name in _PACKAGES:
        versions.add_row(name, _version(name))
    console.print(versions)


def _device_name(device: object) -> str:
    import torch

    kind = str(device).partition(":")[0]
    if kind == "cuda":
        return torch.cuda.get_device_name(str(device))
    return f"{torch.get_num_threads()} threads" if kind == "cpu" else kind


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
