"""A layer of an encoder: its interface, and an implementation by linear layers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from bge_rerank_adapters.engine.models.encoder.calibration import LayerSample
from bge_rerank_adapters.engine.models.encoder.tensors import LayerTensors, stacked
from bge_rerank_adapters.engine.models.layers.attention import Layout
from bge_rerank_adapters.engine.models.layers.linear import Activation, FeedForward, Linear
from bge_rerank_adapters.engine.models.layers.norm import LayerNorm


class EncoderLayer(Protocol):
    """The interface of a layer; only its kit's attention reads query, key and value."""

    def project(self, states: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value for states of shape (rows, hidden)."""
        ...

    def project_last(
        self, states: Tensor, first: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the query for the pairs' first tokens, and key and value for all.

        Args:
            states: States of all tokens, shape (rows, hidden).
            first: States of the pairs' first tokens, shape (n, hidden).
            layout: The pack's layout.
        """
        ...

    def after_attention(self, states: Tensor, attended: Tensor, layout: Layout) -> Tensor:
        """Return the layer's output for its input and the attended values, all (rows, hidden)."""
        ...


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """A layer made of linear layers.

    Attributes:
        projections: One for query, key and value together. In the last layer one for the query, and
            one for key and value, since only the pairs' first tokens have queries there.
        attention_output: The output projection of attention.
        attention_norm: The norm after the first residual sum.
        feed_forward: The feed-forward block, including its residual sum.
        output_norm: The norm after the second residual sum.
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
        """Return the output for input states and attended values, both (rows, hidden)."""
        del layout
        states = self.attention_norm(self.attention_output(attended, states))
        return self.output_norm(self.feed_forward(states))


class LayerSource(NamedTuple):
    """What a layer is made from.

    Attributes:
        tensors: Its weights and biases.
        last: Whether it is the last layer, where all but key and value are computed for the pairs'
            first tokens only, which are outliers.
        sample: The states of a sample within it; `None` unless the kit is of 8-bit layers.
    """

    tensors: LayerTensors
    last: bool
    sample: LayerSample | None = None


def linear_layer(
    source: LayerSource, activation: Activation, make: Callable[..., Linear]
) -> LinearLayer:
    """Return a layer made of one kind of linear layers.

    Args:
        source: Its tensors.
        activation: The activation of its feed-forward block.
        make: Makes a linear layer from weight, bias and, optionally, activation.
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
