"""Builds the library of kernels from the sources beside this file; needs only a C compiler.

The build hook, the Makefile and the loader all take the list of sources from here. As a script it
builds the library in place; with `--list` it prints the sources.
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
    """Return the files that determine a library, in order: the C files, and this one."""
    return [*sorted(folder.glob("*.[ch]")), folder / Path(__file__).name]


def checksum(folder: Path = FOLDER) -> int:
    """Return a 32-bit checksum of the sources; a library stores that of its own."""
    found = 0
    for path in sources(folder):
        found = zlib.crc32(path.read_bytes(), found)
    return found


def build(library: Path = LIBRARY, *, flags: tuple[str, ...] = ()) -> None:
    """Compile the sources beside this file into a library, with the compiler in `CC`.

    Args:
        library: The file to write; it is replaced in one step.
        flags: Additional compiler flags.

    Raises:
        OSError: The compiler does not start, or the library's folder cannot be written.
        ValueError: `CC` is not a valid command line.
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
        subprocess.run(  # noqa: S603 - the compiler from the caller's environment
            command, check=True, capture_output=True, encoding="utf-8", errors="replace"
        )
        Path(made, library.name).replace(library)


if __name__ == "__main__":
    if sys.argv[1:] == ["--list"]:
        sys.stdout.write(" ".join(os.path.relpath(path) for path in sources()))
    else:
        build()
