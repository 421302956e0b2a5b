"""What is built for a release holds what it needs, and the wheel works without any host."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
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


LINUX = sysconfig.get_platform() == "linux-x86_64"
KERNELS = "bge_rerank_adapters/engine/models/cpu/kernels/libkernels.so"


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """What a wheel is built from; here, so that the kernels of the installed package stay."""
    folder = tmp_path_factory.mktemp("sources")
    for name in (".gitignore", "pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    package, left_out = ROOT / "bge_rerank_adapters", shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(package, folder / package.name, ignore=left_out)
    (folder / "notes.txt").write_text("of the repository")
    return folder


def hatch(
    sources: Path, folder: Path, target: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=sources, capture_output=True, text=True, env=environment)


def build(sources: Path, folder: Path, **environment: str) -> tuple[Path, str]:
    """Build a wheel; returns it and what was said."""
    done = hatch(sources, folder, "wheel", **environment)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl")), done.stderr + done.stdout


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory) -> Path:
    return build(sources, tmp_path_factory.mktemp("dist"))[0]


@pytest.fixture(scope="module")
def source_archive(sources, wheel, tmp_path_factory) -> Path:
    """Made where a wheel was built before, which has left its kernels."""
    folder = tmp_path_factory.mktemp("archive")
    done = hatch(sources, folder, "sdist")
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)  # noqa: S202 - made here
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
        "evaluation/xquad-r-en/corpus.jsonl",
        "evaluation/xquad-r-en/README.md",
        "engine/checkpoints/published-scores.json",
        "engine/models/encoder/sample-pairs.json",
        "py.typed",
    ):
        assert f"bge_rerank_adapters/{needed}" in names
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"bge_rerank_adapters"}


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_source_archive_holds_what_a_build_needs_and_nothing_else(source_archive):
    with tarfile.open(source_archive) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    needed = {".gitignore", "LICENSE", "PKG-INFO", "README.md", "hatch_build.py", "pyproject.toml"}
    assert {name.partition("/")[0] for name in names} == needed | {"bge_rerank_adapters"}
    assert [name for name in names if name.endswith((".so", ".pyc"))] == []


def test_a_wheel_from_the_source_archive_is_that_from_the_checkout(wheel, source_archive, tmp_path):
    with tarfile.open(source_archive) as archive:
        archive.extractall(tmp_path, filter="data")
    [unpacked] = tmp_path.iterdir()
    again, _ = build(unpacked, tmp_path / "dist")
    assert again.name == wheel.name
    assert contents(again) == contents(wheel)


def test_what_is_released_stays_within_the_indexs_limit(wheel, source_archive):
    # An index takes files of 100 MB; the checkpoint fills most of these.
    assert max(wheel.stat().st_size, source_archive.stat().st_size) <= 50_000_000


@pytest.mark.skipif(
    not LINUX or shutil.which("cc") is None,
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
    assert ("were not built" in said) == LINUX


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "'no end"])
def test_a_release_without_kernels_is_an_error(sources, tmp_path, compiler):
    done = hatch(sources, tmp_path, "wheel", CC=compiler, BGE_RERANK_BUILD_KERNELS="required")
    assert done.returncode
    assert "BGE_RERANK_BUILD_KERNELS asks for them" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_for_every_system_can_be_asked_for(wheel, sources, tmp_path):
    plain, said = build(sources, tmp_path, BGE_RERANK_BUILD_KERNELS="none")
    assert plain.name.endswith("-py3-none-any.whl")
    assert KERNELS not in contents(plain)
    assert "were not built" not in said


def test_another_wish_for_kernels_is_an_error(sources, tmp_path):
    done = hatch(sources, tmp_path, "wheel", BGE_RERANK_BUILD_KERNELS="yes")
    assert done.returncode
    assert "'yes'; it may be auto, required, none" in done.stderr


@pytest.mark.skipif(not LINUX or shutil.which("objdump") is None, reason="of Linux's linker")
def test_kernels_ask_for_no_newer_glibc_than_torch_does(wheel, tmp_path):
    """manylinux_2_28, of which `auditwheel repair` makes the tag."""
    library = tmp_path / "libkernels.so"
    library.write_bytes(contents(wheel)[KERNELS])
    command = [shutil.which("objdump"), "-T", library]
    listed = subprocess.run(command, check=True, capture_output=True, text=True)
    versions = re.findall(r"GLIBC_(\d+)\.(\d+)", listed.stdout)
    assert versions
    assert max((int(major), int(minor)) for major, minor in versions) <= (2, 28)


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
