"""Builds the kernels for processors with AMX beside their source, where there is a C compiler.

They need no Python headers and no library. Whatever keeps them from being built leaves a package
that works without them, more slowly on such processors.
"""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_SOURCES = Path("bge_rerank_adapters/models/kernels")
_LIBRARY = _SOURCES / "libamx.so"
_FLAGS = "-O3 -std=gnu11 -fno-math-errno -fPIC -shared -fvisibility=hidden -pthread"


class KernelHook(BuildHookInterface):
    """Adds the library to a wheel, whose tag then says for which system it is."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Compile before the files of a wheel are gathered."""
        if sys.platform != "linux" or platform.machine() != "x86_64":
            return
        root = Path(self.root)
        made = root / _LIBRARY.with_suffix(".tmp")
        command = [*shlex.split(os.environ.get("CC", "cc")), *_FLAGS.split(), "-o", str(made)]
        try:
            subprocess.run(  # noqa: S603 - the compiler that who builds has named
                [*command, *map(str, sorted((root / _SOURCES).glob("*.c")))],
                check=True,
                capture_output=True,
                text=True,
            )
        except (OSError, subprocess.CalledProcessError) as error:
            said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
            self.app.display_warning(
                "The kernels for processors with AMX were not built, so such processors will be "
                f"slower; a C compiler such as GCC 11 or Clang 14 builds them.\n{said}"
            )
            return
        made.replace(root / _LIBRARY)
        build_data["artifacts"].append(f"/{_LIBRARY.as_posix()}")
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-linux_x86_64"
