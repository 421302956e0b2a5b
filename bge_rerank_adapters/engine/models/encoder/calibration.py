"""What runs through an encoder's layers when a sample does, which tells 8-bit layers their ranges.

The sample is run through the layers as they are stored, one after another, before each is made.
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


class SampleRun:
    """A sample on its way through an encoder's layers."""

    def __init__(self, config: EncoderConfig, states: Tensor, lengths: Sequence[int]) -> None:
        """Begin with the embeddings.

        Args:
            config: Of the model.
            states: The embeddings of all tokens, shape (rows, hidden).
            lengths: Number of tokens of each pair.
        """
        self._activation = ACTIVATIONS[config.activation]
        self._heads = config.heads
        self._states = states
        self._layout = Layout(lengths, states.device)

    def through(self, tensors: LayerTensors) -> LayerSample:
        """Return what runs through the next layer, which is made of these tensors."""
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
    """Return questions and passages of several kinds and languages."""
    samples = json.loads(_SAMPLE_PAIRS.read_text(encoding="utf-8"))
    return [(each["query"], each["document"]) for each in samples]
