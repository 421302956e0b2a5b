"""Builds the kernels for processors with AMX beside their sources, where there is a C compiler.

They need no Python headers and no library. Whatever keeps them from being built leaves a package
that works without them, more slowly on such processors. A wheel for PyPI is to be built on an old
glibc and given its tag by `auditwheel repair`.
"""

import os
import shlex
import subprocess
import sysconfig
import tempfile
import zlib
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_FOLDER = Path("bge_rerank_adapters/engine/models/cpu/kernels")
_LIBRARY = _FOLDER / "libamx.so"
_FLAGS = "-O3 -std=gnu11 -fno-math-errno -fPIC -shared -fvisibility=hidden -pthread"


class KernelHook(BuildHookInterface):
    """Adds the library to a wheel, whose tag then says for which system it is."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Compile before the files of a wheel are gathered."""
        if sysconfig.get_platform() != "linux-x86_64":
            return
        root = Path(self.root)
        # What an earlier build has left would be another version's.
        (root / _LIBRARY).unlink(missing_ok=True)
        try:
            _compile(root / _FOLDER, root / _LIBRARY)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
            self.app.display_warning(
                "The kernels for processors with AMX were not built, so such processors will be "
                f"slower; a C compiler such as GCC 11 or Clang 14 builds them.\n{said}"
            )
            return
        build_data["artifacts"].append(f"/{_LIBRARY.as_posix()}")
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-linux_x86_64"


def _compile(folder: Path, library: Path) -> None:
    sources = sorted(folder.glob("*.c"))
    checksum = 0
    for path in sorted(folder.glob("*.[ch]")):
        checksum = zlib.crc32(path.read_bytes(), checksum)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        command = [
            *shlex.split(os.environ.get("CC", "cc")),
            *_FLAGS.split(),
            f"-DBGE_AMX_SOURCES={checksum}u",
            *("-o", f"{made}/{library.name}"),
            *map(str, sources),
        ]
        subprocess.run(  # noqa: S603 - the compiler that who builds has named
            command, check=True, capture_output=True, encoding="utf-8", errors="replace"
        )
        Path(made, library.name).replace(library)
