"""This package's own kernels for processors with AMX, against torch in float32."""

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional

from bge_rerank_adapters import Reranker
from bge_rerank_adapters.models import amx, streams
from bge_rerank_adapters.models.amx import AmxLinear, AmxRest, amx_attention, amx_runs
from bge_rerank_adapters.models.attention import Layout
from bge_rerank_adapters.models.encoder_config import parse_config
from bge_rerank_adapters.models.weights import read_config
from tests.checkpoints import build_xlm_roberta, read_queries, read_sentences

CPU = torch.device("cpu")
QUERY = next(iter(read_queries().values()))
SENTENCES = list(read_sentences().values())

needs_amx = pytest.mark.skipif(
    amx._kernels() is None, reason="this processor has no AMX, or the kernels were not built"
)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).bfloat16()


# Layers


@needs_amx
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


@needs_amx
@pytest.mark.parametrize("lengths", [[1], [32], [7, 33, 64, 65, 1, 16], [300, 17], [1100]])
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


@needs_amx
def test_very_unequal_scores_are_weighed_without_overflow():
    query = torch.full((1, 40, 32), 100.0).bfloat16()
    key, value = query.clone(), random(1, 40, 32)
    key[:, 1:] = -100
    found = amx_attention(query, key, value, Layout([40], CPU), 1)
    assert torch.equal(found, value[0, :1].expand(40, 32))


def layer_of(hidden: int, intermediate: int, *, scale: float = 1.0):
    shapes = (hidden, hidden), (intermediate, hidden), (hidden, intermediate)
    linears = [
        (random(*shape, seed=seed, scale=scale / shape[1] ** 0.5), random(shape[0], seed=seed + 3))
        for seed, shape in enumerate(shapes)
    ]
    norms = [(random(hidden, seed=seed), random(hidden, seed=seed + 1)) for seed in (7, 9)]
    return linears, norms


def rest_in_float32(linears, norms, epsilon, states, attended):
    (output, up, down) = [[each.float() for each in pair] for pair in linears]
    (first, second) = [[each.float() for each in pair] for pair in norms]
    shape = (states.shape[1],)
    middle = functional.linear(attended.float(), *output) + states.float()
    middle = functional.layer_norm(middle, shape, *first, epsilon)
    inner = functional.gelu(functional.linear(middle, *up))
    return functional.layer_norm(functional.linear(inner, *down) + middle, shape, *second, epsilon)


@needs_amx
@pytest.mark.parametrize("rows", [1, 32, 45, 400, 1000])
@pytest.mark.parametrize(("hidden", "intermediate"), [(32, 32), (96, 1120), (128, 2048)])
def test_the_rest_of_a_layer_is_as_in_float32(rows, hidden, intermediate):
    linears, norms = layer_of(hidden, intermediate)
    states, attended = random(rows, hidden), random(rows, hidden, seed=1)
    found = AmxRest(linears, norms, 1e-5)(states, attended)
    expected = rest_in_float32(linears, norms, 1e-5, states, attended)
    error = (found.float() - expected).norm() / expected.norm()
    assert error < 0.006
    assert (found.float() - expected).abs().max() < 0.1


@needs_amx
@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0, 40.0])
def test_gelu_is_exact_to_bfloat16(scale):
    # The first norm gives numbers of all sizes, which the identity lets through to GELU and after.
    hidden = 512
    identity, nothing = torch.eye(hidden).bfloat16(), torch.zeros(hidden).bfloat16()
    spread = torch.full((hidden,), scale).bfloat16()
    linears = [(identity, nothing)] * 3
    norms = [(spread, nothing), (torch.ones(hidden).bfloat16(), nothing)]
    states = random(64, hidden)
    found = AmxRest(linears, norms, 1e-5)(states, torch.zeros_like(states))
    expected = rest_in_float32(linears, norms, 1e-5, states, torch.zeros_like(states))
    assert (found.float() - expected).abs().max() < 0.03


@needs_amx
def test_all_threads_together_give_the_same():
    linears, norms = layer_of(96, 160)
    rest, linear = AmxRest(linears, norms, 1e-5), AmxLinear(*linears[1], slice_width=32)
    states, attended = random(333, 96), random(333, 96, seed=1)
    queries = [random(3, 333, 32, seed=seed) for seed in range(3)]
    layout = Layout([300, 33], CPU)

    def compute():
        return rest(states, attended), linear(states), amx_attention(*queries, layout, 3)

    alone = compute()
    tasks = streams._Tasks()
    streams._start(3, 1, tasks)
    with streams._together(streams._Crew(tasks, 4)):
        together = compute()
    streams._end(tasks, 3)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@needs_amx
