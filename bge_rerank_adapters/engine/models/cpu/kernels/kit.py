"""Bases of the kits of this package's own kernels."""

from collections.abc import Sequence
from typing import ClassVar, cast

import torch

from bge_rerank_adapters.engine.models.cpu.kernels.int8 import kernel_int8_layer
from bge_rerank_adapters.engine.models.cpu.kernels.layers import KernelLayer, attention_by, suits
from bge_rerank_adapters.engine.models.cpu.kernels.library import InstructionSet, lack
from bge_rerank_adapters.engine.models.cpu.kernels.stack import Stack
from bge_rerank_adapters.engine.models.cpu.streams import SmallPack, one_thread_stream_count
from bge_rerank_adapters.engine.models.encoder.layer import EncoderLayer, LayerSource
from bge_rerank_adapters.engine.models.encoder.plain import KitRequest, PlainKit
from bge_rerank_adapters.engine.models.layers.attention import Attention

# Rows up to which `stack` is faster than threads that share rows. Measured for two threads. The
# states of more rows leave the second-level cache.
_MOST_ROWS = 512


class KernelKit(PlainKit):
    """Layers of kernels for one instruction set; the states between them are in bfloat16.

    Attributes:
        instruction_set: The instruction set of the kernels.
        even_rows: Rows for each thread, up to which `stack` is faster than threads that take pairs
            of their own: about as many as take as long to multiply as the weights to read.
    """

    instruction_set: ClassVar[InstructionSet]
    even_rows: ClassVar[int] = 144

    def __init__(self, request: KitRequest) -> None:
        """Make the kit for a request that `lack` has found nothing missing for."""
        super().__init__(request._replace(dtype=torch.bfloat16))
        # The kernels compute norms in float32.
        self.norm_dtype = torch.float32

    @classmethod
    def lack(cls, request: KitRequest) -> str | None:
        """Return why these layers cannot run such a model here, or `None` if they can."""
        if request.device.type != "cpu":
            return "they run on CPUs only"
        if not suits(request.config, int8=cls.int8):
            return "they are for the exact GELU, and for sizes that fill tiles"
        return lack(cls.instruction_set)

    def attention(self) -> Attention:
        """Return the attention kernel for these layers."""
        return attention_by(self.attention_set())

    def attention_set(self) -> InstructionSet:
        """Return the instruction set of the attention kernel."""
        return self.instruction_set

    def stack(self, layers: Sequence[EncoderLayer]) -> Stack:
        """Return all layers for packs of up to `small_pack` tokens."""
        return Stack(
            # They come from this kit.
            cast("Sequence[KernelLayer]", layers),
            self.config,
            instruction_set=self.instruction_set,
            attention=self.attention_set(),
            prefix="int8_" if self.int8 else "",
        )

    def small_pack(self, threads: int) -> SmallPack:
        """Return up to how many tokens so many threads run a pack by `stack`."""
        return SmallPack(even=min(self.even_rows * threads, _MOST_ROWS), uneven=_MOST_ROWS)

    def pack_rows(self, tokens: int) -> int:
        """Return the number of tokens itself: the kernels need no padding."""
        return tokens

    def stream_count(self) -> int:
        """Return one stream for each thread."""
        return one_thread_stream_count()


class KernelInt8Kit(KernelKit):
    """Layers in 8 bits; each row of states has its own range."""

    int8 = True

    def layer(self, source: LayerSource) -> KernelLayer:
        """Return a layer."""
        return kernel_int8_layer(source, self.instruction_set, heads=self.config.heads)
