"""This package's own kernels in 8 bits, their attention, and models that run by them.

For each instruction set that runs here, or is emulated, against torch in float32 and float64.
"""

import statistics
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional

from bge_rerank_adapters import Reranker
from bge_rerank_adapters.engine.checkpoints.model_config import read_config
from bge_rerank_adapters.engine.models.cpu import streams
from bge_rerank_adapters.engine.models.cpu.kernels import library, stack
from bge_rerank_adapters.engine.models.cpu.kernels.int8 import (
    KernelInt8AfterAttention,
    KernelInt8Linear,
)
from bge_rerank_adapters.engine.models.cpu.kernels.kit import KernelKit
from bge_rerank_adapters.engine.models.cpu.kernels.layers import attention_by, suits
from bge_rerank_adapters.engine.models.cpu.kernels.library import AVX512_BF16
from bge_rerank_adapters.engine.models.cpu.threads import (
    ALONE,
    Helpers,
    Tasks,
    end_threads,
    start_threads,
)
from bge_rerank_adapters.engine.models.encoder import kit as encoder_kit
from bge_rerank_adapters.engine.models.encoder.config import parse_config
from bge_rerank_adapters.engine.models.layers.attention import Layout
from bge_rerank_adapters.engine.models.layers.calibration import smoothing
from tests.checkpoints import build_xlm_roberta, read_queries, read_sentences
from tests.kernels.emulation import KINDS, using
from tests.kernels.layers import after_attention_in_float32, in_float32, layer_of, random

CPU = torch.device("cpu")
QUERY = next(iter(read_queries().values()))
SENTENCES = list(read_sentences().values())


@pytest.fixture(scope="module", params=list(KINDS))
def attending(request):
    """An instruction set with kernels for attention, which the package finds."""
    with using(request.param) as instruction_set:
        yield instruction_set


@pytest.fixture(scope="module")
def kernels(attending):
    """One that has kernels in 8 bits as well."""
    if attending == AVX512_BF16:
        pytest.skip("AVX512-BF16 is for attention alone")
    return attending


# Layers


@pytest.mark.parametrize("lengths", [[1], [32], [7, 33, 64, 65, 15, 16, 31], [300, 17], [1100]])
@pytest.mark.parametrize(("heads", "width"), [(1, 32), (3, 64), (2, 96)])
@pytest.mark.parametrize("first_only", [False, True])
def test_pairs_attend_to_themselves(attending, lengths, heads, width, first_only):
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
    found = attention_by(attending)(query, key, value, layout, heads)
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() / exact.norm() < 0.005
    assert (found.float() - exact).abs().max() < 0.02


@pytest.mark.parametrize("size", [100.0, 1e5, 1e15])
def test_very_unequal_scores_are_weighed_without_overflow(attending, size):
    query = torch.full((1, 40, 32), size).bfloat16()
    key, value = query.clone(), random(1, 40, 32)
    key[:, 1:] *= -1
    found = attention_by(attending)(query, key, value, Layout([40], CPU), 1)
    assert torch.equal(found, value[0, :1].expand(40, 32))


