"""An encoder's layers and head, read from its tensors as the kinds of layers that run here."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bge_rerank_adapters.errors import CheckpointError, UnsupportedCheckpointError
from bge_rerank_adapters.models.activations import ACTIVATIONS
from bge_rerank_adapters.models.encoder_config import EncoderConfig
from bge_rerank_adapters.models.linear import (
    Activation,
    Int8Linear,
    Linear,
    PlainLinear,
    linear_maker,
    smoothing,
)
from bge_rerank_adapters.models.weights import Weights


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
        up: To the feed-forward block's width, its activation included.
        down: Back to width h.
        output_norm: After the second residual sum.
    """

    projections: tuple[Linear, ...]
    attention_output: Linear
    attention_norm: Norm
    up: Linear
    down: Linear
    output_norm: Norm

    def rest(self, states: Tensor, attended: Tensor) -> Tensor:
        """Return the output for states and what their attention gave, both (rows, hidden)."""
        states = self.attention_norm(self.attention_output(attended, states))
        return self.output_norm(self.down(self.up(states), states))


@dataclass(frozen=True, slots=True)
class EncoderReader:
    """Reads the parts of an encoder from its tensors."""

    weights: Weights
    config: EncoderConfig
    device: torch.device
    dtype: torch.dtype
    int8: bool

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
        name = f"{self.config.prefix}.encoder.layer.{index}"
        before = (
            f"{self.config.prefix}.encoder.layer.{index - 1}.output.LayerNorm"
            if index
            else f"{self.config.prefix}.embeddings.LayerNorm"
        )
        attention_norm = self.norm(f"{name}.attention.output.LayerNorm")
        activation = ACTIVATIONS[self.config.activation]
        hidden, wide = self.config.hidden, self.config.intermediate
        return Layer(
            projections=self._projections(name, self.norm(before), last=self._is_last(index)),
            attention_output=self._linear(f"{name}.attention.output.dense", hidden, hidden),
            attention_norm=attention_norm,
            up=self._linear(
                f"{name}.intermediate.dense", wide, hidden, activation, after=attention_norm
            ),
            down=self._linear(f"{name}.output.dense", hidden, wide),
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

    def _is_last(self, index: int) -> bool:
        return index == self.config.layers - 1

    def _projections(self, name: str, before: Norm, *, last: bool) -> tuple[Linear, ...]:
        hidden = self.config.hidden
        query, key, value = (
            self._parts(f"{name}.attention.self.{part}", hidden, hidden)
            for part in ("query", "key", "value")
        )
        stacks = ((query,), (key, value)) if last else ((query, key, value),)
        return tuple(
            self._make(
                torch.cat([weight for weight, _ in stack]),
                torch.cat([bias for _, bias in stack]),
                after=before,
            )
            for stack in stacks
        )

    def _linear(
        self,
        name: str,
        outputs: int,
        inputs: int,
        activation: Activation | None = None,
        *,
        after: Norm | None = None,
    ) -> Linear:
        return self._make(*self._parts(name, outputs, inputs), activation, after=after)

    def _make(
        self,
        weight: Tensor,
        bias: Tensor,
        activation: Activation | None = None,
        *,
        after: Norm | None = None,
    ) -> Linear:
        """Return a layer of the kind that this model runs on.

        Args:
            weight: Shape (outputs, inputs).
            bias: Shape (outputs,).
            activation: Applied to the outputs.
            after: The norm whose output it reads, if it does.
        """
        if not self.int8:
            return linear_maker(self.device, self.dtype)(weight, bias, activation)
        smooth = None if after is None else smoothing(after.weight, after.bias, weight)
        return Int8Linear(weight, bias, activation, smooth=smooth)

    def _parts(
        self, name: str, outputs: int, inputs: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        # Quantised from what is stored, not from what bfloat16 leaves of it.
        exact = torch.float32 if self.int8 else None
        return (
            self.tensor(f"{name}.weight", (outputs, inputs), dtype or exact),
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
