"""The kinds of linear layers against torch's own, and what 8-bit products survive."""

import math
import os
import statistics
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from bge_rerank_adapters import DeviceError, Reranker
from bge_rerank_adapters.models import devices, linear
from bge_rerank_adapters.models.linear import (
    Int8Linear,
    PackedLinear,
    PlainLinear,
    few_sizes,
    smoothing,
)
from tests.checkpoints import build_xlm_roberta, read_queries, read_sentences

CPU = torch.device("cpu")
needs_packed = pytest.mark.skipif(
    not linear.packed_works(torch.float32), reason="this torch has no oneDNN to prepack for"
)
needs_int8 = pytest.mark.skipif(
    not linear.int8_works(), reason="this torch or processor has no 8-bit product"
)


def parts(outputs=48, inputs=64, rows=20, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    weight, bias, states = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((outputs, inputs), (outputs,), (rows, inputs))
    )
    return weight, bias, states


def relative_error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.float() - exact).norm() / exact.norm())


@needs_packed
@pytest.mark.parametrize("activation", [None, functional.gelu, functional.silu])
@pytest.mark.parametrize("rows", [1, 20])
def test_a_prepacked_layer_equals_a_plain_one(activation, rows):
    weight, bias, states = parts(rows=rows)
    out = PackedLinear(weight, bias, activation)(states)
    torch.testing.assert_close(
        out, PlainLinear(weight, bias, activation)(states), rtol=1e-5, atol=1e-5
    )


def test_a_prepacked_layer_is_not_used_where_the_operator_is_missing_or_wrong(monkeypatch):
    works = linear.packed_works.__wrapped__
    assert not works(torch.float64)
    monkeypatch.setattr(PackedLinear, "__call__", lambda *_: torch.zeros(8, 32))
    assert not works(torch.float32)

    def missing(self, states):
        raise AttributeError("no such operator")

    monkeypatch.setattr(PackedLinear, "__call__", missing)
    assert not works(torch.float32)


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gelu", [False, True])
def test_an_8_bit_layer_is_within_a_hundredth(dtype, gelu):
    weight, bias, states = parts(dtype=dtype)
    if gelu:
        states = functional.gelu(states)
    exact = functional.linear(states.float(), weight.float(), bias.float())
    out = Int8Linear(weight, bias)(states)
    assert out.dtype is dtype
    assert relative_error(out, exact) < 0.015


@needs_int8
def test_an_8_bit_layer_gives_a_row_the_same_in_any_block():
    weight, bias, states = parts(rows=600)
    given = states.clone()
    layer = Int8Linear(weight, bias, functional.gelu)
    whole = layer(states)
    torch.testing.assert_close(whole, torch.cat([layer(row[None]) for row in states]))
    assert torch.equal(states, given)


@needs_int8
def test_one_large_token_does_not_blur_the_others():
    weight, bias, states = parts()
    exact = functional.linear(states, weight, bias)
    spoilt = states.clone()
    spoilt[0] *= 1000.0
    out = Int8Linear(weight, bias)(spoilt)
    assert relative_error(out[1:], exact[1:]) < 0.015


@needs_int8
def test_rows_of_zeros_and_of_nan_keep_to_themselves():
    weight, bias, states = parts()
    states[0], states[1] = 0.0, math.nan
    out = Int8Linear(weight, bias)(states)
    torch.testing.assert_close(out[0], bias)
    assert out[1].isnan().all()
    assert out[2:].isfinite().all()


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_whose_values_all_lie_on_one_side_keep_their_steps(dtype):
    weight, bias, states = parts(dtype=dtype)
    states[0], states[1] = 1000.0, -states[1].abs()
    states[2] = states[2].abs() + 20.0
    exact = functional.linear(states.float(), weight.float(), bias.float())
    out = Int8Linear(weight, bias)(states).float()
    for row in range(3):
        assert relative_error(out[row], exact[row]) < 0.015


@needs_int8
def test_channels_that_are_large_in_every_token_are_smoothed():
    weight, bias, states = parts(outputs=96, inputs=128, rows=40)
    gain, shift = torch.ones(128), torch.zeros(128)
    for channel in (5, 77):
        # As in large trained models: the norm blows a channel up, and its weights are small.
        gain[channel], weight[:, channel] = 60.0, weight[:, channel] / 20.0
    states = states * gain
    exact = functional.linear(states, weight, bias)
    smooth = smoothing(gain, shift, weight)
    assert smooth is not None
    plain = relative_error(Int8Linear(weight, bias)(states), exact)
    smoothed = relative_error(Int8Linear(weight, bias, smooth=smooth)(states), exact)
    assert smoothed < 0.015
    assert plain > 3 * smoothed


def test_ordinary_channels_are_left_alone():
    weight, _, _ = parts()
    assert smoothing(torch.ones(64), torch.zeros(64), weight) is None


