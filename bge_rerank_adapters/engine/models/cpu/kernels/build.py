"""Builds the library of kernels from the sources beside this file, by the standard library alone.

The build hook, the Makefile and the loader all read from here what the sources are, so they agree
on them. As a script it builds the library in place; with `--list` it prints the sources.
"""

import os
import shlex
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "libkernels.so"
_FLAGS = "-O3 -std=gnu11 -fno-math-errno -fPIC -shared -fvisibility=hidden"


def sources(folder: Path = FOLDER) -> list[Path]:
    """Return what decides what is in a library, in order: the C files, and this one."""
    return [*sorted(folder.glob("*.[ch]")), folder / Path(__file__).name]


def checksum(folder: Path = FOLDER) -> int:
    """Return a number of 32 bits that changes with the sources; a library carries its own."""
    found = 0
    for path in sources(folder):
        found = zlib.crc32(path.read_bytes(), found)
    return found


def build(library: Path = LIBRARY, *, flags: tuple[str, ...] = ()) -> None:
    """Compile the sources beside this file into a library, by the compiler that `CC` names.

    Args:
        library: Where to put it; it appears there complete or not at all.
        flags: What the compiler is given beside the usual.

    Raises:
        OSError: The compiler does not start, or the library's folder cannot be written.
        ValueError: `CC` is no command line.
        subprocess.CalledProcessError: The compiler fails; `stderr` says why.
    """
    with tempfile.TemporaryDirectory(dir=library.parent) as made:
        command = [
            *shlex.split(os.environ.get("CC", "cc")),
            *_FLAGS.split(),
            *flags,
            f"-DBGE_SOURCES={checksum()}u",
            *("-o", f"{made}/{library.name}"),
            *(str(path) for path in sources() if path.suffix == ".c"),
        ]
        subprocess.run(  # noqa: S603 - the compiler that the caller's environment names
            command, check=True, capture_output=True, encoding="utf-8", errors="replace"
        )
        Path(made, library.name).replace(library)


if __name__ == "__main__":
    if sys.argv[1:] == ["--list"]:
        sys.stdout.write(" ".join(os.path.relpath(path) for path in sources()))
    else:
        build()
