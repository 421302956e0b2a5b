"""The ways to attend over a pack, against attention over each pair alone."""

import sys
import time
from collections.abc import Callable
from functools import partial
from types import ModuleType

import pytest
import torch
from torch.nn import functional

from bge_rerank_adapters.engine.models.causal import attention as causal_module
from bge_rerank_adapters.engine.models.layers import attention as attention_module
from bge_rerank_adapters.engine.models.layers import one_call
from bge_rerank_adapters.engine.models.layers.attention import (
    Layout,
    attention_for,
    grouped_attention,
    one_call_attention,
    product_attention,
)

LENGTHS = [7, 5, 5, 5, 3, 1]
HEADS, WIDTH = 2, 8
CPU = torch.device("cpu")


def alone(query, key, value, first_only):
    """Attend over one pair after another."""
    outputs, start = [], 0
    for pair, tokens in enumerate(LENGTHS):
        rows = slice(start, start + tokens)
        asked = slice(pair, pair + 1) if first_only else rows
        start += tokens
        split = [
            each.reshape(1, -1, HEADS, WIDTH).transpose(1, 2)
            for each in (query[asked], key[rows], value[rows])
        ]
        out = functional.scaled_dot_product_attention(*split)
        outputs.append(out.transpose(1, 2).reshape(-1, HEADS * WIDTH))
    return torch.cat(outputs)


