"""Kernels of every instruction set that tests can run here, some of them by emulation."""

import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from bge_rerank_adapters.engine.models.cpu.kernels import build, library
from bge_rerank_adapters.engine.models.cpu.kernels.library import InstructionSet

TILES = "-include", str(Path(__file__).parent / "tile_emulation.h")
# By name: the instruction set, how its library is compiled, and the limit that leaves out what the
# package would prefer to it.
KINDS = {
    "amx": (InstructionSet.AMX, (), "DEFAULT"),
    "amx emulated": (InstructionSet.AMX, TILES, "DEFAULT"),
    "avx512_vnni": (InstructionSet.AVX512_VNNI, (), "AVX512_CORE_BF16"),
    "avx512_bf16": (InstructionSet.AVX512_BF16, (), "AVX512_CORE_BF16"),
}
# Removed as the tests end.
_folders: list[tempfile.TemporaryDirectory[str]] = []


@cache
def built(*flags: str) -> Path | str:
    """Return a library of the package's sources, or why there is none."""
    if sysconfig.get_platform() != "linux-x86_64":
        return "kernels are for Linux on x86-64"
    _folders.append(tempfile.TemporaryDirectory())
    made = Path(_folders[-1].name) / build.LIBRARY.name
    try:
        build.build(made, flags=flags)
    except FileNotFoundError as error:
        return f"there is no C compiler: {error}"
    except subprocess.CalledProcessError as error:
        return f"the compiler fails: {error.stderr}"
    return made


def built_or_skip(*flags: str) -> Path:
    """Return likewise, or skip the test."""
    made = built(*flags)
    if isinstance(made, str):
        pytest.skip(made)
    return made


@contextmanager
def using(kind: str) -> Iterator[InstructionSet]:
    """Let the package find one kind of kernels; skips where they do not run."""
    instruction_set, flags, limit = KINDS[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "LIBRARY", built_or_skip(*flags))
        patch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        library.forget()
        found = library.lack(instruction_set)
        if found is not None:
            library.forget()
            pytest.skip(f"kernels for {instruction_set} do not run here: {found}")
        yield instruction_set
    library.forget()
