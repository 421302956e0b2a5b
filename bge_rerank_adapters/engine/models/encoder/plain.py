"""The kit that runs everywhere, and the base of those for other back ends."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from bge_rerank_adapters.engine.models.cpu.streams import NO_SMALL_PACK, SmallPack, stream_count
from bge_rerank_adapters.engine.models.encoder.config import EncoderConfig
from bge_rerank_adapters.engine.models.encoder.layer import EncoderLayer, LayerSource, linear_layer
from bge_rerank_adapters.engine.models.layers.activations import ACTIVATIONS
from bge_rerank_adapters.engine.models.layers.attention import (
    Attention,
    Layout,
    attention_for,
    grouped_attention,
)
from bge_rerank_adapters.engine.models.layers.attention_check import (
    PROBE_LENGTHS,
    Trial,
    first_correct,
)
from bge_rerank_adapters.engine.models.layers.linear import PlainLinear, few_sizes


class KitRequest(NamedTuple):
    """What a kit is chosen by.

    Attributes:
        config: The model's config.
        device: The model's device.
        dtype: The dtype of its activations.
    """

    config: EncoderConfig
    device: torch.device
    dtype: torch.dtype


# Maps the first layer's input, which it may overwrite, to the last one's output for first tokens.
Stack = Callable[[Tensor, Layout], Tensor]


class PlainKit:
    """PyTorch's own layers, for every device and floating-point dtype.

    A kit has everything in a model that depends on device and dtype. A kit for another back end
    derives from this class, overrides what differs, and is listed in `encoder.kit.KITS`.

    Attributes:
        label: The name that users see.
        int8: Whether layers are in 8 bits; such layers are calibrated by a sample.
        config: The model's config.
        device: The model's device.
        dtype: The dtype of activations.
        activation: The activation of feed-forward blocks.
        layer_dtype: The dtype of the layers: int8, or that of activations.
        tensor_dtype: The dtype in which the tensors of linear layers are read.
        norm_dtype: The dtype in which the tensors of norms are read.
    """

    label: ClassVar[str] = "PyTorch's layers"
    int8: ClassVar[bool] = False

    def __init__(self, request: KitRequest) -> None:
        """Make the kit for a request that `lack` has found nothing missing for."""
        self.config, self.device, self.dtype = request
        self.activation = ACTIVATIONS[self.config.activation]
        self.layer_dtype = torch.int8 if self.int8 else self.dtype
        # int8 is quantised from the stored values, not from values rounded to bfloat16.
        self.tensor_dtype = torch.float32 if self.int8 else self.dtype
        self.norm_dtype = self.dtype

    @classmethod
    def lack(cls, request: KitRequest) -> str | None:
        """Return why these layers cannot run such a model here, or `None` if they can."""
        del request
        return None

    def layer(self, source: LayerSource) -> EncoderLayer:
        """Return a layer, given its tensors in `tensor_dtype`."""
        return linear_layer(source, self.activation, PlainLinear)

    def attention(self) -> Attention:
        """Return the attention function for these layers' query, key and value."""
        heads = self.config.heads
        width = self.config.hidden // heads
        candidates = (
            attention_for(self.device, self.dtype, heads=heads, width=width),
            partial(grouped_attention, copied=True),
        )
        layout = Layout(PROBE_LENGTHS, self.device)
        index = first_correct(
            [
                lambda *states, attend=attend: attend(*states, layout, heads)
                for attend in candidates
            ],
            Trial(heads, heads, width, width**-0.5),
            single_rows=layout.first,
            device=self.device,
            dtype=self.dtype,
        )
        return candidates[index]

    def stack(self, layers: Sequence[EncoderLayer]) -> Stack | None:
        """Return all layers in one, for small packs that several threads run; `None` if none."""
        del layers
        return None

    def small_pack(self, threads: int) -> SmallPack:
        """Return up to how many tokens so many threads run a pack by `stack`."""
        del threads
        return NO_SMALL_PACK

    def pack_rows(self, tokens: int) -> int:
        """Return the number of tokens that a pack is padded to."""
        return few_sizes(tokens) if self.device.type == "cpu" else tokens

    def stream_count(self) -> int:
        """Return the number of streams that share a pack."""
        return stream_count(self.device, self.layer_dtype)


def check_plain_attention(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a device on which torch's attention gives wrong values in other libraries' models.

    Raises:
        DeviceError: The values are wrong.
    """
    heads, width = 4, 32
    layout = Layout(PROBE_LENGTHS, device)
    first_correct(
        [lambda query, key, value: grouped_attention(query, key, value, layout, heads)],
        Trial(heads, heads, width, width**-0.5),
        single_rows=layout.first,
        device=device,
        dtype=dtype,
    )
