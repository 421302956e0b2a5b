"""Which dtypes the hardware runs natively, by its capability flags and never by its name."""

import os
import platform
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

_X86 = ("x86_64", "AMD64", "i386", "i686")
# Instruction sets that multiply in each half type, as the system and torch name them.
_X86_FLAGS = {
    torch.bfloat16: ("amx_bf16", "avx512_bf16"),
    torch.float16: ("amx_fp16", "avx512_fp16"),
}
# Values of `ONEDNN_MAX_CPU_ISA` that allow such instructions.
_ALLOWING = {
    torch.bfloat16: ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10", "AMX"),
    torch.float16: ("AVX512_CORE_FP16", "AVX10", "AMX"),
}
# NVIDIA's lowest compute capability whose tensor cores take each half type (CUDA's programming
# guide, "Tensor cores").
_CUDA = {torch.float16: (7, 0), torch.bfloat16: (8, 0)}


class Verdict(NamedTuple):
    """Whether a device runs a dtype natively.

    Attributes:
        native: Whether it does; `None` if no flag says so.
        reason: Which flag decides, for the log.
    """

    native: bool | None
    reason: str


def runs_natively(device: torch.device, half: torch.dtype) -> Verdict:
    """Return whether a device runs a half type natively, by its flags.

    Args:
        device: An existing device.
        half: bfloat16 or float16.
    """
    ask = {"cpu": _on_cpu, "cuda": _on_cuda, "xpu": _on_xpu, "mps": _on_mps}.get(device.type)
    return ask(device, half) if ask else Verdict(None, f"no flag of {device.type} is known")


def _on_cpu(device: torch.device, half: torch.dtype) -> Verdict:
    del device
    name = dtype_name(half)
    lack = _onednn_lack(half)
    if lack is not None:
        return Verdict(False, lack)
    if platform.machine() not in _X86:
        # oneDNN has checked bfloat16 with the system; it has no check of float16's speed.
        if half == torch.float16:
            return Verdict(None, "no flag tells how fast this CPU is in float16")
        return Verdict(True, f"this CPU and oneDNN run {name}")
    found = [flag for flag in _X86_FLAGS[half] if flag in _cpu_flags()]
    if not found:
        return Verdict(False, f"this CPU has none of {', '.join(_X86_FLAGS[half])}")
    return Verdict(True, f"this CPU has {' and '.join(found)}, which oneDNN uses")


def _onednn_lack(half: torch.dtype) -> str | None:
    """Return why oneDNN does not use a half type here, or `None` if it may."""
    onednn: Any = torch.backends.mkldnn
    if not (onednn.is_available() and onednn.enabled):
        return "oneDNN is not there, or is switched off"
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if limit not in ("", "DEFAULT", "ALL") and not any(each in limit for each in _ALLOWING[half]):
        return f"ONEDNN_MAX_CPU_ISA={limit} leaves {dtype_name(half)} out"
    operator = (
        "_is_mkldnn_bf16_supported" if half == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    )
    try:
        supported = bool(getattr(torch.ops.mkldnn, operator)())
    except (AttributeError, RuntimeError):
        # A private operator, which a release of torch may drop; the other flags decide.
        return None
    return None if supported else f"oneDNN does not run {dtype_name(half)} on this CPU"


@cache
def _cpu_flags() -> frozenset[str]:
    """Return the names of this CPU's instruction sets, as far as they are known."""
    capabilities: Any = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        return frozenset(name for name, found in capabilities().items() if found is True)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def _on_cuda(device: torch.device, half: torch.dtype) -> Verdict:
    if torch.version.hip is not None:
        # Every GPU that ROCm supports has float16; torch reports only bfloat16.
        native = half == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
        return Verdict(native, f"ROCm says so of {dtype_name(half)}")
    capability = torch.cuda.get_device_capability(device)
    least = _CUDA[half]
    reason = (
        f"its compute capability is {_dotted(capability)}, "
        f"{dtype_name(half)} needs {_dotted(least)}"
    )
    return Verdict(capability >= least, reason)


def _on_xpu(device: torch.device, half: torch.dtype) -> Verdict:
    flag = "has_fp16" if half == torch.float16 else "has_bfloat16_conversions"
    native = torch.xpu.get_device_capability(device).get(flag)
    if native is None:
        return Verdict(None, f"this XPU does not tell {flag}")
    return Verdict(bool(native), f"this XPU's {flag} is {native}")


def _on_mps(device: torch.device, half: torch.dtype) -> Verdict:
    del device
    if half == torch.float16:
        return Verdict(True, "all of Apple's GPUs compute in float16")
    return Verdict(None, "no flag tells which of Apple's GPUs compute in bfloat16")


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in the settings."""
    return str(dtype).removeprefix("torch.")


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
