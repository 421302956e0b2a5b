"""The built wheel holds what it needs, and works where no host is installed."""

import os
import platform
import shutil
import subprocess
import sys
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


KERNELS = "bge_rerank_adapters/models/kernels/libamx.so"


def build(folder: Path, **environment: str) -> tuple[Path, str]:
    """Build a wheel; returns it and what was said."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    environment = {**os.environ, **environment}
    done = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True, env=environment
    )
    return next(folder.glob("*.whl")), done.stderr + done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("dist"))[0]


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
        "tiny/model.safetensors",
        "tiny/README.md",
        "demo/collection.jsonl",
        "demo/README.md",
        "published-scores.json",
        "models/sample-pairs.json",
        "py.typed",
    ):
        assert f"bge_rerank_adapters/{needed}" in names
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"bge_rerank_adapters"}


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or shutil.which("cc") is None,
    reason="kernels are for Linux on x86-64, and need a compiler",
)
def test_kernels_are_built_where_they_can_run(wheel):
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl")
    assert KERNELS in zipfile.ZipFile(wheel).namelist()


def test_without_a_compiler_the_wheel_is_for_every_system(tmp_path):
    wheel, said = build(tmp_path, CC="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert KERNELS not in zipfile.ZipFile(wheel).namelist()
    if sys.platform == "linux" and platform.machine() == "x86_64":
        assert "were not built" in said
        assert "no-such-compiler" in said


def test_bundled_checkpoint_is_at_most_48_megabytes(installed):
    folder = installed / "bge_rerank_adapters" / "tiny"
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
