"""Which kernels are found on this machine, and what is said of those that are not."""

import errno
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bge_rerank_adapters import Reranker
from bge_rerank_adapters.engine.models.cpu.amx.bfloat16 import AmxLinear
from bge_rerank_adapters.engine.models.cpu.kernels import build, library
from bge_rerank_adapters.engine.models.cpu.kernels.library import AMX, InstructionSet
from tests.kernels.emulation import TILES, built_or_skip

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    library.forget()
    yield
    library.forget()


@pytest.fixture
def emulated() -> Path:
    return built_or_skip(*TILES)


@pytest.fixture
def with_tiles(monkeypatch, emulated):
    monkeypatch.setattr(build, "LIBRARY", emulated)
    if library.lack(AMX) is not None:
        pytest.skip("this CPU has no AVX512, by which tiles are emulated")
    library.forget()


@pytest.mark.parametrize("limit", ["AVX2", "avx512_core_bf16"])
def test_what_limits_onednn_limits_the_kernels(monkeypatch, limit):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert library.lack(AMX) == f"ONEDNN_MAX_CPU_ISA={limit.upper()} leaves AMX out"


@pytest.mark.usefixtures("with_tiles")
@pytest.mark.parametrize("limit", ["", "DEFAULT", "avx512_core_amx", "AVX10_1_512_AMX"])
def test_a_limit_that_allows_amx_allows_the_kernels(monkeypatch, limit):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert library.lack(AMX) is None


def test_without_the_library_other_layers_run(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "absent.so")
    assert "not built" in library.lack(AMX)
    with Reranker("tiny", dtype="bfloat16", device="cpu") as engine:
        assert len(engine.logits("query", ["some", "documents"])) == 2
    with pytest.raises(RuntimeError, match=r"kernels for AMX do not run here"):
        AmxLinear(torch.zeros(32, 32).bfloat16(), torch.zeros(32), slice_width=32)


def test_a_library_of_other_sources_is_left_alone(monkeypatch, caplog, emulated):
    monkeypatch.setattr(build, "LIBRARY", emulated)
    monkeypatch.setattr(build, "checksum", lambda: 1)
    assert "other sources" in library.lack(AMX)
    assert "install the package again" in caplog.text


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (-1, "this CPU has no AMX"),
        (errno.ENOSPC, "alternate signal stack is too small"),
        (errno.EINVAL, "Linux 5.16"),
        (errno.EPERM, "sandbox"),
        (errno.EIO, "does not enable AMX: Input/output error"),
    ],
)
def test_what_keeps_amx_from_running_is_named(monkeypatch, code, said):
    refusing = SimpleNamespace(bge_amx_lack=lambda: code)
    monkeypatch.setattr(library, "_found", cache(lambda: library._Found(refusing)))
    assert said in library.lack(AMX)
    with pytest.raises(RuntimeError, match="ask lack"):
        library.kernel(AMX, "linear")


def test_the_checksum_changes_with_any_source(tmp_path):
    for path in build.sources():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert build.checksum(tmp_path) == build.checksum()
    seen = {build.checksum()}
    for path in build.sources(tmp_path):
        path.write_bytes(path.read_bytes() + b"\n")
        seen.add(build.checksum(tmp_path))
    assert len(seen) == 1 + len(build.sources())
    c_files = {path.name for path in build.FOLDER.iterdir() if path.suffix in (".c", ".h")}
    # How they are compiled counts as well.
    assert {path.name for path in build.sources()} == c_files | {"build.py"}


def test_the_makefile_knows_all_sources():
    script = build.FOLDER / "build.py"
    listed = subprocess.run(
        [sys.executable, script, "--list"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    assert [ROOT / name for name in listed] == build.sources()
    assert {path.suffix for path in build.FOLDER.iterdir() if path.is_file()} >= {".c", ".h"}


def test_a_library_that_does_not_compile_leaves_nothing(tmp_path):
    with pytest.raises(subprocess.CalledProcessError):
        build.build(tmp_path / "library.so", flags=("-Dstatic=nonsense",))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("limit", "allowed"),
    [
        ("AVX2", []),
        ("AVX512_CORE", []),
        ("AVX2_VNNI", []),
        ("avx512_core_vnni", ["avx512_vnni"]),
        ("AVX512_CORE_BF16", ["avx512_vnni", "avx512_bf16"]),
        ("AVX512_CORE_AMX", ["avx512_vnni", "avx512_bf16", "amx"]),
        ("AVX10_1_512", ["avx512_vnni", "avx512_bf16"]),
    ],
)
def test_a_limit_leaves_out_each_set_above_it(monkeypatch, limit, allowed):
    everything = {f"bge_{each}_lack": lambda: 0 for each in InstructionSet}
    found = library._Found(SimpleNamespace(**everything))
    monkeypatch.setattr(library, "_found", cache(lambda: found))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert {each for each in InstructionSet if library.lack(each) is None} == set(allowed)


def test_a_missing_set_says_nothing_of_another(monkeypatch):
    codes = {"amx": -1, "avx512_vnni": 0, "avx512_bf16": -1}
    functions = {f"bge_{name}_lack": lambda code=code: code for name, code in codes.items()}
    found = library._Found(SimpleNamespace(**functions))
    monkeypatch.setattr(library, "_found", cache(lambda: found))
    assert library.lack(InstructionSet.AVX512_VNNI) is None
    assert library.lack(InstructionSet.AVX512_BF16) == "this CPU has no AVX512-BF16"
    assert library.lack(AMX) == "this CPU has no AMX"
