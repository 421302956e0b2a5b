"""Builds the kernels for some processors beside their sources, as a wheel is built for Linux.

They need no Python headers and no library. `BGE_RERANK_BUILD_KERNELS` says whether they are built:

- `auto`, the default: where a C compiler builds them. Whatever keeps it from that leaves a package
  that works without them, more slowly on such processors.
- `required`: a wheel without them is an error. Releases are built so.
- `none`: a wheel for every system.
"""

import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_FOLDER = Path("bge_rerank_adapters/engine/models/cpu/kernels")
_VARIABLE = "BGE_RERANK_BUILD_KERNELS"
_ALLOWED = "auto", "required", "none"
_PLATFORM = "linux-x86_64"


class KernelHook(BuildHookInterface):
    """Adds the library to a wheel, whose tag then says for which system it is."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Compile before the files of a wheel are gathered."""
        wanted = os.environ.get(_VARIABLE) or "auto"
        if wanted not in _ALLOWED:
            raise ValueError(f"{_VARIABLE} is {wanted!r}; it may be {', '.join(_ALLOWED)}.")
        kernels = _load(Path(self.root) / _FOLDER / "build.py")
        # What an earlier build has left would be another version's.
        kernels.LIBRARY.unlink(missing_ok=True)
        if wanted == "none":
            return
        lack = _build(kernels)
        if not lack:
            build_data["artifacts"].append(f"/{(_FOLDER / kernels.LIBRARY.name).as_posix()}")
            build_data["pure_python"] = False
            build_data["tag"] = "py3-none-linux_x86_64"
        elif wanted == "required":
            raise RuntimeError(f"The kernels were not built, and {_VARIABLE} asks for them. {lack}")
        elif sysconfig.get_platform() == _PLATFORM:
            self.app.display_warning(
                "The kernels for processors with AMX or AVX512 were not built, so such processors "
                f"will be slower; a C compiler such as GCC 11 or Clang 14 builds them. {lack}"
            )


def _build(kernels: ModuleType) -> str:
    """Build the library; returns what kept it from being built, or nothing."""
    if sysconfig.get_platform() != _PLATFORM:
        return f"They are for {_PLATFORM}; this is {sysconfig.get_platform()}."
    try:
        kernels.build()
    except subprocess.CalledProcessError as error:
        return f"The compiler failed:\n{error.stderr}"
    except (OSError, ValueError) as error:
        return f"The compiler did not start: {error}"
    return ""


def _load(path: Path) -> ModuleType:
    """Return a module of the package, without the package, whose requirements are not there yet."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
