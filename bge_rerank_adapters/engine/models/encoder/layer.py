"""One layer of an encoder: what every kind of it does, and the one made of linear layers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from bge_rerank_adapters.engine.models.encoder.calibration import LayerSample
from bge_rerank_adapters.engine.models.encoder.tensors import LayerTensors, stacked
from bge_rerank_adapters.engine.models.layers.attention import Layout
from bge_rerank_adapters.engine.models.layers.linear import (
    Activation,
    FeedForward,
    Linear,
)
from bge_rerank_adapters.engine.models.layers.norm import LayerNorm


class EncoderLayer(Protocol):
    """What the model asks of a layer; only its kit's attention reads query, key and value."""

    def project(self, states: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value for states of shape (rows, hidden)."""
        ...

    def project_last(
        self, states: Tensor, first: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the query for the pairs' first tokens, and key and value for all.

        Args:
            states: Shape (rows, hidden).
            first: Those of the pairs' first tokens, shape (n, hidden).
            layout: Of the pack.
        """
        ...

    def after_attention(self, states: Tensor, attended: Tensor, layout: Layout) -> Tensor:
        """Return the layer's output for its input and what attention gave, all (rows, hidden)."""
        ...


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """A layer made of linear layers.

    Attributes:
        projections: One that gives query, key and value side by side, of width 3h; in the last
            layer one for the query and one for key and value, since there the only queries are
            those of the pairs' first tokens.
        attention_output: From the attended values back to width h.
        attention_norm: After the first residual sum.
        feed_forward: From width h to the block's own and back, plus what it is given.
        output_norm: After the second residual sum.
    """

    projections: tuple[Linear, ...]
    attention_output: Linear
    attention_norm: LayerNorm
    feed_forward: Callable[[Tensor], Tensor]
    output_norm: LayerNorm

    def project(self, states: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value for states, all of shape (rows, hidden)."""
        del layout
        query, key, value = self.projections[0](states).chunk(3, dim=-1)
        return query, key, value

    def project_last(
        self, states: Tensor, first: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the query for the pairs' first tokens, and key and value for all."""
        del layout
        key, value = self.projections[1](states).chunk(2, dim=-1)
        return self.projections[0](first), key, value

    def after_attention(self, states: Tensor, attended: Tensor, layout: Layout) -> Tensor:
        """Return the output for states and what their attention gave, both (rows, hidden)."""
        del layout
        states = self.attention_norm(self.attention_output(attended, states))
        return self.output_norm(self.feed_forward(states))


class LayerSource(NamedTuple):
    """What a layer is made from.

    Attributes:
        tensors: Its weights and biases.
        last: Whether it is the last layer, where all but key and value are for first tokens, which
            are no ordinary ones.
        sample: What runs through it when a sample does; `None` unless the kit is of 8-bit layers.
    """

    tensors: LayerTensors
    last: bool
    sample: LayerSample | None = None


def linear_layer(
    source: LayerSource, activation: Activation, make: Callable[..., Linear]
) -> LinearLayer:
    """Return a layer of one kind of linear layers.

    Args:
        source: What it is made from.
        activation: Of its feed-forward block.
        make: Makes a linear layer of weight, bias and, if any, activation.
    """
    tensors = source.tensors
    stacks = tensors.projections if source.last else (stacked(*tensors.projections),)
    return LinearLayer(
        projections=tuple(make(*stack) for stack in stacks),
        attention_output=make(*tensors.attention_output),
        attention_norm=tensors.attention_norm,
        feed_forward=FeedForward(make(*tensors.up, activation), make(*tensors.down)),
        output_norm=tensors.output_norm,
    )
