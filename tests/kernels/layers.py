"""Layers to try kernels on, and what they give in float32."""

import torch
from torch.nn import functional

from bge_rerank_adapters.engine.models.layers.norm import LayerNorm


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).bfloat16()


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
