"""An encoder's layers in bfloat16 on a CPU with AMX, by this package's own kernels.

At a reranker's sizes oneDNN leaves two thirds of the matrix units' speed unused
(benchmarks/NOTES.md); `kernels/tiles.h` describes how these kernels do better.
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


class _Projection(ctypes.Structure):
    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
    )


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
        source: Its weights, in bfloat16.
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
    """A linear layer in bfloat16 whose outputs are stored slice by slice."""

    def __init__(self, weight: Tensor, bias: Tensor, *, slice_width: int) -> None:
        """Lay out the weight, shape (outputs, inputs); the original is not kept.

        Args:
            weight: In bfloat16.
            bias: Shape (outputs,).
            slice_width: Number of outputs in a slice, a divisor of their total number.
        """
        self._outputs, self._inputs = weight.shape
        self._weight, self._bias = packed(weight, AMX), bias.float()
        self._slice = slice_width
        self.structure = _Projection(self._weight.data_ptr(), self._bias.data_ptr(), self._outputs)

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
    """The part of a layer after attention: output projection, feed-forward block and both norms."""

    def __init__(
        self,
        linears: tuple[LinearTensors, LinearTensors, LinearTensors],
        norms: tuple[LayerNorm, LayerNorm],
    ) -> None:
        """Lay out the weights; the originals are not kept.

        Args:
            linears: The output projection and the two of the feed-forward block, in bfloat16.
            norms: The norms after attention and after the feed-forward block.
        """
        weights = [packed(weight, AMX) for weight, _ in linears]
        biases = [bias.float() for _, bias in linears]
        # The kernel gets only addresses, so these tensors must stay alive.
        self._kept = weights, biases
        self._vectors, structures = norm_vectors(norms)
        intermediate, hidden = linears[1][0].shape
        self.structure = _Layer(
            *(hidden, intermediate),
            *(each.data_ptr() for each in (*weights, *biases)),
            *(*structures, norms[0].epsilon),
        )

    def __call__(self, states: Tensor, attended: Tensor, helpers: Helpers = ALONE) -> Tensor:
        """Return the layer's output for its input states and the attended values.

        All have shape (rows, hidden) and are contiguous.
        """
        return by_rows(kernel(AMX, "after_attention"), self.structure, states, attended, helpers)
