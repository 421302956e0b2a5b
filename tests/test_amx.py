"""This package's own kernels for processors with AMX, against torch in float32."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import functional

from bge_rerank_adapters import Reranker
from bge_rerank_adapters.engine.models.cpu.amx import bfloat16 as amx
from bge_rerank_adapters.engine.models.cpu.amx.bfloat16 import (
    AmxAfterAttention,
    AmxLinear,
)
from bge_rerank_adapters.engine.models.cpu.amx.kit import AmxKit
from bge_rerank_adapters.engine.models.cpu.kernels import kit, library
from bge_rerank_adapters.engine.models.cpu.kernels.layers import attention_by
from bge_rerank_adapters.engine.models.cpu.threads import (
    ALONE,
    Helpers,
    Tasks,
    end_threads,
    start_threads,
)
from bge_rerank_adapters.engine.models.layers.attention import Layout
from bge_rerank_adapters.engine.models.layers.norm import LayerNorm
from tests.checkpoints import read_queries, read_sentences
from tests.kernels.emulation import using
from tests.kernels.layers import after_attention_in_float32, layer_of, random

CPU = torch.device("cpu")
QUERY = next(iter(read_queries().values()))
SENTENCES = list(read_sentences().values())


@pytest.fixture(scope="module", params=["amx", "amx emulated"], autouse=True)
def kernels(request):
    with using(request.param):
        yield


@pytest.mark.parametrize("rows", [1, 31, 33, 600, 1050])
@pytest.mark.parametrize(
    ("inputs", "outputs", "width"), [(64, 96, 32), (320, 192, 64), (832, 64, 64)]
)
def test_a_linear_layer_gives_its_outputs_slice_by_slice(rows, inputs, outputs, width):
    states, weight, bias = random(rows, inputs), random(outputs, inputs, seed=1), random(outputs)
    found = AmxLinear(weight, bias, slice_width=width)(states)
    assert found.shape == (outputs // width, rows, width)
    expected = functional.linear(states.float(), weight.float(), bias.float())
    # Rounded once, from sums in float32.
    rowwise = found.transpose(0, 1).reshape(rows, outputs)
    torch.testing.assert_close(rowwise.float(), expected, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 32, 45, 400, 1000])
@pytest.mark.parametrize(("hidden", "intermediate"), [(32, 32), (96, 1120), (128, 2048)])
def test_what_comes_after_attention_is_as_in_float32(rows, hidden, intermediate):
    linears, norms = layer_of(hidden, intermediate)
    states, attended = random(rows, hidden), random(rows, hidden, seed=1)
    found = AmxAfterAttention(linears, norms)(states, attended)
    expected = after_attention_in_float32(linears, norms, states, attended)
    error = (found.float() - expected).norm() / expected.norm()
    assert error < 0.006
    assert (found.float() - expected).abs().max() < 0.1


@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0, 40.0])
def test_gelu_is_exact_to_bfloat16(scale):
    # The first norm gives numbers of all sizes, which the identity lets through to GELU and after.
    hidden = 512
    identity, nothing = torch.eye(hidden).bfloat16(), torch.zeros(hidden).bfloat16()
    spread = torch.full((hidden,), scale).bfloat16()
    linears = [(identity, nothing)] * 3
    norms = [LayerNorm(each, nothing, 1e-5) for each in (spread, torch.ones(hidden).bfloat16())]
    states = random(64, hidden)
    found = AmxAfterAttention(linears, norms)(states, torch.zeros_like(states))
    expected = after_attention_in_float32(linears, norms, states, torch.zeros_like(states))
    assert (found.float() - expected).abs().max() < 0.03


def test_all_threads_together_give_the_same():
    linears, norms = layer_of(96, 160)
    layer, linear = AmxAfterAttention(linears, norms), AmxLinear(*linears[1], slice_width=32)
    states, attended = random(333, 96), random(333, 96, seed=1)
    queries = [random(3, 333, 32, seed=seed) for seed in range(3)]

    def compute(helpers):
        layout = Layout([300, 33], CPU, helpers)
        made = layer(states, attended, helpers), linear(states, helpers)
        return *made, attention_by(library.AMX)(*queries, layout, 3)

    tasks = Tasks()
    start_threads(3, 1, tasks)
    together = compute(Helpers(tasks, 4))
    end_threads(tasks, 3)
    assert all(torch.equal(*both) for both in zip(compute(ALONE), together, strict=True))


def test_threads_do_not_share_room():
    linears, norms = layer_of(64, 128)
    layer = AmxAfterAttention(linears, norms)
    inputs = [(random(rows, 64, seed=rows), random(rows, 64, seed=-rows)) for rows in range(1, 60)]
    alone = [layer(*each) for each in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            found = pool.map(lambda each: layer(*each), inputs)
            assert all(torch.equal(one, other) for one, other in zip(alone, found, strict=True))


def test_no_rows_give_none():
    linears, norms = layer_of(64, 128)
    empty = torch.empty(0, 64).bfloat16()
    assert AmxLinear(*linears[0], slice_width=32)(empty).shape == (2, 0, 32)
    assert AmxAfterAttention(linears, norms)(empty, empty).shape == (0, 64)


@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_a_weight_that_fills_no_tiles_is_refused(shape):
    with pytest.raises(ValueError, match=r"fills no tiles"):
        AmxLinear(random(*shape), random(shape[0]), slice_width=16)


def test_short_memory_is_an_error_that_the_engine_knows(monkeypatch):
    linear = AmxLinear(random(32, 32), random(32), slice_width=32)
    monkeypatch.setattr(amx, "kernel", lambda *_: lambda *_: -1)
    with pytest.raises(MemoryError, match="not enough memory"):
        linear(random(4, 32))


def test_where_tiles_of_8_bits_are_not_filled_int8_runs_in_bfloat16(monkeypatch):
    monkeypatch.setattr(kit, "suits", lambda *_, int8: not int8)
    with Reranker("tiny", dtype="int8", device="cpu") as engine:
        found = engine._core.workers[0].model._model
        assert isinstance(found.kit, AmxKit)
        assert found.kit.layer_dtype is torch.bfloat16
        assert len(engine.logits(QUERY, SENTENCES[:3])) == 3


def test_ended_threads_leave_no_memory():
    layer = AmxAfterAttention(*layer_of(512, 1024))
    states, before = random(400, 512), 0
    for round_ in range(40):
        thread = threading.Thread(target=layer, args=(states, states))
        thread.start()
        thread.join()
        if round_ == 5:
            before = resident_kb()
    # Each has taken four megabytes.
    assert resident_kb() - before < 20_000


def resident_kb() -> int:
    with open("/proc/self/status") as status:  # noqa: PTH123
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
