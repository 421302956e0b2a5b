"""An encoder's layers in 8 bits, read while a sample runs through them that tells their ranges."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from bge_rerank_adapters.models.activations import ACTIVATIONS
from bge_rerank_adapters.models.encoder_layers import EncoderReader, Layer, Parts, stacked
from bge_rerank_adapters.models.int8 import Int8FeedForward, Int8Linear


def int8_layer(
    read: EncoderReader,
    index: int,
    sample: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> tuple[Layer, Tensor]:
    """Return the layer at a position counted from 0, and what it gives for a sample.

    Args:
        read: Reads the checkpoint.
        index: The position.
        sample: What the layer gets, shape (rows, hidden).
        attend: From the sample's query, key and value to the attended values, each of that shape.
    """
    # Quantised from what is stored, not from what bfloat16 leaves of it.
    parts, activation = read.layer_parts(index, torch.float32), ACTIVATIONS[read.config.activation]
    whole = stacked(*parts.projections)
    attended = attend(*_outputs(sample, whole).chunk(3, dim=-1))
    middle = parts.attention_norm(_outputs(attended, parts.attention_output).add_(sample))
    inner = activation(_outputs(middle, parts.up))
    # Of the last layer all but key and value is for first tokens, which are no ordinary ones.
    last = read.is_last(index)
    # Products have no other activation.
    settled = not last and activation is functional.gelu
    query, key_value = parts.projections
    layer = Layer(
        projections=(
            (Int8Linear(*query), Int8Linear(*key_value, sample=sample))
            if last
            else (Int8Linear(*whole, sample=sample),)
        ),
        attention_output=Int8Linear(*parts.attention_output, sample=None if last else attended),
        attention_norm=parts.attention_norm,
        feed_forward=Int8FeedForward(
            Int8Linear(*parts.up, activation, sample=middle if settled else None),
            Int8Linear(*parts.down, sample=inner if settled else None, after_gelu=settled),
        ),
        output_norm=parts.output_norm,
    )
    return layer, parts.output_norm(_outputs(inner, parts.down).add_(middle))


def _outputs(states: Tensor, parts: Parts) -> Tensor:
    weight, bias = (each.to(states.dtype) for each in parts)
    return functional.linear(states, weight, bias)
