"""Libraries of kernels that run on CPUs without the instructions that they are for."""

import subprocess
from pathlib import Path

import pytest

from bge_rerank_adapters.engine.models.cpu.kernels import build

TILES = "-include", str(Path(__file__).parent / "tile_emulation.h")


def built(folder: Path, *flags: str) -> Path:
    """Return a library of the package's sources; skips the test where nothing compiles them."""
    library = folder / build.LIBRARY.name
    try:
        build.build(library, flags=flags)
    except FileNotFoundError as error:
        pytest.skip(f"there is no C compiler: {error}")
    except subprocess.CalledProcessError as error:
        if "error" in error.stderr and "emulat" not in error.stderr:
            raise
        pytest.skip(f"the compiler cannot build it: {error.stderr}")
    return library
