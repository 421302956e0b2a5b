"""An encoder's layers of this package's own kernels for AMX, in bfloat16 and in 8 bits."""

from bge_rerank_adapters.engine.models.cpu.amx.bfloat16 import (
    AmxLayer,
    amx_attention,
    amx_layer,
    amx_runs,
)
from bge_rerank_adapters.engine.models.cpu.amx.int8 import amx_int8_layer
from bge_rerank_adapters.engine.models.cpu.kernels.library import AMX, lack
from bge_rerank_adapters.engine.models.cpu.streams import one_thread_stream_count
from bge_rerank_adapters.engine.models.encoder.layer import LayerSource
from bge_rerank_adapters.engine.models.encoder.plain import KitRequest, PlainKit
from bge_rerank_adapters.engine.models.layers.attention import Attention


class AmxKit(PlainKit):
    """Own kernels in bfloat16, for CPUs with AMX."""

    label = "Own kernels for AMX"

    @classmethod
    def lack(cls, request: KitRequest) -> str | None:
        """Return why these layers do not suit such a model here, or `None` if they do."""
        if amx_runs(*request, int8=cls.int8):
            return None
        return lack(AMX) or (
            "they are for bfloat16 on a CPU, the exact GELU, and sizes that fill tiles"
        )

    def layer(self, source: LayerSource) -> AmxLayer:
        """Return a layer."""
        return amx_layer(source, heads=self.config.heads)

    def attention(self) -> Attention:
        """Return the kernel that attends to what these layers give, head by head."""
        return amx_attention

    def pack_rows(self, tokens: int) -> int:
        """Return the number of tokens itself: one code serves all sizes."""
        return tokens

    def stream_count(self) -> int:
        """Return a stream for each thread."""
        return one_thread_stream_count()


class AmxInt8Kit(AmxKit):
    """Own kernels in 8 bits, for CPUs with AMX; what runs between them is in bfloat16."""

    label = "Own kernels for AMX in int8"
    int8 = True

    @classmethod
    def lack(cls, request: KitRequest) -> str | None:
        """Return why these layers do not suit such a model here, or `None` if they do."""
        return AmxKit.lack(request) or super().lack(request)

    def layer(self, source: LayerSource) -> AmxLayer:
        """Return a layer."""
        return amx_int8_layer(source, heads=self.config.heads)