def test_threads_do_not_share_room():
    linears, norms = layer_of(64, 128)
    rest = AmxRest(linears, norms, 1e-5)
    inputs = [(random(rows, 64, seed=rows), random(rows, 64, seed=-rows)) for rows in range(1, 60)]
    alone = [rest(*each) for each in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            found = pool.map(lambda each: rest(*each), inputs)
            assert all(torch.equal(one, other) for one, other in zip(alone, found, strict=True))


@needs_amx
def test_short_memory_is_an_error_that_the_engine_knows(monkeypatch):
    class Short:
        def bge_amx_linear(self, *_):
            return -1

    linear = AmxLinear(random(32, 32), random(32), slice_width=32)
    monkeypatch.setattr(amx, "_library", Short)
    with pytest.raises(MemoryError, match="not enough memory"):
        linear(random(4, 32))


# In a model


@pytest.fixture
def model():
    with Reranker("tiny", dtype="bfloat16", device="cpu") as engine:
        found = engine._core._models[0]
        found = getattr(found, "_model", found)
        assert found.own_kernels
        pairs = engine._tokenizer.tokenize([(QUERY, text) for text in SENTENCES[:40]]).distinct
        found.pairs = sorted(pairs, key=len, reverse=True)
        yield found


@needs_amx
def test_a_model_scores_as_in_float32(reranker):
    with Reranker("tiny", dtype="bfloat16", device="cpu") as engine:
        assert engine._core._models[0].streams == torch.get_num_threads()
        found = engine.logits(QUERY, SENTENCES[:120])
    exact = reranker.logits(QUERY, SENTENCES[:120])
    off = np.abs(np.subtract(found, exact))
    assert off.mean() < 0.01
    assert off.max() < 0.06


@needs_amx
def test_a_pair_scores_the_same_whatever_stands_beside_it(model):
    together = model.logits(model.pairs)
    # The head, in float32, is torch's.
    alone = [model.logits([each])[0] for each in model.pairs]
    assert alone == pytest.approx(together, abs=1e-5)
    assert model.logits(model.pairs[::-1]) == pytest.approx(together[::-1], abs=1e-5)


@needs_amx
def test_a_pair_that_is_not_finite_spoils_no_other(model):
    sound = model.logits(model.pairs)
    bad = 3
    others = {word for place, each in enumerate(model.pairs) for word in each.ids if place != bad}
    model._words[next(word for word in model.pairs[bad].ids if word not in others)] = float("nan")
    found = model.logits(model.pairs)
    assert np.isnan(found).nonzero()[0].tolist() == [bad]
    assert [*found[:bad], *found[bad + 1 :]] == [*sound[:bad], *sound[bad + 1 :]]


@needs_amx
def test_kernels_are_for_sizes_that_fill_tiles(tmp_path):
    sizes = parse_config(read_config(build_xlm_roberta(tmp_path)), folder=tmp_path)
    assert not amx_runs(sizes, CPU, torch.bfloat16), "heads of 16 fill no tile"
    fitting = {"hidden": 384, "heads": 12, "intermediate": 1536}

    def runs(dtype=torch.bfloat16, device=CPU, **changes):
        changed = type(sizes)(
            **{name: getattr(sizes, name) for name in sizes.__slots__} | fitting | changes
        )
        return amx_runs(changed, device, dtype)

    assert runs()
    assert not runs(intermediate=1520)
    assert not runs(heads=8)
    assert not runs(activation="relu")
    assert not runs(dtype=torch.float32)
    assert not runs(device=torch.device("cuda"))


# Where they do not run


@pytest.fixture
def fresh():
    amx._kernels.cache_clear()
    yield
    amx._kernels.cache_clear()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("limit", ["AVX2", "avx512_core_bf16"])
def test_who_limits_onednn_limits_the_kernels(monkeypatch, limit):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert amx._kernels() is None


@needs_amx
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("limit", ["", "DEFAULT", "avx512_core_amx", "AVX10_1_512_AMX"])
def test_a_limit_that_allows_amx_allows_the_kernels(monkeypatch, limit):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert amx._kernels() is not None


@pytest.mark.usefixtures("fresh")
def test_without_the_library_other_layers_run(monkeypatch, tmp_path):
    monkeypatch.setattr(amx, "_LIBRARY", tmp_path / "absent.so")
    with Reranker("tiny", dtype="bfloat16", device="cpu") as engine:
        model = engine._core._models[0]
        assert not getattr(model, "_model", model).own_kernels
        assert len(engine.logits(QUERY, SENTENCES[:3])) == 3
    with pytest.raises(RuntimeError, match="ask amx_runs"):
        AmxLinear(random(32, 32), random(32), slice_width=32)


@needs_amx
@pytest.mark.usefixtures("fresh")
def test_a_library_of_another_version_is_left_alone(monkeypatch, caplog):
    monkeypatch.setattr(amx, "_VERSION", -1)
    assert amx._kernels() is None
    assert "another version" in caplog.text


@needs_amx
def test_ended_threads_leave_no_memory():
    rest = AmxRest(*layer_of(512, 1024), 1e-5)
    states, before = random(400, 512), 0
    for round_ in range(40):
        thread = threading.Thread(target=rest, args=(states, states))
        thread.start()
        thread.join()
        if round_ == 5:
            before = resident_kb()
    # Each has taken four megabytes.
    assert resident_kb() - before < 20_000


def resident_kb() -> int:
    with open("/proc/self/status") as status:  # noqa: PTH123
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
