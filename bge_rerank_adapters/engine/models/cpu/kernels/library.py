"""Finds the library of kernels, and which of them this machine runs.

A file of kernels is for one instruction set. Each set is there or not for itself: what keeps one
from running says nothing of another.
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
# Of what an instruction set's kernels are called with, by the end of their names.
_ARGUMENTS = {
    "linear": (_POINTER, *[_SIZE] * 5, *[_POINTER] * 3, _SIZE),
    "int8_linear": (_POINTER, _POINTER, *[_SIZE] * 5, _POINTER, _SIZE),
    "after_attention": (_POINTER, _POINTER, _POINTER, _SIZE, _POINTER),
    "int8_after_attention": (_POINTER, _POINTER, _POINTER, _SIZE, _POINTER),
    "attention": (*[_POINTER] * 4, *[_SIZE] * 5, _FLAG, _POINTER),
}


class InstructionSet(StrEnum):
    """What a CPU may have; its value begins the names of the kernels for it."""

    AMX = "amx"
    AVX512_VNNI = "avx512_vnni"
    AVX512_BF16 = "avx512_bf16"


AMX = InstructionSet.AMX
AVX512_VNNI = InstructionSet.AVX512_VNNI
AVX512_BF16 = InstructionSet.AVX512_BF16
_NAMES = {AMX: "AMX", AVX512_VNNI: "AVX512-VNNI", AVX512_BF16: "AVX512-BF16"}
_KERNELS = {
    AMX: tuple(_ARGUMENTS),
    AVX512_VNNI: ("int8_linear", "int8_after_attention", "attention"),
    AVX512_BF16: ("attention",),
}
# Of oneDNN's limits, those that let a set be used; all its others are below.
_ALLOWING = {
    AMX: ("AMX",),
    AVX512_VNNI: ("AVX512_CORE_", "AVX10_1_512"),
    AVX512_BF16: ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10_1_512"),
}
# What the system's refusal to let a process use a set means, and what to do.
_REFUSALS = {
    errno.ENOSPC: (
        "a thread's alternate signal stack is too small for AMX's registers, so that the system "
        "refuses them; load the model before what sets such a stack up (a crash reporter, mostly)"
    ),
    errno.EINVAL: "this system cannot enable AMX; Linux 5.16 or later can",
    errno.EPERM: "a sandbox around this process forbids arch_prctl, which enables AMX",
    errno.ENOSYS: "a sandbox around this process lacks arch_prctl, which enables AMX",
}


class _Found(NamedTuple):
    """The library, or why there is none to be used."""

    library: ctypes.CDLL | None
    lack: str = ""


def lack(instruction_set: InstructionSet) -> str | None:
    """Return why the kernels for a set do not run on this machine, or `None` if they do."""
    return _lack(instruction_set) or None


def kernel(instruction_set: InstructionSet, name: str) -> Callable[..., int]:
    """Return a kernel by the end of its name, `"linear"` for one; it returns whether it failed.

    Raises:
        RuntimeError: The set's kernels do not run here; `lack` says why.
    """
    found: Callable[..., int] = getattr(_library(instruction_set), f"bge_{instruction_set}_{name}")
    return found


def pack(instruction_set: InstructionSet) -> Callable[[int, int, int, int], None]:
    """Return what lays out a weight for a set's kernels.

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
        _log.warning("%s is not of the sources beside it: install the package again", build.LIBRARY)
        return _Found(None, "they were built from other sources; install the package again")
    library.bge_pack.argtypes, library.bge_pack.restype = (_POINTER, _SIZE, _SIZE, _POINTER), None
    for instruction_set, names in _KERNELS.items():
        for name in names:
            getattr(library, f"bge_{instruction_set}_{name}").argtypes = _ARGUMENTS[name]
    return _Found(library)


def forget() -> None:
    """Look for the library again when it is asked for next."""
    _found.cache_clear()
    _lack.cache_clear()
