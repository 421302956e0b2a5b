"""`bge-rerank info`: what this machine has, and what "auto" makes of it."""

import platform
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.table import Table

_PACKAGES = (
    *(
        "bge-rerank-adapters",
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
        "huggingface_hub",
        "numpy",
    ),
    *("langchain-core", "llama-index-core", "pymilvus", "FlagEmbedding"),
)


def info() -> None:
    """Show devices, dtypes with their timings, what "auto" picks and why, layers and versions."""
    # Imported here, since torch takes seconds.
    from bge_rerank_adapters.engine.models.devices import (
        WORTHWHILE_SPEEDUP,
        device_name,
        dtype_timings,
        resolve_device,
        resolve_dtype,
    )
    from bge_rerank_adapters.engine.models.encoder.kit import describe_kits

    console = Console()
    device = resolve_device("auto")
    dtype = resolve_dtype("auto", device)
    picked = str(dtype).removeprefix("torch.")
    console.print(f'device "auto": {device} ({device_name(device)})', highlight=False)
    console.print(f'dtype "auto":  {picked}', highlight=False)
    console.print(_timings(dtype_timings(device), picked, worthwhile=WORTHWHILE_SPEEDUP))
    console.print(
        f"A half type is picked where it is {WORTHWHILE_SPEEDUP} times as fast as float32; int8 "
        "only where it is asked for.\n",
        highlight=False,
    )
    console.print(_kits(describe_kits(device, dtype)))
    console.print(_versions())


def _timings(timings: dict[str, float], picked: str, *, worthwhile: float) -> Table:
    table = Table("dtype", "a feed-forward block", "against float32", "verdict")
    for name, seconds in timings.items():
        speed = timings["float32"] / seconds
        if name == picked:
            verdict = "picked"
        elif not speed:
            verdict = "cannot run here"
        elif name == "float32":
            verdict = "slower"
        else:
            verdict = "another is preferred" if speed >= worthwhile else "not fast enough"
        shown = (f"{1000 * seconds:.2f} ms", f"{speed:.2f}x") if speed else ("-", "-")
        table.add_row(name, *shown, verdict)
    return table


def _kits(kits: list[tuple[str, str]]) -> Table:
    table = Table("layers of encoders", "at bge-reranker-base's size")
    for row in kits:
        table.add_row(*row)
    return table


def _versions() -> Table:
    table = Table("package", "version")
    table.add_row("python", f"{platform.python_version()}, {platform.platform(terse=True)}")
    for name in _PACKAGES:
        table.add_row(name, _version(name))
    return table


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