def outlier_checkpoint(folder):
    """Blow up two channels of every norm, and make the weights that read them small."""
    build_xlm_roberta(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("LayerNorm.weight"):
            tensor[[3, 40]] *= 25.0
        elif name.endswith(
            ("query.weight", "key.weight", "value.weight", "intermediate.dense.weight")
        ):
            tensor[:, [3, 40]] /= 25.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def int8_pays(monkeypatch):
    """8-bit layers whether or not they are the fastest here."""
    monkeypatch.setattr("bge_rerank_adapters.models.encoder.int8_pays", lambda _: True)


@needs_int8
@pytest.mark.usefixtures("int8_pays")
def test_int8_survives_the_outliers_of_large_models(tmp_path, monkeypatch):
    folder = outlier_checkpoint(tmp_path)
    query = next(iter(read_queries().values()))
    documents = list(read_sentences().values())[:40]

    def logits(dtype):
        with Reranker(str(folder), device="cpu", dtype=dtype) as reranker:
            return reranker.logits(query, documents)

    def error(found):
        return statistics.mean(abs(a - b) for a, b in zip(found, exact, strict=True))

    exact = logits("float32")
    # Rounding to bfloat16 in between would hide the difference.
    monkeypatch.setattr(
        "bge_rerank_adapters.models.encoder.resolve_dtype", lambda *_: torch.float32
    )
    smoothed = error(logits("int8"))
    monkeypatch.setattr("bge_rerank_adapters.models.encoder_layers.smoothing", lambda *_: None)
    assert smoothed < 0.1 * statistics.stdev(exact)
    assert error(logits("int8")) > 2 * smoothed


@needs_int8
@pytest.mark.usefixtures("int8_pays")
def test_int8_of_the_bundled_checkpoint_is_near_float32():
    query = next(iter(read_queries().values()))
    documents = list(read_sentences().values())[:60]
    found = {}
    for dtype in ("float32", "int8"):
        with Reranker("tiny", device="cpu", dtype=dtype) as reranker:
            found[dtype] = reranker.logits(query, documents)
            assert reranker.dtype == dtype
    differences = [a - b for a, b in zip(found["int8"], found["float32"], strict=True)]
    assert statistics.pstdev(differences) < 0.15 * statistics.stdev(found["float32"])


_SATURATION = """
import torch
from bge_rerank_adapters.models import linear
weight = torch.full((32, 64), 1.0)
layer = linear.Int8Linear(weight, torch.zeros(32))
states = torch.full((4, 64), 1.0)
print(linear._steps(), float((layer(states) - 64.0).abs().max()))
"""


@needs_int8
@pytest.mark.parametrize("isa", ["AVX2", "DEFAULT"])
def test_no_sum_saturates_on_a_processor_without_8_bit_sums(isa):
    # The largest states times the largest weights: two such products do not fit 16 bits.
    done = subprocess.run(
        [sys.executable, "-c", _SATURATION],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    steps, error = done.stdout.split()
    assert int(steps) in (127, 255)
    assert float(error) < 1e-3


def test_a_sum_that_saturates_is_noticed(monkeypatch):
    monkeypatch.setattr(linear, "_exact_up_to", lambda largest: largest < 255)
    assert linear._steps.__wrapped__() == 127


@needs_int8
@pytest.mark.parametrize("pays", [True, False])
def test_layers_are_8_bit_where_that_is_faster(monkeypatch, pays):
    monkeypatch.setattr("bge_rerank_adapters.models.encoder.int8_pays", lambda _: pays)
    kinds = []

    def noted(kind):
        def make(*args, **kwargs):
            kinds.append(kind)
            return kind(*args, **kwargs)

        return make

    reader = "bge_rerank_adapters.models.encoder_layers"
    monkeypatch.setattr(f"{reader}.Int8Linear", noted(linear.Int8Linear))
    maker = noted(linear.linear_maker(torch.device("cpu"), devices.resolve_dtype("auto", CPU)))
    monkeypatch.setattr(f"{reader}.linear_maker", lambda *_: maker)
    with Reranker("tiny", device="cpu", dtype="int8") as reranker:
        assert reranker.dtype == "int8"
        assert len(reranker.logits("a", ["b", "c"])) == 2
    assert len(set(kinds)) == 1
    assert (kinds[0] is linear.Int8Linear) is pays


@needs_int8
@pytest.mark.parametrize("slow", ["Int8Linear", "linear_maker"])
def test_8_bit_layers_are_timed_against_the_others(monkeypatch, slow):
    class Slow:
        def __init__(self, *_):
            assert torch.get_num_threads() == 1

        def __call__(self, states):
            time.sleep(0.2)

    monkeypatch.setattr(devices, slow, Slow if slow == "Int8Linear" else lambda *_: Slow)
    assert devices.int8_pays.__wrapped__(torch.float32) is (slow == "linear_maker")


def test_int8_is_for_processors_alone(monkeypatch):
    with pytest.raises(DeviceError, match="int8"):
        devices.resolve_dtype("int8", torch.device("cuda:0"))
    monkeypatch.setattr(devices, "int8_works", lambda: False)
    with pytest.raises(DeviceError, match="oneDNN"):
        devices.resolve_dtype("int8", torch.device("cpu"))


def test_products_come_in_few_sizes_that_are_hardly_larger():
    sizes = {few_sizes(rows) for rows in range(1, 4097)}
    assert len(sizes) < 120
    for rows in range(1, 4097):
        assert rows <= few_sizes(rows) <= max(rows + 7, rows * 17 / 16)
        assert few_sizes(few_sizes(rows)) == few_sizes(rows)
