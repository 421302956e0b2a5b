"""Loads the library of kernels, and finds which of them this machine runs.

Each file of kernels is for one instruction set, and each set is checked on its own.
"""

import ctypes
import errno
import logging
import os
from collections.abc import Callable
from enum import StrEnum
from functools import cache
from typing import NamedTuple

from bge_rerank_adapters.engine.models.cpu.kernels import build

_log = logging.getLogger(__name__)

_SIZE, _POINTER, _FLAG = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32
# Argument types of the kernels, by the end of their names.
_ARGUMENTS = {
    "linear": (_POINTER, *[_SIZE] * 5, *[_POINTER] * 3, _SIZE),
    "int8_linear": (_POINTER, _POINTER, *[_SIZE] * 5, _POINTER, _SIZE),
    "after_attention": (_POINTER, _POINTER, _POINTER, _SIZE, _POINTER),
    "int8_after_attention": (_POINTER, _POINTER, _POINTER, _SIZE, _POINTER),
    "attention": (*[_POINTER] * 4, *[_SIZE] * 5, _FLAG, _POINTER),
    **dict.fromkeys(
        ("stack_memory", "stack_run", "int8_stack_memory", "int8_stack_run"), (_POINTER,)
    ),
}


class InstructionSet(StrEnum):
    """An instruction set; its value is part of the names of its kernels."""

    AMX = "amx"
    AVX512_VNNI = "avx512_vnni"
    AVX512_BF16 = "avx512_bf16"


AMX = InstructionSet.AMX
AVX512_VNNI = InstructionSet.AVX512_VNNI
AVX512_BF16 = InstructionSet.AVX512_BF16
_NAMES = {AMX: "AMX", AVX512_VNNI: "AVX512-VNNI", AVX512_BF16: "AVX512-BF16"}
_KERNELS = {
    AMX: tuple(_ARGUMENTS),
    AVX512_VNNI: tuple(name for name in _ARGUMENTS if "int8" in name or name == "attention"),
    AVX512_BF16: ("attention",),
}
# Values of ONEDNN_MAX_CPU_ISA that allow each set; all others are below it.
_ALLOWING = {
    AMX: ("AMX",),
    AVX512_VNNI: ("AVX512_CORE_", "AVX10_1_512"),
    AVX512_BF16: ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10_1_512"),
}
# Why the system refuses a process the use of AMX, by error number, and what to do.
_REFUSALS = {
    errno.ENOSPC: (
        "a thread's alternate signal stack is too small for AMX's registers, so the system refuses "
        "them; load the model before the library that sets up that stack (often a crash reporter)"
    ),
    errno.EINVAL: "this system cannot enable AMX; Linux 5.16 or later can",
    errno.EPERM: "a sandbox around this process forbids arch_prctl, which enables AMX",
    errno.ENOSYS: "a sandbox around this process lacks arch_prctl, which enables AMX",
}


class _Found(NamedTuple):
    """The library, or why there is no usable one."""

    library: ctypes.CDLL | None
    lack: str = ""


def lack(instruction_set: InstructionSet) -> str | None:
    """Return why the kernels of an instruction set do not run here, or `None` if they do."""
    return _lack(instruction_set) or None


def kernel(instruction_set: InstructionSet, name: str) -> Callable[..., int]:
    """Return a kernel by the end of its name, such as `"linear"`; its result is 0 for success.

    The result of one whose name ends with "memory" is a number of bytes.

    Raises:
        RuntimeError: The set's kernels do not run here; `lack` says why.
    """
    found: Callable[..., int] = getattr(_library(instruction_set), f"bge_{instruction_set}_{name}")
    return found


def address(instruction_set: InstructionSet, name: str) -> int:
    """Return the address of a kernel, for other kernels to call.

    Raises:
        RuntimeError: The set's kernels do not run here; `lack` says why.
    """
    found = getattr(_library(instruction_set), f"bge_{instruction_set}_{name}")
    return ctypes.cast(found, _POINTER).value or 0


def pack(instruction_set: InstructionSet) -> Callable[[int, int, int, int], None]:
    """Return the function that packs a weight for the kernels of an instruction set.

    Raises:
        RuntimeError: They do not run here; `lack` says why.
    """
    found: Callable[[int, int, int, int], None] = _library(instruction_set).bge_pack
    return found


def _library(instruction_set: InstructionSet) -> ctypes.CDLL:
    library = _found().library
    if library is None or _lack(instruction_set):
        raise RuntimeError(
            f"The kernels for {_NAMES[instruction_set]} do not run here; ask lack() first."
        )
    return library


@cache
def _lack(instruction_set: InstructionSet) -> str:
    name = _NAMES[instruction_set]
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    allowing = "", "DEFAULT", "ALL"
    if limit not in allowing and not any(each in limit for each in _ALLOWING[instruction_set]):
        return f"ONEDNN_MAX_CPU_ISA={limit} leaves {name} out"
    found = _found()
    if found.library is None:
        return found.lack
    code: int = getattr(found.library, f"bge_{instruction_set}_lack")()
    if code > 0:
        return _REFUSALS.get(code) or f"the system does not enable {name}: {os.strerror(code)}"
    return f"this CPU has no {name}" if code else ""


@cache
def _found() -> _Found:
    try:
        library = ctypes.CDLL(str(build.LIBRARY))
    except OSError:
        return _Found(None, "they were not built for this system")
    library.bge_sources.restype = ctypes.c_uint32
    if library.bge_sources() != build.checksum():
        _log.warning("%s was built from other sources: install the package again", build.LIBRARY)
        return _Found(None, "they were built from other sources; install the package again")
    library.bge_pack.argtypes, library.bge_pack.restype = (_POINTER, _SIZE, _SIZE, _POINTER), None
    for instruction_set, names in _KERNELS.items():
        for name in names:
            function = getattr(library, f"bge_{instruction_set}_{name}")
            function.argtypes = _ARGUMENTS[name]
            function.restype = _SIZE if name.endswith("memory") else ctypes.c_int
    return _Found(library)


def forget() -> None:
    """Load the library again on its next use."""
    _found.cache_clear()
    _lack.cache_clear()