def in_codes(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return what a layer gives for rows and weights that are rounded to 8 bits."""
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    rounded = (weight / step).round() * step
    low, high = states.amin(dim=1, keepdim=True), states.amax(dim=1, keepdim=True)
    row_step = ((high - low) / 255).clamp(min=1e-30)
    codes = ((states - low) / row_step).round()
    return functional.linear((codes * row_step + low).double(), rounded.double(), bias.double())


@pytest.mark.parametrize("rows", [1, 31, 600])
@pytest.mark.parametrize(
    ("inputs", "outputs", "width"), [(64, 96, 32), (832, 192, 64), (1664, 64, 64)]
)
@pytest.mark.parametrize("divided", [False, True])
def test_an_8_bit_layer_rounds_each_row_to_255_steps(
    kernels, rows, inputs, outputs, width, divided
):
    # Rows of very different sizes, and few of them around zero.
    states = random(rows, inputs) * 10 ** random(rows, 1, seed=2) + random(rows, 1, seed=3)
    weight, bias = random(outputs, inputs, seed=1).float(), random(outputs).float()
    divisor = 1 + random(inputs, seed=4).float().abs() if divided else None
    factor = torch.ones(inputs) if divisor is None else divisor
    found = KernelInt8Linear(
        weight, bias, instruction_set=kernels, divisor=divisor, slice_width=width
    )(states)
    assert found.shape == (outputs // width, rows, width)
    expected = in_codes(states.float() / factor, weight * factor, bias)
    difference = found.transpose(0, 1).reshape(rows, outputs) - expected
    # A number between two codes may go to either, and outputs are rounded to bfloat16.
    assert (difference.norm(dim=1) / expected.norm(dim=1)).max() < 0.004


def test_a_row_of_equal_numbers_is_exact(kernels):
    weight, bias = random(64, 64).float(), random(64).float()
    layer = KernelInt8Linear(weight, bias, instruction_set=kernels, divisor=None, slice_width=64)
    states = torch.tensor([0.0, 1.0, -3.0]).bfloat16()[:, None].expand(3, 64).contiguous()
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    expected = functional.linear(states.float(), (weight / step).round() * step, bias)
    torch.testing.assert_close(layer(states)[0].float(), expected, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_in_8_bits_what_is_not_finite_stays_so_in_its_row_alone(kernels, value):
    linears, norms = layer_of(128, 192)
    layer = KernelInt8AfterAttention(kernels, in_float32(linears), (None, None), norms)
    linear = KernelInt8Linear(
        *in_float32(linears)[1], instruction_set=kernels, divisor=None, slice_width=64
    )
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
def test_what_comes_after_attention_in_8_bits_is_within_hundredths(
    kernels, rows, hidden, intermediate
):
    linears, norms = layer_of(hidden, intermediate)
    states, attended = random(rows, hidden), random(rows, hidden, seed=1)
    found = KernelInt8AfterAttention(kernels, in_float32(linears), (None, None), norms)(
        states, attended
    )
    expected = after_attention_in_float32(linears, norms, states, attended)
    assert (found.float() - expected).norm() / expected.norm() < 0.015


def test_the_outliers_of_large_models_leave_steps_for_others(kernels):
    """One channel fifty times as large as others, in all rows; and a token in all channels."""
    linears, norms = layer_of(128, 256)
    states, attended = random(64, 128), random(64, 128, seed=1)
    attended[:, 17] *= 50
    linears[0][0][:, 17] /= 50
    attended[9] *= 200
    expected = after_attention_in_float32(linears, norms, states, attended)

    def error(divisor):
        layer = KernelInt8AfterAttention(kernels, in_float32(linears), (divisor, None), norms)
        return float((layer(states, attended).float() - expected).norm() / expected.norm())

    divided = error(smoothing(attended))
    assert divided < 0.03
    assert error(None) > 2 * divided


def test_all_threads_together_give_the_same(kernels):
    linears, norms = layer_of(128, 192)
    linears = in_float32(linears)
    layer = KernelInt8AfterAttention(kernels, linears, (None, None), norms)
    linear = KernelInt8Linear(*linears[1], instruction_set=kernels, divisor=None, slice_width=32)
    states, attended = random(333, 128), random(333, 128, seed=1)
    queries = [random(3, 333, 32, seed=seed) for seed in range(3)]

    def compute(helpers):
        layout = Layout([300, 33], CPU, helpers)
        made = layer(states, attended, helpers), linear(states, helpers)
        return *made, attention_by(kernels)(*queries, layout, 3)

    tasks = Tasks()
    start_threads(3, 1, tasks)
    together = compute(Helpers(tasks, 4))
    end_threads(tasks, 3)
    assert all(torch.equal(*both) for both in zip(compute(ALONE), together, strict=True))


def test_no_rows_give_none(kernels):
    linears, norms = layer_of(64, 128)
    linears, empty = in_float32(linears), torch.empty(0, 64).bfloat16()
    linear = KernelInt8Linear(*linears[0], instruction_set=kernels, divisor=None, slice_width=32)
    assert linear(empty).shape == (2, 0, 32)
    after = KernelInt8AfterAttention(kernels, linears, (None, None), norms)
    assert after(empty, empty).shape == (0, 64)


# In a model


DTYPES = {"amx": ("bfloat16", "int8"), "avx512_vnni": ("int8",)}


@pytest.fixture(params=["bfloat16", "int8"])
def dtype(request, kernels):
    if request.param not in DTYPES[kernels]:
        pytest.skip(f"there are no kernels for {kernels} in {request.param}")
    return request.param


@pytest.fixture
def model(kernels, dtype):
    with Reranker("tiny", dtype=dtype, device="cpu") as engine:
        found = engine._core.workers[0].model
        found = getattr(found, "_model", found)
        assert isinstance(found.kit, KernelKit)
        assert found.kit.instruction_set == kernels
        assert found.kit.layer_dtype is getattr(torch, dtype)
        pairs = engine._calls.tokenize([(QUERY, text) for text in SENTENCES[:40]]).distinct
        found.pairs = sorted(pairs, key=len, reverse=True)
        yield found


# How far logits are off at most, on the mean and each.
OFF = {"bfloat16": (0.007, 0.06), "int8": (0.04, 0.2)}


def test_a_model_scores_as_in_float32(dtype, reranker):
    mean, most = OFF[dtype]
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


@pytest.fixture
def helpers():
    """Makes helpers for a thread; their own threads end with the test."""
    tasks = Tasks()
    started = 7
    start_threads(started, 1, tasks)
    yield lambda size: Helpers(tasks, size)
    end_threads(tasks, started)


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_that_share_a_small_packs_outputs_give_the_same(model, helpers, threads):
    for count in (1, 2, 3, 5):
        pairs = model.pairs[-count:]
        assert sum(map(len, pairs)) <= model.kit.small_pack(threads).uneven
        assert model.logits(pairs, helpers=helpers(threads)) == model.logits(pairs)


def test_a_small_pack_is_not_held_up_by_threads_that_do_not_come(model):
    pairs = model.pairs[-3:]
    # Nobody takes these tasks.
    assert model.logits(pairs, helpers=Helpers(Tasks(), 4)) == model.logits(pairs)


def test_a_larger_pack_is_shared_out_by_rows(model, helpers, monkeypatch):
    monkeypatch.setattr(model, "_stack", lambda *_: pytest.fail("it is not small"))
    assert sum(map(len, model.pairs)) > model.kit.small_pack(2).uneven
    assert model.logits(model.pairs, helpers=helpers(2)) == model.logits(model.pairs)


def test_a_small_pack_without_memory_says_so(model, helpers, monkeypatch):
    def kernel(instruction_set, name):
        short = name.endswith("stack_run")
        return (lambda *_: -1) if short else library.kernel(instruction_set, name)

    monkeypatch.setattr(stack, "kernel", kernel)
    with pytest.raises(MemoryError, match="intermediate results"):
        model.logits(model.pairs[-2:], helpers=helpers(2))
    monkeypatch.undo()
    assert model.logits(model.pairs[-2:], helpers=helpers(2)) == model.logits(model.pairs[-2:])


def test_small_packs_at_the_same_time_keep_memory_apart(model, helpers):
    expected = [model.logits([each]) for each in model.pairs[:8]]
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(lambda each: model.logits([each], helpers=helpers(2)), model.pairs[:8] * 4)
        )
    assert found == expected * 4
    assert 1 <= len(model._stack._spare) <= 4


def test_a_pair_that_is_not_finite_spoils_no_other(model):
    sound = model.logits(model.pairs)
    bad = 3
    others = {word for place, each in enumerate(model.pairs) for word in each.ids if place != bad}
    model._words[next(word for word in model.pairs[bad].ids if word not in others)] = float("nan")
    found = model.logits(model.pairs)
    assert np.isnan(found).nonzero()[0].tolist() == [bad]
    assert [*found[:bad], *found[bad + 1 :]] == [*sound[:bad], *sound[bad + 1 :]]


def test_norms_keep_their_float32(dtype, reranker, monkeypatch):
    def error():
        with Reranker("tiny", dtype=dtype, device="cpu") as engine:
            norms = [layer.after._vectors[0] for layer in layers_of(engine)]
            found = engine.logits(QUERY, SENTENCES[:40])
        exact = reranker.logits(QUERY, SENTENCES[:40])
        return statistics.mean(abs(a - b) for a, b in zip(found, exact, strict=True)), norms

    kept, norms = error()
    assert not all(torch.equal(norm, norm.bfloat16().float()) for norm in norms)
    if dtype == "int8":
        # Codes move logits further than rounded norms do.
        return
    choose = encoder_kit.choose_kit

    def choose_rounding(*args):
        kit = choose(*args)
        kit.norm_dtype = torch.bfloat16
        return kit

    monkeypatch.setattr(
        "bge_rerank_adapters.engine.models.encoder.model.choose_kit", choose_rounding
    )
    rounded, _ = error()
    assert kept < 0.8 * rounded


def layers_of(engine):
    model = engine._core.workers[0].model
    return getattr(model, "_model", model)._layers


def test_kernels_are_for_sizes_that_fill_tiles(tmp_path):
    sizes = parse_config(read_config(build_xlm_roberta(tmp_path)), folder=tmp_path)
    assert not suits(sizes, int8=False), "heads of 16 fill no tile"
    fitting = {"hidden": 384, "heads": 12, "intermediate": 1536}

    def fits(int8=False, **changes):
        changed = type(sizes)(
            **{name: getattr(sizes, name) for name in sizes.__slots__} | fitting | changes
        )
        return suits(changed, int8=int8)

    assert fits()
    assert fits(int8=True)
    assert fits(intermediate=1504)
    assert not fits(intermediate=1504, int8=True)
    assert not fits(intermediate=1520)
    assert not fits(heads=8)
    assert not fits(activation="relu")


def test_a_kit_says_what_it_is_not_for(kernels):
    config = encoder_kit._BASE
    kits = [kit for kit in encoder_kit.KITS if getattr(kit, "instruction_set", None) == kernels]
    assert kits
    for kit in kits:
        request = encoder_kit.KitRequest(config, CPU, torch.bfloat16)
        assert kit.lack(request) is None
        assert "CPU" in kit.lack(request._replace(device=torch.device("cuda")))
        if not kit.int8:
            assert "bfloat16" in kit.lack(request._replace(dtype=torch.float32))
