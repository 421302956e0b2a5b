"""This package's own kernels for processors with AMX, against torch in float32."""

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional

from bge_rerank_adapters import Reranker
from bge_rerank_adapters.engine.checkpoints.model_config import read_config
from bge_rerank_adapters.engine.models.cpu import streams
from bge_rerank_adapters.engine.models.cpu.amx import bfloat16 as amx
from bge_rerank_adapters.engine.models.cpu.amx import kit as amx_kit
from bge_rerank_adapters.engine.models.cpu.amx.bfloat16 import (
    AmxAfterAttention,
    AmxLinear,
    amx_attention,
    amx_runs,
)
from bge_rerank_adapters.engine.models.cpu.amx.int8 import AmxInt8AfterAttention, AmxInt8Linear
from bge_rerank_adapters.engine.models.cpu.amx.kit import AmxKit
from bge_rerank_adapters.engine.models.cpu.kernels import build, library
from bge_rerank_adapters.engine.models.cpu.threads import (
    ALONE,
    Helpers,
    Tasks,
    end_threads,
    start_threads,
)
from bge_rerank_adapters.engine.models.encoder.config import parse_config
from bge_rerank_adapters.engine.models.layers.attention import Layout
from bge_rerank_adapters.engine.models.layers.calibration import smoothing
from bge_rerank_adapters.engine.models.layers.norm import LayerNorm
from tests.checkpoints import build_xlm_roberta, read_queries, read_sentences
from tests.kernels.emulation import TILES, built

CPU = torch.device("cpu")
QUERY = next(iter(read_queries().values()))
SENTENCES = list(read_sentences().values())


@pytest.fixture(scope="module", params=["amx", "emulated"], autouse=True)
def kernels(request, tmp_path_factory):
    """The installed library where there is AMX, and one that runs on any CPU with AVX512."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "emulated":
            patch.setattr(build, "LIBRARY", built(tmp_path_factory.mktemp("library"), *TILES))
            patch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
        library.forget()
        found = library.lack(library.AMX)
        if found is not None:
            pytest.skip(f"kernels for AMX are not used: {found}")
        yield
    library.forget()


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).bfloat16()


# Layers


@pytest.mark.parametrize("rows", [1, 31, 33, 600, 1050])
@pytest.mark.parametrize(("inputs", "outputs", "width"), [(64, 96, 32), (320, 192, 64)])
def test_a_linear_layer_gives_its_outputs_slice_by_slice(rows, inputs, outputs, width):
    states, weight, bias = random(rows, inputs), random(outputs, inputs, seed=1), random(outputs)
    found = AmxLinear(weight, bias, slice_width=width)(states)
    assert found.shape == (outputs // width, rows, width)
    expected = functional.linear(states.float(), weight.float(), bias.float())
    # Rounded once, from sums in float32.
    rowwise = found.transpose(0, 1).reshape(rows, outputs)
    torch.testing.assert_close(rowwise.float(), expected, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("lengths", [[1], [32], [7, 33, 64, 65, 15, 16, 31], [300, 17], [1100]])
@pytest.mark.parametrize(("heads", "width"), [(1, 32), (3, 64), (2, 96)])
@pytest.mark.parametrize("first_only", [False, True])
def test_pairs_attend_to_themselves(lengths, heads, width, first_only):
    layout = Layout(lengths, CPU)
    query, key, value = (
        random(heads, sum(lengths), width, seed=seed, scale=1.5) for seed in range(3)
    )
    if first_only:
        query = query[:, layout.first].contiguous()
    bounds = layout.bounds.tolist()
    expected = []
    for index, (begin, end) in enumerate(pairwise(bounds)):
        asked = query[:, index : index + 1] if first_only else query[:, begin:end]
        keys, values = key[:, begin:end], value[:, begin:end]
        out = functional.scaled_dot_product_attention(
            *(each.float()[None] for each in (asked, keys, values))
        )
        expected.append(out[0].transpose(0, 1).reshape(-1, heads * width))
    exact = torch.cat(expected)
    found = amx_attention(query, key, value, layout, heads)
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() / exact.norm() < 0.005
    assert (found.float() - exact).abs().max() < 0.02


@pytest.mark.parametrize("size", [100.0, 1e5, 1e15])
def test_very_unequal_scores_are_weighed_without_overflow(size):
    query = torch.full((1, 40, 32), size).bfloat16()
    key, value = query.clone(), random(1, 40, 32)
    key[:, 1:] *= -1
    found = amx_attention(query, key, value, Layout([40], CPU), 1)
    assert torch.equal(found, value[0, :1].expand(40, 32))


def layer_of(hidden: int, intermediate: int):
    shapes = (hidden, hidden), (intermediate, hidden), (hidden, intermediate)
    linears = [
        (random(*shape, seed=seed, scale=shape[1] ** -0.5), random(shape[0], seed=seed + 3))
        for seed, shape in enumerate(shapes)
    ]
    norms = [
        LayerNorm(random(hidden, seed=seed), random(hidden, seed=seed + 1), 1e-5) for seed in (7, 9)
    ]
    return linears, norms


def in_float32(parts):
    return tuple(tuple(each.float() for each in pair) for pair in parts)


def after_attention_in_float32(linears, norms, states, attended):
    output, up, down = in_float32(linears)
    first, second = (
        LayerNorm(norm.weight.float(), norm.bias.float(), norm.epsilon) for norm in norms
    )
    middle = first(functional.linear(attended.float(), *output) + states.float())
    inner = functional.gelu(functional.linear(middle, *up))
    return second(functional.linear(inner, *down) + middle)


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
        return *made, amx_attention(*queries, layout, 3)

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


# Layers in 8 bits


def in_codes(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return what a layer gives for rows and weights that are rounded to 8 bits."""
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    rounded = (weight / step).round() * step
    low, high = states.amin(dim=1, keepdim=True), states.amax(dim=1, keepdim=True)
    row_step = ((high - low) / 255).clamp(min=1e-30)
    codes = ((states - low) / row_step).round()
    return functional.linear((codes * row_step + low).double(), rounded.double(), bias.double())


