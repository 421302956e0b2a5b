"""The kit of layers that runs everywhere, from which those of back ends derive."""

from functools import partial
from typing import ClassVar, NamedTuple

import torch

from bge_rerank_adapters.engine.models.cpu.streams import stream_count
from bge_rerank_adapters.engine.models.encoder.config import EncoderConfig
from bge_rerank_adapters.engine.models.encoder.layer import EncoderLayer, LayerSource, linear_layer
from bge_rerank_adapters.engine.models.layers.activations import ACTIVATIONS
from bge_rerank_adapters.engine.models.layers.attention import (
    PROBE_LENGTHS,
    Attention,
    Layout,
    attention_for,
    grouped_attention,
)
from bge_rerank_adapters.engine.models.layers.attention_check import Trial, first_right
from bge_rerank_adapters.engine.models.layers.linear import PlainLinear, few_sizes


class KitRequest(NamedTuple):
    """What layers are asked for.

    Attributes:
        config: Of the model.
        device: Where it is to run.
        dtype: Of its activations.
    """

    config: EncoderConfig
    device: torch.device
    dtype: torch.dtype


class PlainKit:
    """PyTorch's own layers, for every device and floating-point dtype.

    A kit is all that a model runs with that depends on device and dtype. One for another back end
    derives from this class, overrides what differs there, and stands in `encoder.kit.KITS`.

    Attributes:
        label: What the layers are called where the user reads it.
        int8: Whether they are in 8 bits; such layers are given a sample of what runs through them.
        config: Of the model.
        device: Where it runs.
        dtype: Of activations.
        activation: Of feed-forward blocks.
        layer_dtype: Of the layers: int8, or that of activations.
        tensor_dtype: In which the tensors of the layers' products are read.
        norm_dtype: In which those of their norms are.
    """

    label: ClassVar[str] = "PyTorch's layers"
    int8: ClassVar[bool] = False

    def __init__(self, request: KitRequest) -> None:
        """Take what `lack` has found nothing missing for."""
        self.config, self.device, self.dtype = request
        self.activation = ACTIVATIONS[self.config.activation]
        self.layer_dtype = torch.int8 if self.int8 else self.dtype
        # Quantised from what is stored, not from what bfloat16 leaves of it.
        self.tensor_dtype = torch.float32 if self.int8 else self.dtype
        self.norm_dtype = self.dtype

    @classmethod
    def lack(cls, request: KitRequest) -> str | None:
        """Return why these layers do not suit such a model here, or `None` if they do."""
        del request
        return None

    def layer(self, source: LayerSource) -> EncoderLayer:
        """Return a layer made of tensors in `tensor_dtype`."""
        return linear_layer(source, self.activation, PlainLinear)

    def attention(self) -> Attention:
        """Return what attends to the query, key and value that these layers give."""
        heads = self.config.heads
        width = self.config.hidden // heads
        ways = (
            attention_for(self.device, self.dtype, heads=heads, width=width),
            partial(grouped_attention, copied=True),
        )
        layout = Layout(PROBE_LENGTHS, self.device)
        place = first_right(
            [lambda *states, way=way: way(*states, layout, heads) for way in ways],
            Trial(heads, heads, width, width**-0.5),
            asked=layout.first,
            device=self.device,
            dtype=self.dtype,
        )
        return ways[place]

    def pack_rows(self, tokens: int) -> int:
        """Return how many tokens a pack is filled up to."""
        return few_sizes(tokens) if self.device.type == "cpu" else tokens

    def stream_count(self) -> int:
        """Return among how many streams the packs of a model are best shared out."""
        return stream_count(self.device, self.layer_dtype)


def check_plain_attention(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a device on which torch's own attention is wrong as other libraries call it.

    Raises:
        DeviceError: It is.
    """
    heads, width = 4, 32
    layout = Layout(PROBE_LENGTHS, device)
    first_right(
        [lambda query, key, value: grouped_attention(query, key, value, layout, heads)],
        Trial(heads, heads, width, width**-0.5),
        asked=layout.first,
        device=device,
        dtype=dtype,
    )
