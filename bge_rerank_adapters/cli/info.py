"""`bge-rerank info`: this machine's devices, and what "auto" chooses."""

import platform
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.table import Table

_PACKAGES = (
    *("bge-rerank-adapters", "torch", "transformers", "tokenizers", "safetensors"),
    *("huggingface_hub", "numpy"),
    *("langchain-core", "llama-index-core", "pymilvus", "FlagEmbedding"),
)


def info() -> None:
    """Show devices, dtypes with their timings, what "auto" picks and why, layers and versions."""
    # Imported here, since torch takes seconds.
    from bge_rerank_adapters.engine.models.capabilities import dtype_name
    from bge_rerank_adapters.engine.models.devices import (
        choose_dtype,
        device_name,
        dtype_timings,
        resolve_device,
    )
    from bge_rerank_adapters.engine.models.encoder.kit import describe_kits

    console = Console()
    device = resolve_device("auto")
    dtype, reason = choose_dtype(device)
    picked = dtype_name(dtype)
    console.print(f'device "auto": {device} ({device_name(device)})', highlight=False)
    console.print(f'dtype "auto":  {picked} ({reason})', highlight=False)
    console.print(_timings(dtype_timings(device), picked))
    console.print(
        "The device's capability flags pick the dtype, unless timings clearly contradict them; "
        "int8 is never picked automatically.\n",
        highlight=False,
    )
    console.print(_kits(describe_kits(device, dtype)))
    console.print(_versions())


def _timings(timings: dict[str, float], picked: str) -> Table:
    table = Table("dtype", "a feed-forward block", "against float32", "verdict")
    for name, seconds in timings.items():
        speed = timings["float32"] / seconds
        if name == picked:
            verdict = "picked"
        elif not speed:
            verdict = "cannot run here"
        else:
            verdict = ""
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
