"""The choice of a device and of a dtype."""

import os
import platform
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks.dtype_choice import choices
from bge_rerank_adapters import DeviceError, Reranker
from bge_rerank_adapters.engine.models import capabilities, devices
from bge_rerank_adapters.engine.models.base import default_pack_tokens


@pytest.fixture
def machine(monkeypatch):
    """Pretends that a machine has some accelerators."""

    def pretend(**counts):
        monkeypatch.setattr(devices, "_device_count", lambda kind: counts.get(kind, 0))

    return pretend


@pytest.mark.parametrize(
    ("counts", "name", "found"),
    [
        ({}, "auto", "cpu"),
        ({}, "cpu", "cpu"),
        ({}, "cpu:3", "cpu"),
        ({"cuda": 2}, "auto", "cuda:0"),
        ({"cuda": 2, "xpu": 1}, "auto", "cuda:0"),
        ({"xpu": 1}, "auto", "xpu:0"),
        ({"mps": 1}, "auto", "mps"),
        ({"mps": 1}, "mps", "mps"),
        ({"cuda": 2}, "cuda", "cuda:0"),
        ({"cuda": 2}, "cuda:1", "cuda:1"),
    ],
)
def test_devices_are_resolved(machine, counts, name, found):
    machine(**counts)
    assert str(devices.resolve_device(name)) == found


@pytest.mark.parametrize(
    ("counts", "name", "message"),
    [
        ({}, "cuda", "device 'cuda' is not available on this machine .none found of kind cuda"),
        ({}, "mps", "device 'mps' is not available"),
        ({"cuda": 2}, "cuda:2", "device 'cuda:2' is not available on this machine .2 found"),
    ],
)
def test_absent_devices_are_refused(machine, counts, name, message):
    machine(**counts)
    with pytest.raises(DeviceError, match=message):
        devices.resolve_device(name)


@pytest.mark.parametrize("kind", ["cuda:99", "xpu:99", "npu:99", "hpu:99", "mtia:99"])
def test_devices_that_no_machine_has_are_refused(kind):
    with pytest.raises(DeviceError, match=f"'{kind}' is not available"):
        devices.resolve_device(kind)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_named_dtype_is_taken_as_it_is(name):
    assert devices.resolve_dtype(name, torch.device("cpu")) is getattr(torch, name)


def test_auto_is_a_dtype_and_stays_the_same():
    found = devices.resolve_dtype("auto", torch.device("cpu"))
    assert found in (torch.float32, torch.bfloat16, torch.float16)
    assert devices.resolve_dtype("auto", torch.device("cpu")) is found


def choose(monkeypatch, kind, *, told, speeds=(1.0, 1.0), wide_range=False):
    """Return what "auto" is where flags say this of bfloat16 and float16, and timings that."""
    halves = (torch.bfloat16, torch.float16)
    flags, given = dict(zip(halves, told, strict=True)), dict(zip(halves, speeds, strict=True))
    monkeypatch.setattr(
        devices, "runs_natively", lambda _, half: devices.Verdict(flags[half], f"flag of {half}")
    )
    monkeypatch.setattr(devices, "_speed", lambda _, half: given[half])
    devices._choose.cache_clear()
    try:
        return devices.choose_dtype(torch.device(kind), wide_range=wide_range)
    finally:
        devices._choose.cache_clear()


@pytest.mark.parametrize(
    ("kind", "told", "found"),
    [
        ("cpu", (True, True), torch.bfloat16),
        ("cpu", (False, True), torch.float16),
        ("cpu", (False, False), torch.float32),
        ("cuda", (True, True), torch.float16),
        ("cuda", (True, False), torch.bfloat16),
        ("mps", (None, True), torch.float16),
    ],
)
def test_auto_follows_the_flags_of_the_hardware(monkeypatch, kind, told, found):
    # As a busy machine may time them: of no help, or a little wrong.
    for speeds in ((1.0, 1.0), (0.6, 1.9), (1.9, 0.6)):
        assert choose(monkeypatch, kind, told=told, speeds=speeds).dtype is found


