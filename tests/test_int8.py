"""Layers in 8-bit integers: by row, in a settled range, in a model, and where they are run."""

import json
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

from bge_rerank_adapters import CheckpointError, DeviceError, Reranker
from bge_rerank_adapters.engine.models import devices
from bge_rerank_adapters.engine.models.cpu.kernels.kit import KernelKit
from bge_rerank_adapters.engine.models.cpu.onednn import int8, ranges, timing
from bge_rerank_adapters.engine.models.cpu.onednn import kit as onednn_kit
from bge_rerank_adapters.engine.models.cpu.onednn.int8 import (
    Int8FeedForward,
    Int8Linear,
    fused_works,
    smoothing,
)
from bge_rerank_adapters.engine.models.cpu.onednn.ranges import int8_works, steps
from bge_rerank_adapters.engine.models.encoder import calibration
from bge_rerank_adapters.engine.models.encoder import kit as encoder_kit
from bge_rerank_adapters.engine.models.encoder import model as encoder_model
from bge_rerank_adapters.engine.models.layers.linear import packed_works
from tests.checkpoints import build_xlm_roberta, read_queries, read_sentences

CPU = torch.device("cpu")
WITHOUT_OWN_KERNELS = tuple(kit for kit in encoder_kit.KITS if not issubclass(kit, KernelKit))
needs_int8 = pytest.mark.skipif(
    not int8_works(), reason="this torch or processor has no 8-bit product"
)
needs_fused = pytest.mark.skipif(
    not int8_works() or not fused_works(torch.float32) or not fused_works(torch.bfloat16),
    reason="this torch or processor has no 8-bit product that scales",
)
# Found before a test sets another default dtype.
FUSED_WORKS = int8_works() and fused_works(torch.float32)
PAIRS = next(iter(read_queries().values())), list(read_sentences().values())[:20]
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def parts(outputs=48, inputs=64, rows=20, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    weight, bias, states = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((outputs, inputs), (outputs,), (rows, inputs))
    )
    return weight, bias, states


def relative_error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.float() - exact.float()).norm() / exact.float().norm())


# By row


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


# In a settled range


@needs_fused
@each_dtype
@pytest.mark.parametrize("with_residual", [False, True])
def test_ordinary_rows_are_within_two_hundredths(dtype, with_residual):
    weight, bias, states = parts(rows=300, dtype=dtype)
    layer = Int8Linear(weight, bias, sample=states[:200])
    assert layer.range is not None
    residual = torch.full((300, 48), 3.0, dtype=dtype) if with_residual else None
    out = layer(states, residual)
    exact = functional.linear(states.float(), weight.float(), bias.float())
    assert out.dtype is dtype
    assert layer.encode(states)[1] is None
    assert relative_error(out, exact + 3.0 if with_residual else exact) < 0.02


@needs_fused
@each_dtype
def test_rows_beyond_the_range_go_each_in_their_own(dtype):
    weight, bias, states = parts(rows=300, dtype=dtype)
    layer, residual = Int8Linear(weight, bias, sample=states[:200]), states[:, :48]
    wild = states.clone()
    wild[7] *= 50.0
    wild[8, 3], wild[260, 5], wild[299] = -1000.0, math.nan, math.inf
    rows = [7, 8, 260, 299]
    assert layer.encode(wild)[1].tolist() == rows
    out = layer(wild, residual)
    torch.testing.assert_close(
        out[rows], layer.by_row(wild[rows], residual[rows]), equal_nan=True, rtol=0, atol=0
    )
    others = [row for row in range(300) if row not in rows]
    assert torch.equal(out[others], layer(states, residual)[others])
    assert out[others].isfinite().all()


@needs_fused
@pytest.mark.parametrize("bits", [0x7FC00080, 0x7FC000FD, 0x7F8000A0, 0xFFC00080 - 2**32])
def test_no_nan_becomes_a_number(bits):
    weight, bias, states = parts(rows=300)
    layer = Int8Linear(weight, bias, sample=states)
    # Below its quiet bit a NaN may hold anything.
    states.view(torch.int32)[4, 2] = bits
    assert layer.encode(states)[1].tolist() == [4]
    assert layer(states)[4].isnan().all()


@needs_fused
def test_a_row_is_the_same_in_any_pack():
    weight, bias, states = parts(rows=600)
    layer, given = Int8Linear(weight, bias, sample=states), states.clone()
    whole = layer(states, states[:, :48])
    apart = torch.cat([layer(row[None], row[None, :48]) for row in states])
    torch.testing.assert_close(whole, apart, rtol=1e-6, atol=1e-6)
    assert torch.equal(states, given)


