"""An encoder's layers in 8 bits, and the sample that tells their ranges as it runs through them."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

from bge_rerank_adapters.engine.models.cpu.onednn.int8 import Int8FeedForward, Int8Linear
from bge_rerank_adapters.engine.models.encoder.layers import Layer, LayerParts, Parts, stacked
from bge_rerank_adapters.engine.models.layers.linear import Activation


class LayerSample(NamedTuple):
    """What runs through a layer when a sample does, each of shape (rows, a layer's inputs).

    Attributes:
        states: What the layer is given.
        attended: What attention gives.
        middle: What the feed-forward block is given.
        inner: What its activation gives.
        output: What the layer gives.
    """

    states: Tensor
    attended: Tensor
    middle: Tensor
    inner: Tensor
    output: Tensor


def run_sample(
    parts: LayerParts,
    activation: Activation,
    states: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> LayerSample:
    """Run a sample through a layer.

    Args:
        parts: What the layer is made of.
        activation: Of its feed-forward block.
        states: What it gets, shape (rows, hidden).
        attend: From the sample's query, key and value to the attended values, each of that shape.
    """
    attended = attend(*_outputs(states, stacked(*parts.projections)).chunk(3, dim=-1))
    middle = parts.attention_norm(_outputs(attended, parts.attention_output).add_(states))
    inner = activation(_outputs(middle, parts.up))
    output = parts.output_norm(_outputs(inner, parts.down).add_(middle))
    return LayerSample(states, attended, middle, inner, output)


def int8_layer(
    parts: LayerParts, activation: Activation, sample: LayerSample, *, last: bool
) -> Layer:
    """Return a layer in 8 bits.

    Args:
        parts: What it is made of, in float32.
        activation: Of its feed-forward block.
        sample: What tells the ranges of its products.
        last: Whether it is the last layer, where all but key and value are for first tokens, which
            are no ordinary ones.
    """
    # Products have no other activation.
    settled = not last and activation is functional.gelu
    query, key_value = parts.projections
    return Layer(
        projections=(
            (Int8Linear(*query), Int8Linear(*key_value, sample=sample.states))
            if last
            else (Int8Linear(*stacked(query, key_value), sample=sample.states),)
        ),
        attention_output=Int8Linear(
            *parts.attention_output, sample=None if last else sample.attended
        ),
        attention_norm=parts.attention_norm,
        feed_forward=Int8FeedForward(
            Int8Linear(*parts.up, activation, sample=sample.middle if settled else None),
            Int8Linear(*parts.down, sample=sample.inner if settled else None, after_gelu=settled),
        ),
        output_norm=parts.output_norm,
    )


def _outputs(states: Tensor, parts: Parts) -> Tensor:
    weight, bias = (each.to(states.dtype) for each in parts)
    return functional.linear(states, weight, bias)