def attend_in_spans(query, key, value, spans, sight, **_) -> torch.Tensor:
    """What kernels of one call compute, one pair after another."""
    assert spans.queries.dtype == spans.keys.dtype == torch.int32
    outputs = []
    for pair in range(len(spans.keys) - 1):
        asked = slice(int(spans.queries[pair]), int(spans.queries[pair + 1]))
        rows = slice(int(spans.keys[pair]), int(spans.keys[pair + 1]))
        assert asked.stop - asked.start <= spans.max_queries
        assert rows.stop - rows.start <= spans.max_keys
        split = [each.transpose(0, 1)[None] for each in (query[asked], key[rows], value[rows])]
        out = functional.scaled_dot_product_attention(
            *split, is_causal=sight.causal, scale=sight.scale, enable_gqa=True
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def flash_operator(query, key, value, bounds_query, bounds_key, *rest, **options):
    """`_flash_attention_forward` of torch 2.6 to 2.13, as far as its arguments tell what to do."""
    most_queries, most_keys, dropout, causal, debug = rest
    assert (dropout, debug) == (0.0, False)
    assert options["window_size_left"] == -1
    assert options["window_size_right"] == (0 if causal else -1)
    spans = one_call.Spans(bounds_query, bounds_key, most_queries, most_keys)
    sight = one_call.AttentionOptions(options["scale"], causal=causal)
    return attend_in_spans(query, key, value, spans, sight), None, None, None, None


def varlen_function(
    query, key, value, bounds_query, bounds_key, most_queries, most_keys, **options
):
    """`torch.nn.attention.varlen.varlen_attn` of torch 2.10 to 2.13, likewise."""
    assert options["enable_gqa"] == (query.shape[1] != key.shape[1])
    causal = options["window_size"] == (-1, 0)
    assert causal or options["window_size"] == (-1, -1)
    spans = one_call.Spans(bounds_query, bounds_key, most_queries, most_keys)
    return attend_in_spans(
        query, key, value, spans, one_call.AttentionOptions(options["scale"], causal=causal)
    )


def efficient_operator(query, key, value, bias, bounds_query, bounds_key, *rest, **options):
    """`_efficient_attention_forward` of torch 2.6 to 2.13, likewise."""
    most_queries, most_keys, dropout, mask = rest
    assert (bias, dropout, len(query)) == (None, 0.0, 1)
    assert query.shape[2] == key.shape[2], "a key for each query head"
    spans = one_call.Spans(bounds_query, bounds_key, most_queries, most_keys)
    sight = one_call.AttentionOptions(options["scale"], causal=mask == 1)
    return attend_in_spans(query[0], key[0], value[0], spans, sight)[None], None


@pytest.fixture
def kernels(monkeypatch) -> dict[str, Callable[..., object]]:
    """The functions of torch that run on CUDA alone, replaced by what they compute; by name."""
    found = {
        "_flash_attention_forward": flash_operator,
        "varlen_attn": varlen_function,
        "_efficient_attention_forward": efficient_operator,
    }
    for name in ("_flash_attention_forward", "_efficient_attention_forward"):
        monkeypatch.setattr(
            torch.ops.aten, name, lambda *a, name=name, **k: found[name](*a, **k), raising=False
        )
    module = ModuleType("varlen")
    module.varlen_attn = lambda *a, **k: found["varlen_attn"](*a, **k)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    return found


WAYS = ["grouped", "products", "products of short pairs too", "flash", "varlen", "efficient"]


@pytest.fixture(params=WAYS)
def attention(request, monkeypatch, kernels):
    """All ways."""
    if request.param == "grouped":
        return grouped_attention
    if request.param.startswith("products"):
        if request.param.endswith("too"):
            monkeypatch.setattr(attention_module, "_SHORT_TOKENS", 1)
            monkeypatch.setattr(attention_module, "_ROWS_STEP", 4)
        return product_attention
    return partial(one_call_attention, kernel=getattr(one_call, request.param))


@pytest.mark.parametrize("first_only", [False, True])
def test_each_pair_attends_to_itself_alone(attention, first_only):
    generator = torch.Generator().manual_seed(5)
    total = sum(LENGTHS)
    asked = len(LENGTHS) if first_only else total
    query, key, value = (
        torch.randn(rows, HEADS * WIDTH, generator=generator) for rows in (asked, total, total)
    )
    out = attention(query, key, value, Layout(LENGTHS, CPU), HEADS)
    torch.testing.assert_close(out, alone(query, key, value, first_only), rtol=1e-5, atol=1e-6)


def test_projections_may_be_slices_of_one_matrix(attention):
    stacked = torch.randn(sum(LENGTHS), 3 * HEADS * WIDTH)
    query, key, value = stacked.chunk(3, dim=-1)
    out = attention(query, key, value, Layout(LENGTHS, CPU), HEADS)
    torch.testing.assert_close(out, alone(query, key, value, False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attend", [grouped_attention, product_attention])
def test_what_is_not_finite_stays_within_its_pair(attend, monkeypatch):
    monkeypatch.setattr(attention_module, "_SHORT_TOKENS", 1)
    query, key, value = (torch.randn(sum(LENGTHS), HEADS * WIDTH) for _ in range(3))
    for states in (query, key, value):
        states[LENGTHS[0] : LENGTHS[0] + LENGTHS[1]] = float("nan")
    out = attend(query, key, value, Layout(LENGTHS, CPU), HEADS)
    assert [bool(part.isfinite().all()) for part in out.split(LENGTHS)] == [
        index != 1 for index in range(len(LENGTHS))
    ]


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "chosen"),
    [
        ("cpu", torch.float32, (9, 0), None),
        ("cpu", torch.float16, (9, 0), None),
        ("mps", torch.float16, (9, 0), None),
        ("cuda", torch.float32, (9, 0), one_call.efficient),
        ("cuda", torch.float16, (7, 5), one_call.efficient),
        ("cuda", torch.float16, (8, 0), one_call.flash),
        ("cuda", torch.bfloat16, (9, 0), one_call.flash),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_each_device_and_dtype_gets_the_fastest(
    monkeypatch, device, dtype, capability, chosen, causal
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    module = causal_module if causal else attention_module
    monkeypatch.setattr(module, "_works", lambda *_, **__: True)
    found = chosen_for(torch.device(device), dtype, causal=causal)
    plain = causal_module.grouped_causal_attention if causal else grouped_attention
    assert (found.keywords["kernel"] is chosen) if chosen else (found is plain)


def chosen_for(device, dtype, *, causal):
    if not causal:
        return attention_for(device, dtype, heads=HEADS, width=WIDTH)
    heads = causal_module.Heads(HEADS, HEADS // 2, WIDTH**-0.5)
    return causal_module.causal_attention_for(device, dtype, heads=heads, width=WIDTH)


@pytest.mark.parametrize("products_win", [True, False])
def test_a_timing_picks_bfloat16s_way_on_a_processor(monkeypatch, products_win):
    slow = grouped_attention if products_win else product_attention
    calls = []

    def slowed(query, key, value, layout, heads):
        calls.append(len(query))
        time.sleep(0.1)
        return slow(query, key, value, layout, heads)

    name = "grouped_attention" if products_win else "product_attention"
    monkeypatch.setattr(attention_module, name, slowed)
    attention_module._products_win.cache_clear()
    try:
        chosen = attention_for(CPU, torch.bfloat16, heads=HEADS, width=WIDTH)
    finally:
        attention_module._products_win.cache_clear()
    assert chosen is (product_attention if products_win else grouped_attention)
    assert calls


def refusing(*_, **__):
    raise RuntimeError("no kernel for such heads")


def wrong(kernel):
    def shifted(*inputs, **options):
        out = kernel(*inputs, **options)
        return (out[0] + 1.0, *out[1:]) if isinstance(out, tuple) else out + 1.0

    return shifted


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("broken", "chosen"),
    [
        (0, one_call.flash),
        (1, one_call.varlen),
        (2, one_call.efficient),
        (3, None),
    ],
)
@pytest.mark.parametrize("how", ["refusing", "wrong"])
def test_each_kernel_is_tried_before_it_is_taken(monkeypatch, kernels, broken, chosen, how, causal):
    for name in list(kernels)[:broken]:
        kernels[name] = refusing if how == "refusing" else wrong(kernels[name])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    # The states that it is tried with are made on the processor, where there is no CUDA.
    module = causal_module if causal else attention_module
    probe, layout = attention_module.probe_states, causal_module.CausalLayout if causal else Layout
    monkeypatch.setattr(
        module, "probe_states", lambda width, _, dtype, **seed: probe(width, CPU, dtype, **seed)
    )
    name = "CausalLayout" if causal else "Layout"
    monkeypatch.setattr(module, name, lambda lengths, _: layout(lengths, CPU))
    found = chosen_for(torch.device("cuda"), torch.float16, causal=causal)
    plain = causal_module.grouped_causal_attention if causal else grouped_attention
    assert (found.keywords["kernel"] is chosen) if chosen else (found is plain)


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("kernel", [one_call.flash, one_call.efficient])
def test_decoders_are_told_what_a_token_sees(kernels, monkeypatch, kernel, window, last_only):
    """Windows that matter go to a kernel that has them, and the others to none."""
    seen = []

    def windowed(*inputs, **options):
        seen.append((options["window_size_left"], options["window_size_right"]))
        return (inputs[0] * 0.0,)

    if window == 3:
        kernels["_flash_attention_forward"] = windowed
    heads = causal_module.Heads(HEADS, HEADS // 2, WIDTH**-0.5, window)
    layout = causal_module.CausalLayout(LENGTHS, CPU)
    generator = torch.Generator().manual_seed(6)
    query, key, value = (
        torch.randn(sum(LENGTHS), number * WIDTH, generator=generator)
        for number in (HEADS, HEADS // 2, HEADS // 2)
    )
    query = query[layout.last] if last_only else query
    found = causal_module.one_call_causal_attention(query, key, value, layout, heads, kernel=kernel)
    if window == 3 and kernel is one_call.flash:
        assert seen == [(2, 0)]
        return
    wanted = causal_module.grouped_causal_attention(query, key, value, layout, heads)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