def feed_forward(dtype, *, activation=functional.gelu):
    weight, bias, states = parts(96, 64, 300, dtype)
    down_weight, down_bias, _ = parts(64, 96)
    sample = states[:200]
    inner = activation(functional.linear(sample, weight, bias))
    up = Int8Linear(weight, bias, activation, sample=sample)
    down = Int8Linear(down_weight, down_bias, sample=inner, after_gelu=True)
    exact = activation(functional.linear(states.float(), weight.float(), bias.float()))
    exact = functional.linear(exact, down_weight, down_bias) + states.float()
    return Int8FeedForward(up, down), up, down, states, exact


@needs_fused
@each_dtype
def test_a_feed_forward_block_stays_in_8_bits_within(dtype, monkeypatch):
    block, _, _, states, exact = feed_forward(dtype)
    # Not by row.
    monkeypatch.setattr(Int8Linear, "by_row", None)
    out = block(states)
    assert out.dtype is dtype
    assert relative_error(out, exact) < 0.03


@needs_fused
def test_a_feed_forward_block_takes_rows_apart_that_either_range_does_not_hold():
    block, up, down, states, _ = feed_forward(torch.float32)
    wild = states.clone()
    wild[5, 0], wild[6] = 1000.0, math.nan
    # Within the first range, and beyond the second.
    weight, _, _ = parts(96, 64)
    wild[100] = weight[11].sign() * 2.0
    codes, outside = up.encode(wild)
    assert outside.tolist() == [5, 6]
    _, beyond = up.gelu_codes(codes, down.range)
    assert 100 in beyond.tolist()
    out, rows = block(wild), [5, 6, 100]
    by_row = down.by_row(up.by_row(wild[rows]), wild[rows])
    torch.testing.assert_close(out[rows], by_row, equal_nan=True, rtol=0, atol=0)
    others = [row for row in range(300) if row not in rows]
    assert torch.equal(out[others], block(states)[others])


@needs_fused
def test_a_feed_forward_block_with_another_activation_goes_by_row():
    block, up, down, states, exact = feed_forward(torch.float32, activation=functional.silu)
    out = block(states)
    assert torch.equal(out, down.by_row(up.by_row(states), states))
    assert relative_error(out, exact) < 0.02


@needs_int8
@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_a_sample_that_tells_nothing_settles_nothing(value):
    weight, bias, states = parts()
    layer = Int8Linear(weight, bias, sample=torch.full((10, 64), value))
    assert layer.range is None
    assert relative_error(layer(states), functional.linear(states, weight, bias)) < 0.015


@needs_int8
def test_rows_of_a_sample_that_are_not_finite_are_left_out():
    weight, bias, states = parts(rows=300)
    spoilt = states.clone()
    spoilt[0, 0], spoilt[1] = math.nan, -math.inf
    layer = Int8Linear(weight, bias, sample=spoilt)
    assert (layer.range is None) == (not fused_works(torch.float32))
    assert relative_error(layer(states), functional.linear(states, weight, bias)) < 0.02


@needs_int8
@pytest.mark.parametrize("wrong", ["missing", "zeros", "dtype"])
def test_a_range_is_not_settled_where_the_product_does_not_scale(monkeypatch, wrong):
    product = Int8Linear.product

    def changed(self, codes, dtype, residual=None):
        if wrong == "missing":
            raise RuntimeError("no such post-operation")
        out = product(self, codes, dtype, residual)
        return torch.zeros_like(out) if wrong == "zeros" else out.double()

    monkeypatch.setattr(Int8Linear, "product", changed)
    works = fused_works.__wrapped__
    assert not works(torch.float32)
    monkeypatch.setattr(int8, "fused_works", works)
    weight, bias, states = parts()
    assert Int8Linear(weight, bias, sample=states).range is None


# Channels


@needs_int8
def test_channels_that_are_large_are_smoothed():
    weight, bias, states = parts(outputs=96, inputs=128, rows=300)
    gain = torch.ones(128)
    for channel in (5, 77):
        # As in large trained models: the norm blows a channel up, and its weights are small.
        gain[channel], weight[:, channel] = 60.0, weight[:, channel] / 20.0
    states = states * gain
    exact = functional.linear(states, weight, bias)
    factor = smoothing(states)
    assert factor is not None
    assert (factor > 1.0).nonzero().flatten().tolist() == [5, 77]
    plain = relative_error(Int8Linear(weight, bias)(states), exact)
    smoothed = Int8Linear(weight, bias, sample=states)
    assert relative_error(smoothed(states), exact) < 0.02
    assert plain > 3 * relative_error(smoothed.by_row(states), exact)


def test_ordinary_channels_are_left_alone():
    _, _, states = parts(rows=300)
    assert smoothing(states) is None


def test_channels_are_left_alone_where_most_are_silent():
    _, _, states = parts(rows=300)
    states[:, :40] = 0.0
    assert smoothing(states) is None


