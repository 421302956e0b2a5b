"""Prepacked linear layers against torch's own, and the sizes of products."""

import pytest
import torch
from torch.nn import functional

from bge_rerank_adapters.engine.models.layers import linear
from bge_rerank_adapters.engine.models.layers.linear import PackedLinear, PlainLinear, few_sizes

needs_packed = pytest.mark.skipif(
    not linear.packed_works(torch.float32), reason="this torch has no oneDNN to prepack for"
)


def parts(outputs=48, inputs=64, rows=20):
    generator = torch.Generator().manual_seed(3)
    weight, bias, states = (
        torch.randn(shape, generator=generator)
        for shape in ((outputs, inputs), (outputs,), (rows, inputs))
    )
    return weight, bias, states


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


def test_products_come_in_few_sizes_that_are_hardly_larger():
    sizes = {few_sizes(rows) for rows in range(1, 4097)}
    assert len(sizes) < 120
    for rows in range(1, 4097):
        assert rows <= few_sizes(rows) <= max(rows + 7, rows * 17 / 16)
        assert few_sizes(few_sizes(rows)) == few_sizes(rows)
