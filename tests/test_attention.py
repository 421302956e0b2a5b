"""The ways to attend over a pack, against attention over each pair alone."""

import sys
import time
from types import ModuleType

import pytest
import torch
from torch.nn import functional

from bge_rerank_adapters.engine.models.layers import attention as attention_module
from bge_rerank_adapters.engine.models.layers.attention import (
    Layout,
    attention_for,
    grouped_attention,
    product_attention,
    varlen_attention,
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


def reference_varlen(query, key, value, bounds_query, bounds_key, max_query, max_key):
    """What `torch.nn.attention.varlen.varlen_attn` computes, one pair after another."""
    assert bounds_query.dtype == bounds_key.dtype == torch.int32
    outputs = []
    for pair in range(len(bounds_key) - 1):
        asked = slice(int(bounds_query[pair]), int(bounds_query[pair + 1]))
        rows = slice(int(bounds_key[pair]), int(bounds_key[pair + 1]))
        assert asked.stop - asked.start <= max_query
        assert rows.stop - rows.start <= max_key
        split = [each.transpose(0, 1)[None] for each in (query[asked], key[rows], value[rows])]
        outputs.append(functional.scaled_dot_product_attention(*split)[0].transpose(0, 1))
    return torch.cat(outputs)


WAYS = ["grouped", "products", "products of short pairs too", "varlen"]


@pytest.fixture(params=WAYS)
def attention(request, monkeypatch):
    """All ways; varlen's kernel, which runs on CUDA alone, replaced by what it computes."""
    if request.param == "grouped":
        return grouped_attention
    if request.param.startswith("products"):
        if request.param.endswith("too"):
            monkeypatch.setattr(attention_module, "_SHORT_TOKENS", 1)
            monkeypatch.setattr(attention_module, "_ROWS_STEP", 4)
        return product_attention
    module = ModuleType("varlen")
    module.varlen_attn = reference_varlen
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    return varlen_attention


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
        ("cpu", torch.float32, (9, 0), grouped_attention),
        ("cpu", torch.float16, (9, 0), grouped_attention),
        ("cuda", torch.float32, (9, 0), grouped_attention),
        ("cuda", torch.float16, (7, 5), grouped_attention),
        ("cuda", torch.float16, (8, 0), varlen_attention),
        ("cuda", torch.bfloat16, (9, 0), varlen_attention),
    ],
)
def test_each_device_and_dtype_gets_the_fastest(monkeypatch, device, dtype, capability, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(attention_module, "_varlen_works", lambda *_: True)
    assert attention_for(torch.device(device), dtype, heads=HEADS, width=WIDTH) is chosen


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


def refusing_varlen(*_):
    raise RuntimeError("no kernel for such heads")


def wrong_varlen(*inputs):
    return reference_varlen(*inputs) + 1.0


@pytest.mark.parametrize(
    ("kernel", "works"),
    [(reference_varlen, True), (refusing_varlen, False), (wrong_varlen, False), (None, False)],
)
def test_the_varlen_kernel_is_tried_before_it_is_taken(monkeypatch, kernel, works):
    module = None
    if kernel:
        module = ModuleType("varlen")
        module.varlen_attn = kernel
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    # The states that it is tried with are made on the processor, where there is no CUDA.
    probe = attention_module.probe_states
    monkeypatch.setattr(
        attention_module, "probe_states", lambda width, _, dtype: probe(width, CPU, dtype)
    )
    monkeypatch.setattr(attention_module, "Layout", lambda lengths, _: Layout(lengths, CPU))
    chosen = attention_for(torch.device("cuda"), torch.float16, heads=HEADS, width=WIDTH)
    assert chosen is (varlen_attention if works else grouped_attention)
