"""An encoder's layers on a processor with AMX, by this package's own kernels.

oneDNN leaves two thirds of such a processor's matrix units unused with the sizes that a reranker
has (benchmarks/NOTES.md); `kernels/tiles.h` says how they are kept busier. Where the library was
not built, or the CPU or the sizes are of other kinds, another of `encoder.kit.KITS` is chosen.
"""

import ctypes

from torch import Tensor

from bge_rerank_adapters.engine.models.cpu.kernels.layers import (
    KernelLayer,
    NormVectors,
    by_rows,
    by_slices,
    norm_vectors,
    packed,
)
from bge_rerank_adapters.engine.models.cpu.kernels.library import AMX, kernel
from bge_rerank_adapters.engine.models.cpu.threads import ALONE, Helpers
from bge_rerank_adapters.engine.models.encoder.layer import LayerSource
from bge_rerank_adapters.engine.models.encoder.tensors import LinearTensors, stacked
from bge_rerank_adapters.engine.models.layers.norm import LayerNorm


class _Layer(ctypes.Structure):
    _fields_ = (
        ("hidden", ctypes.c_int64),
        ("intermediate", ctypes.c_int64),
        ("output", ctypes.c_void_p),
        ("up", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
        ("output_bias", ctypes.c_void_p),
        ("up_bias", ctypes.c_void_p),
        ("down_bias", ctypes.c_void_p),
        ("attention_norm", NormVectors),
        ("output_norm", NormVectors),
        ("epsilon", ctypes.c_float),
    )


def amx_layer(source: LayerSource, *, heads: int) -> KernelLayer:
    """Return a layer in bfloat16.

    Args:
        source: What it is made from, tensors in bfloat16.
        heads: Number of attention heads.
    """
    tensors = source.tensors
    query, key_value = tensors.projections
    width = len(query[0]) // heads
    projections = tensors.projections if source.last else (stacked(query, key_value),)
    return KernelLayer(
        projections=tuple(AmxLinear(*each, slice_width=width) for each in projections),
        after=AmxAfterAttention(
            (tensors.attention_output, tensors.up, tensors.down),
            (tensors.attention_norm, tensors.output_norm),
        ),
    )


class AmxLinear:
    """A linear layer in bfloat16 whose outputs lie slice by slice."""

    def __init__(self, weight: Tensor, bias: Tensor, *, slice_width: int) -> None:
        """Lay out the weight, shape (outputs, inputs); the original is not kept.

        Args:
            weight: In bfloat16.
            bias: Shape (outputs,).
            slice_width: How many outputs lie together, a divisor of their number.
        """
        self._outputs, self._inputs = weight.shape
        self._weight, self._bias = packed(weight, AMX), bias.float()
        self._slice = slice_width

    def __call__(self, states: Tensor, helpers: Helpers = ALONE) -> Tensor:
        """Return the outputs for states of shape (rows, inputs), contiguous.

        Shape (outputs / slice width, rows, slice width).
        """

        def make(begin: int, end: int, out: Tensor) -> int:
            status: int = kernel(AMX, "linear")(
                *(states.data_ptr(), len(states), begin, end, self._inputs, self._outputs),
                *(self._weight.data_ptr(), self._bias.data_ptr(), out.data_ptr(), self._slice),
            )
            return status

        return by_slices(states, self._outputs, self._slice, make, helpers)


class AmxAfterAttention:
    """What comes after attention in a layer: its output, the feed-forward block and both norms."""

    def __init__(
        self,
        linears: tuple[LinearTensors, LinearTensors, LinearTensors],
        norms: tuple[LayerNorm, LayerNorm],
    ) -> None:
        """Lay out the weights; the originals are not kept.

        Args:
            linears: Attention's output, and the feed-forward block's two, weights in bfloat16.
            norms: After attention, and after the block.
        """
        weights = [packed(weight, AMX) for weight, _ in linears]
        biases = [bias.float() for _, bias in linears]
        # The kernel has addresses alone.
        self._kept = weights, biases
        self._vectors, structures = norm_vectors(norms)
        intermediate, hidden = linears[1][0].shape
        self._layer = _Layer(
            *(hidden, intermediate),
            *(each.data_ptr() for each in (*weights, *biases)),
            *(*structures, norms[0].epsilon),
        )

    def __call__(self, states: Tensor, attended: Tensor, helpers: Helpers = ALONE) -> Tensor:
        """Return the layer's output for states and what their attention gave.

        All have shape (rows, hidden) and are contiguous.
        """
        return by_rows(kernel(AMX, "after_attention"), self._layer, states, attended, helpers)