def test_channels_that_are_not_finite_are_left_alone():
    _, _, states = parts(rows=300)
    states[0, 3], states[1, 4] = math.nan, math.inf
    assert smoothing(states) is None


# In a model


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


def with_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.fixture
def int8_pays(monkeypatch):
    """8-bit layers whether or not they are the fastest here."""
    monkeypatch.setattr(encoder_kit, "KITS", WITHOUT_OWN_KERNELS)
    monkeypatch.setattr(onednn_kit, "int8_pays", lambda *_: True)


@needs_fused
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
        "bge_rerank_adapters.engine.models.encoder.kit.resolve_dtype", lambda *_: torch.float32
    )
    smoothed = error(logits("int8"))
    monkeypatch.setattr(
        "bge_rerank_adapters.engine.models.cpu.onednn.int8.smoothing", lambda *_: None
    )
    assert smoothed < 0.1 * statistics.stdev(exact)
    assert error(logits("int8")) > 1.3 * smoothed


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
from torch.nn import functional
from bge_rerank_adapters.engine.models.cpu.onednn import int8, ranges
weight, states = torch.full((32, 64), 1.0), torch.full((4, 64), 1.0)
layer = int8.Int8Linear(weight, torch.zeros(32))
settled = int8.Int8Linear(weight, torch.zeros(32))
settled.calibrate(states)
limit = settled.range.scale * (ranges.steps() - settled.range.zero)
largest = torch.full((4, 64), limit)
up = int8.Int8Linear(torch.eye(64), torch.zeros(64), functional.gelu)
down = int8.Int8Linear(weight, torch.zeros(32), after_gelu=True)
up.calibrate(states * 4)
down.calibrate(states * 4)
inner, beyond = up.gelu_codes(up.encode(states * 4)[0], down.range)
print(
    ranges.steps(),
    float((layer(states) - 64.0).abs().max()),
    float((settled(largest) - 64.0 * limit).abs().max()),
    int(settled.encode(largest)[0].max()),
    int(inner.max()),
)
"""


@needs_fused
@pytest.mark.usefixtures("int8_pays")
def test_most_rows_of_a_model_are_within_its_ranges(monkeypatch):
    rows = {"inside": 0, "outside": 0}
    for name in ("encode", "gelu_codes"):
        counted = getattr(Int8Linear, name)

        def count(self, *args, counted=counted):
            codes, outside = counted(self, *args)
            rows["outside"] += 0 if outside is None else len(outside)
            rows["inside"] += len(codes)
            return codes, outside

        monkeypatch.setattr(Int8Linear, name, count)
    with Reranker("tiny", device="cpu", dtype="int8") as reranker:
        reranker.score(next(iter(read_queries().values())), list(read_sentences().values())[:60])
        model = reranker._core.workers[0].model
        *others, last = getattr(model, "_model", model)._layers
    # Special tokens are beyond, four of a hundred here.
    assert 0 < rows["outside"] < 0.08 * rows["inside"]
    assert all(layer.attention_output.range for layer in others)
    # First tokens are special ones.
    assert last.attention_output.range is None
    assert last.projections[1].range is not None


@needs_int8
@pytest.mark.usefixtures("int8_pays")
@pytest.mark.parametrize("activation", ["silu", "gelu_new"])
def test_other_activations_go_by_row(tmp_path, activation):
    folder = with_config(build_xlm_roberta(tmp_path), hidden_act=activation)
    found = {}
    for dtype in ("float32", "int8"):
        with Reranker(str(folder), device="cpu", dtype=dtype) as reranker:
            found[dtype] = reranker.logits("tiger", ["river stone tiger", "stone", "a b c"])
    assert found["int8"] == pytest.approx(found["float32"], abs=0.2)


@needs_int8
@pytest.mark.parametrize("wrong", [0, -1, 10**14])
def test_sizes_are_checked_before_they_are_timed(tmp_path, wrong):
    folder = with_config(build_xlm_roberta(tmp_path), intermediate_size=wrong)
    with pytest.raises(CheckpointError, match="not of one checkpoint"):
        Reranker(str(folder), device="cpu", dtype="int8")


@needs_fused
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
    steps, error, settled_error, code, inner_code = done.stdout.split()
    assert int(steps) in (127, 255)
    assert float(error) < 1e-3
    assert float(settled_error) < 1e-3
    assert int(code) == int(steps)
    assert int(inner_code) <= int(steps)


def test_no_range_is_settled_with_few_steps(monkeypatch):
    monkeypatch.setattr(int8, "steps", lambda: 127)
    assert not fused_works.__wrapped__(torch.float32)


def test_a_sum_that_saturates_is_noticed(monkeypatch):
    monkeypatch.setattr(ranges, "_exact_up_to", lambda largest: largest < 255)
    assert ranges.steps.__wrapped__() == 127


@needs_int8
@pytest.mark.parametrize("pays", [True, False])
def test_layers_are_8_bit_where_that_is_faster(monkeypatch, pays):
    monkeypatch.setattr(encoder_kit, "KITS", WITHOUT_OWN_KERNELS)
    monkeypatch.setattr(onednn_kit, "int8_pays", lambda *_: pays)
    read = encoder_model.sample_pairs
    sampled = []
    monkeypatch.setattr(encoder_model, "sample_pairs", lambda: sampled.append(1) or read())
    with Reranker("tiny", device="cpu", dtype="int8") as reranker:
        assert reranker.dtype == "int8"
        assert len(reranker.logits("a", ["b", "c"])) == 2
        model = reranker._core.workers[0].model
        model = getattr(model, "_model", model)
        assert (model.kit.layer_dtype is torch.int8) is pays
        assert all(isinstance(each.attention_output, Int8Linear) is pays for each in model._layers)
    # Nothing else needs the sample.
    assert len(sampled) == pays


@needs_int8
@pytest.mark.parametrize("slow", ["Int8FeedForward", "linear_maker"])
def test_8_bit_layers_are_timed_against_the_others(monkeypatch, slow):
    class Slow:
        def __init__(self, *_):
            assert torch.get_num_threads() == 1

        def __call__(self, *_):
            time.sleep(0.2)

    monkeypatch.setattr(timing, slow, Slow if slow == "Int8FeedForward" else lambda *_: Slow)
    pays = timing.int8_pays.__wrapped__(torch.float32, 64, 128)
    assert pays is (slow == "linear_maker")


def test_the_sample_is_of_several_languages_and_fills_half_a_pack():
    pairs = calibration.sample_pairs()
    assert len(pairs) == len(set(pairs)) >= 12
    with Reranker("tiny", device="cpu", dtype="float32") as reranker:
        tokens = sum(map(len, reranker._calls._tokenizer.tokenize(pairs).distinct))
    assert 500 < tokens < 2048


def test_int8_is_for_processors_alone(monkeypatch):
    with pytest.raises(DeviceError, match="int8"):
        devices.resolve_dtype("int8", torch.device("cuda:0"))
    monkeypatch.setattr(devices, "int8_works", lambda: False)
    with pytest.raises(DeviceError, match="oneDNN"):
        devices.resolve_dtype("int8", torch.device("cpu"))


@needs_int8
def test_int8_is_settled_in_one_thread_however_many_there_are(monkeypatch):
    """Threads that meet after each small product of the sample take ten times as long if busy."""
    threads: set[int] = set()
    through = calibration.SampleRun.through

    def counted(self, tensors):
        threads.add(torch.get_num_threads())
        return through(self, tensors)

    monkeypatch.setattr(calibration.SampleRun, "through", counted)
    # Where 8-bit layers are not faster they are not made.
    monkeypatch.setattr(onednn_kit, "int8_pays", lambda *_, **__: True)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with Reranker("tiny", device="cpu", dtype="int8"):
            assert threads == {1}
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.fixture(params=[torch.float16, torch.bfloat16, torch.float64], ids=str)
def _other_default_dtype(request):
    """The host's, such as transformers sets while it loads a model in another thread."""
    before = torch.get_default_dtype()
    probes = (int8_works, fused_works, steps, timing.int8_pays, packed_works)
    for probe in probes:
        probe.cache_clear()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)
    for probe in probes:
        probe.cache_clear()


@needs_int8
@pytest.mark.usefixtures("_other_default_dtype")
@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float32"])
def test_the_hosts_default_dtype_changes_no_logit(dtype, expected_logits):
    assert logits_in(dtype) == pytest.approx(expected_logits[dtype], abs=1e-6)


@pytest.fixture(scope="module")
def expected_logits():
    return {dtype: logits_in(dtype) for dtype in ("int8", "bfloat16", "float32")}


def logits_in(dtype):
    """Return the logits of an engine that timings have no say in."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(onednn_kit, "int8_pays", lambda *_, **__: True)
        patched.setattr(encoder_kit, "resolve_dtype", lambda *_, **__: torch.float32)
        with Reranker("tiny", device="cpu", dtype=dtype) as engine:
            return engine.logits(*PAIRS)


@needs_int8
@pytest.mark.usefixtures("_other_default_dtype")
def test_the_hosts_default_dtype_changes_no_8_bit_layer():
    weight, bias, states = (each.float() for each in parts())
    exact = functional.linear(states, weight, bias)
    layer = Int8Linear(weight, bias, sample=states)
    assert relative_error(layer(states), exact) < 0.03
    assert int8_works()
    assert fused_works(torch.float32) is FUSED_WORKS
