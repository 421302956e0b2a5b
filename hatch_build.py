"""Builds the kernels for some processors beside their sources, where there is a C compiler.

They need no Python headers and no library. Whatever keeps them from being built leaves a package
that works without them, more slowly on such processors. A wheel for PyPI is to be built on an old
glibc and given its tag by `auditwheel repair`.
"""

import importlib.util
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_FOLDER = Path("bge_rerank_adapters/engine/models/cpu/kernels")


class KernelHook(BuildHookInterface):
    """Adds the library to a wheel, whose tag then says for which system it is."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Compile before the files of a wheel are gathered."""
        if sysconfig.get_platform() != "linux-x86_64":
            return
        kernels = _load(Path(self.root) / _FOLDER / "build.py")
        # What an earlier build has left would be another version's.
        kernels.LIBRARY.unlink(missing_ok=True)
        try:
            kernels.build()
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
            self.app.display_warning(
                "The kernels for processors with AMX were not built, so such processors will be "
                f"slower; a C compiler such as GCC 11 or Clang 14 builds them.\n{said}"
            )
            return
        build_data["artifacts"].append(f"/{(_FOLDER / kernels.LIBRARY.name).as_posix()}")
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-linux_x86_64"


def _load(path: Path) -> ModuleType:
    """Return a module of the package, without the package, whose requirements are not there yet."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
