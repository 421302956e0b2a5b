"""Reads and checks the tensors of an encoder."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bge_rerank_adapters.engine.models.encoder.config import EncoderConfig
from bge_rerank_adapters.engine.models.layers.linear import PlainLinear
from bge_rerank_adapters.engine.models.layers.norm import LayerNorm
from bge_rerank_adapters.engine.models.weights import Weights
from bge_rerank_adapters.errors import UnsupportedCheckpointError

# Weight, shape (outputs, inputs), and bias, shape (outputs,).
LinearTensors = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """The tensors of a layer, named as in `encoder.layer.LinearLayer`.

    The projections are one for the query, and one for key and value.
    """

    projections: tuple[LinearTensors, LinearTensors]
    attention_output: LinearTensors
    attention_norm: LayerNorm
    up: LinearTensors
    down: LinearTensors
    output_norm: LayerNorm


def stacked(*tensors: LinearTensors) -> LinearTensors:
    """Return linear layers with the same inputs as one layer with all their outputs."""
    return torch.cat([weight for weight, _ in tensors]), torch.cat([bias for _, bias in tensors])


@dataclass(frozen=True, slots=True)
class EncoderReader:
    """Reads the parts of an encoder from its checkpoint."""

    weights: Weights
    config: EncoderConfig
    device: torch.device
    dtype: torch.dtype

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor on the device, in the reader's dtype unless another is given.

        Raises:
            CheckpointError: It is missing, or of another shape.
        """
        stored = self.weights.tensor(name, shape)
        # Always copied: a view of the file would become invalid when it is closed.
        return stored.to(self.device, dtype or self.dtype, copy=True)

    def norm(self, name: str, dtype: torch.dtype | None = None) -> LayerNorm:
        """Return the layer norm of this name, in the reader's dtype unless another is given."""
        shape = (self.config.hidden,)
        return LayerNorm(
            self.tensor(f"{name}.weight", shape, dtype),
            self.tensor(f"{name}.bias", shape, dtype),
            self.config.epsilon,
        )

    def layer_tensors(
        self, index: int, dtype: torch.dtype, *, norm_dtype: torch.dtype
    ) -> LayerTensors:
        """Return the tensors of a layer.

        Args:
            index: The layer's index, counted from 0.
            dtype: The dtype of weights and biases.
            norm_dtype: The dtype of norms.
        """
        name = f"{self.config.prefix}.encoder.layer.{index}"
        hidden, wide = self.config.hidden, self.config.intermediate

        def linear(part: str, outputs: int = hidden, inputs: int = hidden) -> LinearTensors:
            return self._linear(f"{name}.{part}", outputs, inputs, dtype)

        query, key, value = (linear(f"attention.self.{part}") for part in ("query", "key", "value"))
        return LayerTensors(
            projections=(query, stacked(key, value)),
            attention_output=linear("attention.output.dense"),
            attention_norm=self.norm(f"{name}.attention.output.LayerNorm", norm_dtype),
            up=linear("intermediate.dense", wide, hidden),
            down=linear("output.dense", hidden, wide),
            output_norm=self.norm(f"{name}.output.LayerNorm", norm_dtype),
        )

    def head(self) -> Callable[[Tensor], Tensor]:
        """Return the classification head, from the first token's states to (pairs, 1)."""
        hidden = self.config.hidden
        roberta = self.config.counts_from_pad
        dense_name = "classifier.dense" if roberta else f"{self.config.prefix}.pooler.dense"
        out_name = "classifier.out_proj" if roberta else "classifier"
        dense = PlainLinear(*self._linear(dense_name, hidden, hidden, torch.float32), torch.tanh)
        out = PlainLinear(*self._linear(out_name, 1, hidden, torch.float32))
        return lambda states: out(dense(states))

    def is_last(self, index: int) -> bool:
        """Return whether a layer is the last one."""
        return index == self.config.layers - 1

    def _linear(self, name: str, outputs: int, inputs: int, dtype: torch.dtype) -> LinearTensors:
        return (
            self.tensor(f"{name}.weight", (outputs, inputs), dtype),
            self.tensor(f"{name}.bias", (outputs,), dtype),
        )


def check_tensors(weights: Weights, config: EncoderConfig) -> None:
    """Check that config and weights fit, and that they are a reranker's.

    Raises:
        CheckpointError: They do not fit, or there is no head.
        UnsupportedCheckpointError: The head gives several logits.
    """
    check_one_label(weights, config)
    beyond = f"{config.prefix}.encoder.layer.{config.layers}.output.dense.weight"
    weights.check_absent(beyond, layers=config.layers)
    # These sizes decide which kit is chosen, before the layers are read.
    name = f"{config.prefix}.encoder.layer.0.intermediate.dense.weight"
    weights.tensor(name, (config.intermediate, config.hidden))


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
