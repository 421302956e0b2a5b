"""The kit of this package's own kernels for AVX512-VNNI.

It is for 8 bits only: in bfloat16 and float32 oneDNN is about as fast on such CPUs.
"""

from bge_rerank_adapters.engine.models.cpu.kernels.kit import KernelInt8Kit
from bge_rerank_adapters.engine.models.cpu.kernels.library import (
    AVX512_BF16,
    AVX512_VNNI,
    InstructionSet,
    lack,
)


class Avx512VnniInt8Kit(KernelInt8Kit):
    """Own kernels in 8 bits, for CPUs with AVX512-VNNI.

    Attention is in float32, or in bfloat16 where the CPU has AVX512-BF16.
    """

    label = "Own kernels for AVX512-VNNI in int8"
    instruction_set = AVX512_VNNI
    even_rows = 64

    def attention_set(self) -> InstructionSet:
        """Return the instruction set of the attention kernel."""
        return AVX512_VNNI if lack(AVX512_BF16) else AVX512_BF16
