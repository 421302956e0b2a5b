"""An encoder's layers and head, read from its tensors as the kinds of layers that run here."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bge_rerank_adapters.engine.models.encoder.config import EncoderConfig
from bge_rerank_adapters.engine.models.layers.activations import ACTIVATIONS
from bge_rerank_adapters.engine.models.layers.linear import (
    FeedForward,
    Linear,
    PlainLinear,
    linear_maker,
)
from bge_rerank_adapters.engine.models.weights import Weights
from bge_rerank_adapters.errors import CheckpointError, UnsupportedCheckpointError


@dataclass(frozen=True, slots=True)
class Norm:
    """A layer norm over the width of a token's vector."""

    weight: Tensor
    bias: Tensor
    epsilon: float

    def __call__(self, states: Tensor) -> Tensor:
        """Return the normed states, of shape (rows, hidden) as given."""
        return functional.layer_norm(
            states, self.weight.shape, self.weight, self.bias, self.epsilon
        )


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer.

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
    attention_norm: Norm
    feed_forward: Callable[[Tensor], Tensor]
    output_norm: Norm

    def project(self, states: Tensor) -> tuple[Tensor, ...]:
        """Return query, key and value for states, all of shape (rows, hidden)."""
        return self.projections[0](states).chunk(3, dim=-1)

    def project_last(self, states: Tensor, first: Tensor) -> tuple[Tensor, ...]:
        """Return the query for the pairs' first tokens, and key and value for all."""
        return self.projections[0](first), *self.projections[1](states).chunk(2, dim=-1)

    def after_attention(self, states: Tensor, attended: Tensor) -> Tensor:
        """Return the output for states and what their attention gave, both (rows, hidden)."""
        states = self.attention_norm(self.attention_output(attended, states))
        return self.output_norm(self.feed_forward(states))


# Weight, shape (outputs, inputs), and bias, shape (outputs,).
Parts = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class LayerParts:
    """What a layer is made of, by the names in `Layer`.

    Projections are one for the query, and one for key and value.
    """

    projections: tuple[Parts, Parts]
    attention_output: Parts
    attention_norm: Norm
    up: Parts
    down: Parts
    output_norm: Norm


def stacked(*parts: Parts) -> Parts:
    """Return layers that read the same states as one that gives their outputs side by side."""
    return torch.cat([weight for weight, _ in parts]), torch.cat([bias for _, bias in parts])


@dataclass(frozen=True, slots=True)
class EncoderReader:
    """Reads the parts of an encoder from its tensors."""

    weights: Weights
    config: EncoderConfig
    device: torch.device
    dtype: torch.dtype

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor on the device, in the dtype that is computed in unless told another.

        Raises:
            CheckpointError: It is missing, or of another shape.
        """
        stored = self.weights.tensor(name, shape)
        # Copied even where nothing changes: a view of the file would die with it.
        return stored.to(self.device, dtype or self.dtype, copy=True)

    def norm(self, name: str) -> Norm:
        """Return the layer norm of this name."""
        shape = (self.config.hidden,)
        return Norm(
            self.tensor(f"{name}.weight", shape),
            self.tensor(f"{name}.bias", shape),
            self.config.epsilon,
        )

    def layer(self, index: int) -> Layer:
        """Return the layer at a position counted from 0."""
        make = linear_maker(self.device, self.dtype)
        parts, activation = self.layer_parts(index, self.dtype), ACTIVATIONS[self.config.activation]
        stacks = parts.projections if self.is_last(index) else (stacked(*parts.projections),)
        return Layer(
            projections=tuple(make(*stack) for stack in stacks),
            attention_output=make(*parts.attention_output),
            attention_norm=parts.attention_norm,
            feed_forward=FeedForward(make(*parts.up, activation), make(*parts.down)),
            output_norm=parts.output_norm,
        )

    def layer_parts(self, index: int, dtype: torch.dtype) -> LayerParts:
        """Return the tensors of the layer at a position counted from 0.

        Args:
            index: The position.
            dtype: Of weights and biases.
        """
        name = f"{self.config.prefix}.encoder.layer.{index}"
        hidden, wide = self.config.hidden, self.config.intermediate

        def parts(part: str, outputs: int = hidden, inputs: int = hidden) -> Parts:
            return self._parts(f"{name}.{part}", outputs, inputs, dtype)

        query, key, value = (parts(f"attention.self.{part}") for part in ("query", "key", "value"))
        return LayerParts(
            projections=(query, stacked(key, value)),
            attention_output=parts("attention.output.dense"),
            attention_norm=self.norm(f"{name}.attention.output.LayerNorm"),
            up=parts("intermediate.dense", wide, hidden),
            down=parts("output.dense", hidden, wide),
            output_norm=self.norm(f"{name}.output.LayerNorm"),
        )

    def head(self) -> Callable[[Tensor], Tensor]:
        """Return the classification head, from the first token's states to (pairs, 1)."""
        hidden = self.config.hidden
        roberta = self.config.counts_from_pad
        dense_name = "classifier.dense" if roberta else f"{self.config.prefix}.pooler.dense"
        out_name = "classifier.out_proj" if roberta else "classifier"
        dense = PlainLinear(*self._parts(dense_name, hidden, hidden, torch.float32), torch.tanh)
        out = PlainLinear(*self._parts(out_name, 1, hidden, torch.float32))
        return lambda states: out(dense(states))

    def is_last(self, index: int) -> bool:
        """Return whether no layer comes after this one."""
        return index == self.config.layers - 1

    def _parts(self, name: str, outputs: int, inputs: int, dtype: torch.dtype) -> Parts:
        return (
            self.tensor(f"{name}.weight", (outputs, inputs), dtype),
            self.tensor(f"{name}.bias", (outputs,), dtype),
        )


def check_one_label(weights: Weights, config: EncoderConfig) -> None:
    """Check that the head gives one logit.

    Raises:
        CheckpointError: There is no head.
        UnsupportedCheckpointError: It gives several.
    """
    name = "classifier.out_proj.weight" if config.counts_from_pad else "classifier.weight"
    shape = weights.shape(name)
    if len(shape) == 2 and shape[0] > 1:
        raise UnsupportedCheckpointError(
            f"{weights.folder} is a classifier of {shape[0]} labels; a reranker has one, whose "
            "logit says how relevant a document is."
        )


def check_last_layer(weights: Weights, config: EncoderConfig) -> None:
    """Refuse to leave layers out: the model would run, and give other numbers."""
    beyond = f"{config.prefix}.encoder.layer.{config.layers}.output.dense.weight"
    if beyond in weights:
        raise CheckpointError(
            f"{weights.path} has the tensor {beyond}, but num_hidden_layers in config.json is "
            f"{config.layers}; config and weights are not of one checkpoint."
        )


def check_feed_forward(weights: Weights, config: EncoderConfig) -> None:
    """Check the sizes of feed-forward blocks, which are timed before they are read.

    Raises:
        CheckpointError: The first layer's is of others than the config says.
    """
    name = f"{config.prefix}.encoder.layer.0.intermediate.dense.weight"
    weights.tensor(name, (config.intermediate, config.hidden))