@pytest.mark.parametrize("rows", [1, 31, 600])
@pytest.mark.parametrize(("inputs", "outputs", "width"), [(64, 96, 32), (832, 192, 64)])
@pytest.mark.parametrize("divided", [False, True])
def test_an_8_bit_layer_rounds_each_row_to_255_steps(rows, inputs, outputs, width, divided):
    # Rows of very different sizes, and few of them around zero.
    states = random(rows, inputs) * 10 ** random(rows, 1, seed=2) + random(rows, 1, seed=3)
    weight, bias = random(outputs, inputs, seed=1).float(), random(outputs).float()
    divisor = 1 + random(inputs, seed=4).float().abs() if divided else None
    factor = torch.ones(inputs) if divisor is None else divisor
    found = AmxInt8Linear(weight, bias, divisor=divisor, slice_width=width)(states)
    assert found.shape == (outputs // width, rows, width)
    expected = in_codes(states.float() / factor, weight * factor, bias)
    difference = found.transpose(0, 1).reshape(rows, outputs) - expected
    # A number between two codes may go to either, and outputs are rounded to bfloat16.
    assert (difference.norm(dim=1) / expected.norm(dim=1)).max() < 0.004


def test_a_row_of_equal_numbers_is_exact():
    weight, bias = random(64, 64).float(), random(64).float()
    layer = AmxInt8Linear(weight, bias, divisor=None, slice_width=64)
    states = torch.tensor([0.0, 1.0, -3.0]).bfloat16()[:, None].expand(3, 64).contiguous()
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    expected = functional.linear(states.float(), (weight / step).round() * step, bias)
    torch.testing.assert_close(layer(states)[0].float(), expected, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_in_8_bits_what_is_not_finite_stays_so_in_its_row_alone(value):
    linears, norms = layer_of(128, 192)
    layer = AmxInt8AfterAttention(in_float32(linears), (None, None), norms)
    linear = AmxInt8Linear(*in_float32(linears)[1], divisor=None, slice_width=64)
    states, attended = random(40, 128), random(40, 128, seed=1)
    # Large, but finite.
    attended[3] = 1e37
    sound = layer(states, attended), linear(attended)
    attended[7, 5] = value
    for before, after in zip(sound, (layer(states, attended), linear(attended)), strict=True):
        rows = after.reshape(-1, 40, after.shape[-1])
        assert rows[:, 3].isfinite().all()
        assert not rows[:, 7].isfinite().any()
        kept = [row for row in range(40) if row != 7]
        assert torch.equal(rows[:, kept], before.reshape(rows.shape)[:, kept])


@pytest.mark.parametrize("rows", [1, 45, 400, 1000])
@pytest.mark.parametrize(("hidden", "intermediate"), [(64, 64), (128, 1088), (192, 2048)])
def test_what_comes_after_attention_in_8_bits_is_within_hundredths(rows, hidden, intermediate):
    linears, norms = layer_of(hidden, intermediate)
    states, attended = random(rows, hidden), random(rows, hidden, seed=1)
    found = AmxInt8AfterAttention(in_float32(linears), (None, None), norms)(states, attended)
    expected = after_attention_in_float32(linears, norms, states, attended)
    assert (found.float() - expected).norm() / expected.norm() < 0.015


def test_the_outliers_of_large_models_leave_steps_for_others():
    """One channel fifty times as large as others, in all rows; and a token in all channels."""
    linears, norms = layer_of(128, 256)
    states, attended = random(64, 128), random(64, 128, seed=1)
    attended[:, 17] *= 50
    linears[0][0][:, 17] /= 50
    attended[9] *= 200
    expected = after_attention_in_float32(linears, norms, states, attended)

    def error(divisor):
        layer = AmxInt8AfterAttention(in_float32(linears), (divisor, None), norms)
        return float((layer(states, attended).float() - expected).norm() / expected.norm())

    divided = error(smoothing(attended))
    assert divided < 0.03
    assert error(None) > 2 * divided


# In a model


@pytest.fixture(params=["bfloat16", "int8"])
def model(request):
    with Reranker("tiny", dtype=request.param, device="cpu") as engine:
        found = engine._core.workers[0].model
        found = getattr(found, "_model", found)
        assert isinstance(found.kit, AmxKit)
        assert found.kit.layer_dtype is getattr(torch, request.param)
        pairs = engine._tokenizer.tokenize([(QUERY, text) for text in SENTENCES[:40]]).distinct
        found.pairs = sorted(pairs, key=len, reverse=True)
        yield found


@pytest.mark.parametrize(("dtype", "mean", "most"), [("bfloat16", 0.01, 0.06), ("int8", 0.04, 0.2)])
def test_a_model_scores_as_in_float32(reranker, dtype, mean, most):
    with Reranker("tiny", dtype=dtype, device="cpu") as engine:
        found = engine._core.workers[0].model
        count = streams.one_thread_stream_count()
        assert found.streams == count
        found = engine.logits(QUERY, SENTENCES[:120])
    exact = reranker.logits(QUERY, SENTENCES[:120])
    off = np.abs(np.subtract(found, exact))
    assert off.mean() < mean
    assert off.max() < most


def test_a_pair_scores_the_same_whatever_stands_beside_it(model):
    together = model.logits(model.pairs)
    # The head, in float32, is torch's.
    alone = [model.logits([each])[0] for each in model.pairs]
    assert alone == pytest.approx(together, abs=1e-5)
    assert model.logits(model.pairs[::-1]) == pytest.approx(together[::-1], abs=1e-5)


def test_a_pair_that_is_not_finite_spoils_no_other(model):
    sound = model.logits(model.pairs)
    bad = 3
    others = {word for place, each in enumerate(model.pairs) for word in each.ids if place != bad}
    model._words[next(word for word in model.pairs[bad].ids if word not in others)] = float("nan")
    found = model.logits(model.pairs)
    assert np.isnan(found).nonzero()[0].tolist() == [bad]
    assert [*found[:bad], *found[bad + 1 :]] == [*sound[:bad], *sound[bad + 1 :]]


def test_where_tiles_of_8_bits_are_not_filled_int8_runs_in_bfloat16(monkeypatch):
    runs = amx_kit.amx_runs
    monkeypatch.setattr(amx_kit, "amx_runs", lambda *sizes, int8=False: runs(*sizes) and not int8)
    with Reranker("tiny", dtype="int8", device="cpu") as engine:
        found = engine._core.workers[0].model._model
        assert isinstance(found.kit, AmxKit)
        assert found.kit.layer_dtype is torch.bfloat16
        assert len(engine.logits(QUERY, SENTENCES[:3])) == 3


def test_kernels_are_for_sizes_that_fill_tiles(tmp_path):
    sizes = parse_config(read_config(build_xlm_roberta(tmp_path)), folder=tmp_path)
    assert not amx_runs(sizes, CPU, torch.bfloat16), "heads of 16 fill no tile"
    fitting = {"hidden": 384, "heads": 12, "intermediate": 1536}

    def runs(dtype=torch.bfloat16, device=CPU, int8=False, **changes):
        changed = type(sizes)(
            **{name: getattr(sizes, name) for name in sizes.__slots__} | fitting | changes
        )
        return amx_runs(changed, device, dtype, int8=int8)

    assert runs()
    assert runs(int8=True)
    assert runs(intermediate=1504)
    assert not runs(intermediate=1504, int8=True)
    assert not runs(intermediate=1520)
    assert not runs(heads=8)
    assert not runs(activation="relu")
    assert not runs(dtype=torch.float32)
    assert not runs(device=torch.device("cuda"))


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
