"""Runs a sample through an encoder, so that 8-bit layers can calibrate their ranges.

It runs through the layers as they are stored, one at a time, before each is quantised.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

from bge_rerank_adapters.engine.models.encoder.config import EncoderConfig
from bge_rerank_adapters.engine.models.encoder.tensors import LayerTensors, LinearTensors, stacked
from bge_rerank_adapters.engine.models.layers.activations import ACTIVATIONS
from bge_rerank_adapters.engine.models.layers.attention import Layout, grouped_attention

_SAMPLE_PAIRS = Path(__file__).parent / "sample-pairs.json"


class LayerSample(NamedTuple):
    """The states of a sample within one layer, each of shape (rows, width).

    Attributes:
        states: Input of the layer.
        attended: Output of attention.
        middle: Input of the feed-forward block.
        inner: Output of its activation.
        output: Output of the layer.
    """

    states: Tensor
    attended: Tensor
    middle: Tensor
    inner: Tensor
    output: Tensor


class SampleRun:
    """A sample that is run through an encoder layer by layer."""

    def __init__(self, config: EncoderConfig, states: Tensor, lengths: Sequence[int]) -> None:
        """Begin with the embeddings.

        Args:
            config: The model's config.
            states: The embeddings of all tokens, shape (rows, hidden).
            lengths: Number of tokens of each pair.
        """
        self._activation = ACTIVATIONS[config.activation]
        self._heads = config.heads
        self._states = states
        self._layout = Layout(lengths, states.device)

    def through(self, tensors: LayerTensors) -> LayerSample:
        """Run the sample through the next layer, given its tensors, and return its states."""
        states = self._states
        query, key, value = _outputs(states, stacked(*tensors.projections)).chunk(3, dim=-1)
        attended = grouped_attention(query, key, value, self._layout, self._heads)
        middle = tensors.attention_norm(_outputs(attended, tensors.attention_output).add_(states))
        inner = self._activation(_outputs(middle, tensors.up))
        output = tensors.output_norm(_outputs(inner, tensors.down).add_(middle))
        self._states = output
        return LayerSample(states, attended, middle, inner, output)


def _outputs(states: Tensor, tensors: LinearTensors) -> Tensor:
    weight, bias = (each.to(states.dtype) for each in tensors)
    return functional.linear(states, weight, bias)


def sample_pairs() -> list[tuple[str, str]]:
    """Return queries and documents of several kinds and languages."""
    samples = json.loads(_SAMPLE_PAIRS.read_text(encoding="utf-8"))
    return [(each["query"], each["document"]) for each in samples]
