"""Kits of this package's own kernels for AMX, in bfloat16 and in 8 bits."""

import torch

from bge_rerank_adapters.engine.models.cpu.amx.bfloat16 import amx_layer
from bge_rerank_adapters.engine.models.cpu.kernels.kit import KernelInt8Kit, KernelKit
from bge_rerank_adapters.engine.models.cpu.kernels.layers import KernelLayer
from bge_rerank_adapters.engine.models.cpu.kernels.library import AMX
from bge_rerank_adapters.engine.models.encoder.layer import LayerSource
from bge_rerank_adapters.engine.models.encoder.plain import KitRequest


class AmxKit(KernelKit):
    """Own kernels in bfloat16, for CPUs with AMX."""

    label = "Own kernels for AMX"
    instruction_set = AMX

    @classmethod
    def lack(cls, request: KitRequest) -> str | None:
        """Return why these layers cannot run such a model here, or `None` if they can."""
        if request.dtype != torch.bfloat16:
            return "they are for bfloat16"
        return super().lack(request)

    def layer(self, source: LayerSource) -> KernelLayer:
        """Return a layer."""
        return amx_layer(source, heads=self.config.heads)


class AmxInt8Kit(KernelInt8Kit):
    """Own kernels in 8 bits, for CPUs with AMX."""

    label = "Own kernels for AMX in int8"
    instruction_set = AMX