@pytest.mark.parametrize(
    ("told", "speeds", "found"),
    [
        ((True, False), (0.4, 1.0), torch.float32),
        ((True, False), (0.0, 1.0), torch.float32),
        ((False, False), (2.1, 1.0), torch.bfloat16),
        ((None, False), (1.4, 1.0), torch.bfloat16),
        ((None, False), (1.2, 1.0), torch.float32),
        ((True, False), (float("nan"), 1.0), torch.bfloat16),
        ((False, False), (float("nan"), 1.0), torch.float32),
    ],
)
def test_timings_decide_where_flags_do_not_or_are_clearly_wrong(monkeypatch, told, speeds, found):
    assert choose(monkeypatch, "cpu", told=told, speeds=speeds).dtype is found


def test_a_single_timing_that_disagrees_with_the_flags_decides_nothing(monkeypatch):
    disagreeing = iter([0.1, 0.1, 0.1, 0.9])
    told = devices.Verdict(True, "a flag")
    monkeypatch.setattr(devices, "_speed", lambda *_: next(disagreeing))
    verdict = devices._timed_verdict(torch.device("cpu"), torch.bfloat16, told)
    assert verdict is told
    assert not [*disagreeing]


@pytest.mark.parametrize(
    ("kind", "multiprocessors", "tokens"),
    [
        ("cpu", 0, 2048),
        ("mps", 0, 4096),
        ("xpu", 0, 4096),
        ("cuda", 8, 2048),
        ("cuda", 40, 5120),
        ("cuda", 82, 10_240),
        ("cuda", 132, 16_384),
        ("cuda", 304, 16_384),
    ],
)
def test_packs_suit_the_size_of_a_card(monkeypatch, kind, multiprocessors, tokens):
    card = SimpleNamespace(multi_processor_count=multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    assert default_pack_tokens(torch.device(kind)) == tokens


def test_a_model_with_a_wide_range_never_gets_float16(monkeypatch):
    choice = choose(monkeypatch, "cuda", told=(False, True), wide_range=True)
    assert choice.dtype is torch.float32


def test_the_choice_of_a_dtype_is_logged_with_its_reason(caplog):
    with caplog.at_level("INFO", logger="bge_rerank_adapters"):
        found = devices.resolve_dtype("auto", torch.device("cpu"))
    (message,) = [each.getMessage() for each in caplog.records if "dtype" in each.getMessage()]
    assert message.startswith(f'dtype "auto" is {capabilities.dtype_name(found)} on cpu: ')
    assert re.search(r"this CPU|oneDNN|ONEDNN_MAX_CPU_ISA", message)


def test_the_timing_is_the_thread_s_own_time(monkeypatch):
    """Beside busy processes a wall clock runs on while the thread waits for a core."""
    real = devices.functional.linear

    def interrupted(*args):
        time.sleep(0.05)
        return real(*args)

    monkeypatch.setattr(devices.functional, "linear", interrupted)
    block = devices._CPU_BLOCK
    monkeypatch.setattr(devices, "_CPU_BLOCK", (8, 64, 64))
    assert block[0] > 8
    assert devices._seconds(torch.device("cpu"), torch.float32) < 0.03


def test_a_dtype_that_cannot_run_takes_for_ever():
    assert devices._seconds(torch.device("cpu"), torch.int8) == float("inf")
    assert 0 < devices._seconds(torch.device("cpu"), torch.float32) < float("inf")


@pytest.mark.parametrize(
    ("limit", "half", "native"),
    [
        ("", torch.bfloat16, True),
        ("DEFAULT", torch.bfloat16, True),
        ("AVX512_CORE_BF16", torch.bfloat16, True),
        ("avx10_1_512_amx", torch.bfloat16, True),
        ("AVX512_CORE_VNNI", torch.bfloat16, False),
        ("AVX2_VNNI_2", torch.bfloat16, False),
        ("AVX512_CORE_BF16", torch.float16, False),
        ("AVX512_CORE_FP16", torch.float16, True),
    ],
)
def test_limits_on_onednn_hold_for_the_flags(monkeypatch, limit, half, native):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr(capabilities.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(
        capabilities, "_cpu_flags", lambda: frozenset({"avx512_bf16", "avx512_fp16"})
    )
    for asked in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, asked, lambda: True, raising=False)
    verdict = capabilities.runs_natively(torch.device("cpu"), half)
    assert verdict.native is native
    assert ("leaves" in verdict.reason) is not native


@pytest.mark.parametrize(
    ("flags", "half", "native"),
    [
        ({"avx512_f"}, torch.bfloat16, False),
        ({"avx512_bf16"}, torch.bfloat16, True),
        ({"amx_bf16"}, torch.bfloat16, True),
        ({"amx_bf16", "avx512_bf16"}, torch.float16, False),
    ],
)
def test_a_half_type_is_native_by_the_flags_of_the_cpu(monkeypatch, flags, half, native):
    """oneDNN says that it supports bfloat16 on every CPU with AVX512, where it emulates it."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(capabilities.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(capabilities, "_cpu_flags", lambda: frozenset(flags))
    for asked in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, asked, lambda: True, raising=False)
    assert capabilities.runs_natively(torch.device("cpu"), half).native is native


def test_a_half_type_is_not_native_without_onednn(monkeypatch):
    with torch.backends.mkldnn.flags(enabled=False):
        verdict = capabilities.runs_natively(torch.device("cpu"), torch.bfloat16)
    assert verdict == (False, "oneDNN is not there, or is switched off")


@pytest.mark.parametrize(
    ("capability", "natives"),
    [((6, 1), (False, False)), ((7, 5), (True, False)), ((8, 0), (True, True))],
)
def test_a_gpu_is_judged_by_its_compute_capability(monkeypatch, capability, natives):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    found = [
        capabilities.runs_natively(torch.device("cuda:0"), half)
        for half in (torch.float16, torch.bfloat16)
    ]
    assert tuple(verdict.native for verdict in found) == natives
    assert f"its compute capability is {capability[0]}.{capability[1]}" in found[0].reason


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_kind_of_device_is_the_program_s_current_one(machine, monkeypatch, name):
    machine(cuda=3)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert str(devices.resolve_device(name)) == "cuda:2"
    assert str(devices.resolve_device("cuda:1")) == "cuda:1"


def test_asking_for_a_device_does_not_begin_to_use_it(machine, monkeypatch):
    """A process that has used CUDA cannot be forked, and adapters ask before they load."""
    machine(cuda=3)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("CUDA was used"))
    assert str(devices.resolve_device("cuda")) == "cuda:0"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the setting is for x86")
def test_auto_is_float32_where_half_precision_is_emulated():
    code = (
        "import torch; from bge_rerank_adapters.engine.models.devices import resolve_dtype; "
        'print(resolve_dtype("auto", torch.device("cpu")))'
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.strip() == "torch.float32"


@pytest.mark.parametrize("limit", [{}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}])
def test_every_start_chooses_the_same_dtype_beside_busy_processes(monkeypatch, limit):
    """`python -m benchmarks.dtype_choice` does it with 200 starts."""
    for name, value in limit.items():
        monkeypatch.setenv(name, value)
    assert len(choices(4, busy=2)) == 1


@pytest.fixture
def matmul_precision():
    """Sets torch's precision of float32 products, and sets it back."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("precision", "dtype", "warned"),
    [("medium", "float32", True), ("highest", "float32", False), ("medium", "bfloat16", False)],
)
def test_a_lower_precision_of_float32_products_is_told(
    matmul_precision, caplog, precision, dtype, warned
):
    matmul_precision(precision)
    with Reranker("tiny", device="cpu", dtype=dtype):
        pass
    assert ("torch.set_float32_matmul_precision('medium') is set" in caplog.text) is warned
    assert torch.get_float32_matmul_precision() == precision
