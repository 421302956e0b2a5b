"""Devices that fail: short of memory, lost until the process ends, or used by a forked child."""

import errno
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bge_rerank_adapters import ClosedError, DeviceError, Reranker, RerankError, ScoringError
from bge_rerank_adapters.engine.models import device_faults, loading
from bge_rerank_adapters.engine.models.device_faults import (
    is_lost,
    is_out_of_memory,
    release_memory,
)
from bge_rerank_adapters.engine.queue import core as core_module
from bge_rerank_adapters.engine.shared import shared_reranker
from bge_rerank_adapters.engine.text.pairs import TokenPair
from bge_rerank_adapters.settings import EngineSettings
from tests.logs import own_records
from tests.texts import DOCUMENTS, QUERY

pytestmark = pytest.mark.timeout(120)

GPU = torch.device("cuda:0")
ON_GPU = {"model": "tiny", "device": "cuda:0", "dtype": "float32"}
# As torch 2.13 raises it.
ASSERT = (
    "CUDA error: device-side assert triggered\nSearch for `cudaErrorAssert' in "
    "https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html for more information."
)


class FakeGpu:
    """Stands for CUDA: one device, on which models run as on the CPU until it fails."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.loading_error: Exception | None = None
        self.loads = 0

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def empty_cache(self) -> None:
        self.fail()

    def synchronize(self, device: torch.device | None = None) -> None:
        self.fail()

    def fail(self) -> None:
        if self.error is not None:
            raise self.error


class GpuModel:
    """A model on the fake GPU."""

    device, dtype, streams, pack_tokens = GPU, torch.float32, 1, 16_384
    runs_ahead = False

    def __init__(self, gpu: FakeGpu, model: loading.Model) -> None:
        self.gpu, self.model = gpu, model

    def logits(self, pairs: Sequence[TokenPair]) -> list[float]:
        self.gpu.fail()
        return self.model.logits(pairs)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    fake, load = FakeGpu(), loading.load_model

    def load_on_gpu(*args, device: torch.device, **options):
        if device.type == "cpu":
            return load(*args, device=device, **options)
        fake.loads += 1
        if fake.loading_error is not None:
            raise fake.loading_error
        return GpuModel(fake, load(*args, device=torch.device("cpu"), **options))

    monkeypatch.setattr(loading, "load_model", load_on_gpu)
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(device_faults, "_lost", {})
    yield fake
    fake.error = None


def wait_until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# Lost


def test_an_engine_whose_device_is_lost_closes_itself_and_says_to_start_again(gpu, caplog):
    engine = Reranker(**ON_GPU)
    assert len(engine.rerank(QUERY, DOCUMENTS)) == len(DOCUMENTS)
    gpu.error = torch.AcceleratorError(ASSERT)
    with pytest.raises(ScoringError, match=r"'cuda:0' failed.*device-side assert.*start the proc"):
        engine.rerank(QUERY, DOCUMENTS)
    assert engine.closed
    assert "Search for" not in own_records(caplog)[-1].getMessage()
    for call in (lambda: engine.rerank(QUERY, DOCUMENTS), engine.warm_up):
        with pytest.raises(ClosedError, match=r"closed itself.*start the process again"):
            call()
    # Though the device gives back no memory either.
    engine.close()
    engine.close()


def test_nothing_is_loaded_on_a_lost_device_and_others_go_on(gpu):
    with Reranker(**ON_GPU) as engine:
        gpu.error = RuntimeError("CUDA error: an illegal memory access was encountered")
        with pytest.raises(ScoringError):
            engine.rerank(QUERY, DOCUMENTS)
    loads = gpu.loads
    for device in ("cuda:0", "cuda", "auto"):
        with pytest.raises(DeviceError, match=r"illegal memory access.*start the process again"):
            Reranker(**(ON_GPU | {"device": device}))
    assert gpu.loads == loads
    with Reranker(**(ON_GPU | {"device": "cpu"})) as engine:
        assert len(engine.rerank(QUERY, DOCUMENTS)) == len(DOCUMENTS)


def test_an_engine_with_a_lost_device_is_not_shared_and_adapters_hear_of_it_at_once(gpu):
    settings = EngineSettings(**ON_GPU)
    engine = shared_reranker(settings)
    gpu.error = RuntimeError("CUDA error: unspecified launch failure")
    with pytest.raises(ScoringError):
        engine.rerank(QUERY, DOCUMENTS)
    loads = gpu.loads
    for _ in range(3):
        with pytest.raises(DeviceError, match="start the process again"):
            shared_reranker(settings)
    assert gpu.loads == loads


def test_an_adapter_does_not_reload_a_lost_device_in_a_circle(gpu):
    langchain = pytest.importorskip("bge_rerank_adapters.langchain")
    from langchain_core.documents import Document

    compressor = langchain.BGEDocumentCompressor(**ON_GPU)
    documents = [Document(page_content=text) for text in DOCUMENTS]
    assert compressor.compress_documents(documents, QUERY)
    gpu.error = RuntimeError("CUDA error: unspecified launch failure")
    with pytest.raises(ScoringError):
        compressor.compress_documents(documents, QUERY)
    loads = gpu.loads
    for _ in range(3):
        with pytest.raises(DeviceError, match="start the process again"):
            compressor.compress_documents(documents, QUERY)
    assert gpu.loads == loads


def test_all_calls_that_wait_for_a_lost_device_hear_of_it(gpu, monkeypatch):
    all_wait = threading.Event()

    def fail_once_all_wait(self, pairs):
        all_wait.wait(60)
        raise torch.AcceleratorError(ASSERT)

    monkeypatch.setattr(GpuModel, "logits", fail_once_all_wait)
    with Reranker(**ON_GPU, pack_tokens=1) as engine, ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(engine.score, QUERY, DOCUMENTS) for _ in range(8)]
        # All but the pair that is in the model.
        wait_until(lambda: engine.stats().queued_pairs == 8 * len(DOCUMENTS) - 1)
        all_wait.set()
        errors = [call.exception(60) for call in calls]
    assert {type(error) for error in errors} <= {ScoringError, ClosedError}
    assert all("start the process again" in str(error) for error in errors)


def test_a_device_that_is_lost_while_a_model_loads_is_a_device_error(gpu):
    gpu.loading_error = RuntimeError("level_zero backend failed: 20 (UR_RESULT_ERROR_DEVICE_LOST)")
    for _ in range(2):
        with pytest.raises(DeviceError, match=r"DEVICE_LOST.*start the process again"):
            Reranker(**ON_GPU)
    assert gpu.loads == 1


def test_an_error_that_hides_a_lost_device_is_seen_by_asking_it(gpu):
    gpu.error = RuntimeError("CUDA error: device-side assert triggered")
    assert is_lost(RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED when calling cublasSgemm"), GPU)
    gpu.error = None
    assert not is_lost(RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED when calling cublasSgemm"), GPU)


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        (ASSERT, True),
        ("CUDA error: an illegal memory access was encountered", True),
        ("CUDA error: unspecified launch failure", True),
        ("CUDA error: uncorrectable ECC error encountered", True),
        ("CUDA error: misaligned address", True),
        ("CUDA error: unknown error", True),
        ("HIP error: an illegal memory access was encountered", True),
        ("level_zero backend failed with error: 20 (UR_RESULT_ERROR_DEVICE_LOST)", True),
        ("CUDA out of memory. Tried to allocate 20 MiB", False),
        ("CUDA error: invalid configuration argument", False),
        ("CUDA error: no kernel image is available for execution on the device", False),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_what_leaves_a_device_unusable_is_told_from_what_does_not(gpu, message, lost):
    assert is_lost(RuntimeError(message), GPU) is lost
    assert not is_lost(RuntimeError(message), torch.device("cpu"))
    assert not is_lost(ValueError(message), GPU)


# Giving memory back


def test_memory_that_cannot_be_given_back_is_logged_and_no_error(gpu, caplog):
    gpu.error = RuntimeError("CUDA error: device-side assert triggered")
    release_memory(GPU)
    assert "cuda:0 frees no memory: CUDA error: device-side assert" in caplog.text
    release_memory(torch.device("cpu"))


def test_too_little_memory_on_a_device_that_gives_none_back_keeps_the_thread(gpu, monkeypatch):
    failures = [torch.OutOfMemoryError("CUDA out of memory.")]

    def run_out() -> None:
        if failures:
            raise failures.pop()

    def refuse() -> None:
        raise RuntimeError("CUDA error: invalid argument")

    with Reranker(**ON_GPU) as engine:
        monkeypatch.setattr(gpu, "fail", run_out)
        monkeypatch.setattr(gpu, "empty_cache", refuse)
        assert len(engine.rerank(QUERY, DOCUMENTS)) == len(DOCUMENTS)
        assert not engine.closed


def test_at_exit_an_engine_that_cannot_be_closed_leaves_no_other_open(monkeypatch, caplog):
    class Stuck:
        def close(self) -> None:
            raise RuntimeError("stuck")

    with Reranker("tiny", device="cpu", dtype="float32") as engine:
        monkeypatch.setattr(core_module, "_live_cores", [Stuck(), engine._core])
        core_module._end_threads()
        assert engine.closed
    assert "stuck" in caplog.text


# Too little memory


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (RuntimeError("CUDA out of memory. Tried"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (
            RuntimeError("level_zero failed: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
            True,
        ),
        (RuntimeError("shapes differ"), False),
        (OSError(errno.EACCES, "Permission denied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_lack_of_memory_is_recognised(error, is_memory):
    assert is_out_of_memory(error) is is_memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        MemoryError(),
    ],
    ids=["allocator", "cublas", "python"],
)
def test_too_little_memory_to_load_a_model_is_an_error_of_this_package(gpu, error):
    gpu.loading_error = error
    with pytest.raises(DeviceError, match="'cuda:0' has too little memory to load") as caught:
        Reranker(**ON_GPU)
    assert isinstance(caught.value, RerankError)
    assert caught.value.__cause__ is error
    gpu.loading_error = None
    with Reranker(**ON_GPU) as engine:
        assert len(engine.rerank(QUERY, DOCUMENTS)) == len(DOCUMENTS)


# Forked


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "auto"])
def test_a_forked_child_of_a_process_that_used_cuda_is_told_to_spawn(gpu, device):
    gpu._is_in_bad_fork = lambda: True
    with pytest.raises(DeviceError, match=r"forked.*spawn"):
        Reranker("tiny", device=device)
    assert gpu.loads == 0
    with Reranker("tiny", device="cpu") as engine:
        assert len(engine.rerank(QUERY, DOCUMENTS)) == len(DOCUMENTS)
