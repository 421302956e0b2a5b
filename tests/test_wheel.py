"""The built wheel holds what it needs, and works where no host is installed."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK_HOSTS = """
import runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("langchain_core", "langchain_classic", "llama_index"):
            raise ImportError(f"{name} is absent", name=name)

sys.meta_path.insert(0, Absent())
"""


KERNELS = "bge_rerank_adapters/engine/models/cpu/kernels/libkernels.so"


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """What a wheel is built from; here, so that the kernels of the installed package stay."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    package, left_out = ROOT / "bge_rerank_adapters", shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(package, folder / package.name, ignore=left_out)
    return folder


def build(sources: Path, folder: Path, **environment: str) -> tuple[Path, str]:
    """Build a wheel; returns it and what was said."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    environment = {**os.environ, **environment}
    done = subprocess.run(
        command, cwd=sources, check=True, capture_output=True, text=True, env=environment
    )
    return next(folder.glob("*.whl")), done.stderr + done.stdout


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory) -> Path:
    return build(sources, tmp_path_factory.mktemp("dist"))[0]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run_without_hosts(code: str, installed: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCK_HOSTS + code],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=installed,
        env={**os.environ, "PYTHONPATH": str(installed), "COLUMNS": "200"},
    )


def test_wheel_holds_the_checkpoint_and_the_data_and_nothing_of_the_repository(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for needed in (
        "engine/checkpoints/tiny/model.safetensors",
        "engine/checkpoints/tiny/README.md",
        "cli/demo/collection.jsonl",
        "cli/demo/README.md",
        "engine/checkpoints/published-scores.json",
        "engine/models/encoder/sample-pairs.json",
        "py.typed",
    ):
        assert f"bge_rerank_adapters/{needed}" in names
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"bge_rerank_adapters"}


@pytest.mark.skipif(
    sysconfig.get_platform() != "linux-x86_64" or shutil.which("cc") is None,
    reason="kernels are for Linux on x86-64, and need a compiler",
)
def test_kernels_are_built_where_they_can_run(wheel):
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl")
    assert KERNELS in zipfile.ZipFile(wheel).namelist()


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "'no end"])
def test_without_a_compiler_the_wheel_is_for_every_system(wheel, sources, tmp_path, compiler):
    # Not even with what the build before has left.
    wheel, said = build(sources, tmp_path, CC=compiler)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert KERNELS not in zipfile.ZipFile(wheel).namelist()
    if sysconfig.get_platform() == "linux-x86_64":
        assert "were not built" in said


def test_bundled_checkpoint_is_at_most_48_megabytes(installed):
    folder = installed / "bge_rerank_adapters" / "engine/checkpoints/tiny"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 48_000_000


def test_engine_and_demo_work_without_any_host(installed):
    ran = run_without_hosts(
        "import bge_rerank_adapters\n"
        "print(bge_rerank_adapters.__file__)\n"
        "sys.argv = ['bge-rerank', 'demo']\n"
        "runpy.run_module('bge_rerank_adapters', run_name='__main__')\n",
        installed,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(str(installed))
    assert "Dartmouth" in ran.stdout
    for extra in ("langchain", "llama-index"):
        assert f'pip install "bge-rerank-adapters[{extra}]"' in ran.stdout


@pytest.mark.parametrize(
    ("module", "extra"), [("langchain", "langchain"), ("llama_index", "llama-index")]
)
def test_adapter_names_its_extra(installed, module, extra):
    ran = run_without_hosts(f"import bge_rerank_adapters.{module}\n", installed)
    assert ran.returncode == 1
    assert f'pip install "bge-rerank-adapters[{extra}]"' in ran.stderr
