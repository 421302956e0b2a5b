"""An encoder's layers in 8 bits, by this package's own kernels for several instruction sets.

The kernels also quantise, dequantise, activate and norm. So each row of states can have its own
range, and none has to be calibrated as for `onednn.int8.Int8Linear`.
"""

import ctypes

import torch
from torch import Tensor

from bge_rerank_adapters.engine.models.cpu.kernels.layers import (
    KernelLayer,
    NormVectors,
    by_rows,
    by_slices,
    norm_vectors,
    packed,
)
from bge_rerank_adapters.engine.models.cpu.kernels.library import InstructionSet, kernel
from bge_rerank_adapters.engine.models.cpu.threads import ALONE, Helpers
from bge_rerank_adapters.engine.models.encoder.layer import LayerSource
from bge_rerank_adapters.engine.models.encoder.tensors import LinearTensors, stacked
from bge_rerank_adapters.engine.models.layers.calibration import smoothing
from bge_rerank_adapters.engine.models.layers.norm import LayerNorm

# How many of a feed-forward block's inner values are computed at a time, with a range for each row.
_CHUNK = 1024


class _Linear(ctypes.Structure):
    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("step", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("factor", ctypes.c_void_p),
    )


class _Projection(ctypes.Structure):
    _fields_ = (("linear", _Linear), ("outputs", ctypes.c_int64))


class _Layer(ctypes.Structure):
    _fields_ = (
        ("hidden", ctypes.c_int64),
        ("intermediate", ctypes.c_int64),
        ("chunk", ctypes.c_int64),
        ("output", _Linear),
        ("up", _Linear),
        ("down", _Linear),
        ("attention_norm", NormVectors),
        ("output_norm", NormVectors),
        ("epsilon", ctypes.c_float),
    )


def kernel_int8_layer(
    source: LayerSource, instruction_set: InstructionSet, *, heads: int
) -> KernelLayer:
    """Return a layer in 8 bits.

    Args:
        source: Its weights, in float32, and a sample, from which outlier channels are found.
        instruction_set: The instruction set of the kernels.
        heads: Number of attention heads.
    """
    tensors, last, sample = source
    if sample is None:
        raise ValueError("Layers in 8 bits need a sample.")
    query, key_value = tensors.projections
    width = len(query[0]) // heads
    states, attended = smoothing(sample.states), smoothing(sample.attended)
    projections = (
        [(query, None), (key_value, states)] if last else [(stacked(query, key_value), states)]
    )
    return KernelLayer(
        projections=tuple(
            KernelInt8Linear(
                *each, instruction_set=instruction_set, divisor=divisor, slice_width=width
            )
            for each, divisor in projections
        ),
        after=KernelInt8AfterAttention(
            instruction_set,
            (tensors.attention_output, tensors.up, tensors.down),
            (None, None) if last else (attended, smoothing(sample.middle)),
            (tensors.attention_norm, tensors.output_norm),
        ),
    )


class _Quantised:
    """A weight quantised with a scale for each output, as the kernels read it."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        *,
        instruction_set: InstructionSet,
        divisor: Tensor | None = None,
        chunk: int | None = None,
    ) -> None:
        """Quantise a weight of shape (outputs, inputs).

        Args:
            weight: In float32.
            bias: Shape (outputs,).
            instruction_set: The instruction set of the kernels.
            divisor: What each input is divided by before it is quantised.
            chunk: How many inputs share a range; `None` is all of them.
        """
        exact = weight if divisor is None else weight * divisor
        step = exact.abs().amax(dim=1).clamp_min_(1e-30) / 127.0
        rounded = (exact / step[:, None]).round_()
        sums = [
            part.sum(dim=1) * step for part in torch.split(rounded, chunk or weight.shape[1], dim=1)
        ]
        self._kept = [
            *(
                packed(rounded.to(torch.int8), instruction_set),
                step,
                torch.stack(sums),
                bias.float(),
            ),
            *([] if divisor is None else [divisor.reciprocal()]),
        ]
        self.structure = _Linear(*(each.data_ptr() for each in self._kept))


class KernelInt8Linear:
    """A linear layer in 8 bits whose outputs are stored slice by slice."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        *,
        instruction_set: InstructionSet,
        divisor: Tensor | None,
        slice_width: int,
    ) -> None:
        """Quantise the weight, shape (outputs, inputs); the original is not kept.

        Args:
            weight: In float32.
            bias: Shape (outputs,).
            instruction_set: The instruction set of the kernels.
            divisor: What each input is divided by before it is quantised.
            slice_width: Number of outputs in a slice, a divisor of their total number.
        """
        self._outputs, self._inputs = weight.shape
        self._weight = _Quantised(weight, bias, instruction_set=instruction_set, divisor=divisor)
        self._instruction_set, self._slice = instruction_set, slice_width
        self.structure = _Projection(self._weight.structure, self._outputs)

    def __call__(self, states: Tensor, helpers: Helpers = ALONE) -> Tensor:
        """Return the outputs for states of shape (rows, inputs), in bfloat16 and contiguous.

        Shape (outputs / slice width, rows, slice width).
        """
        layer = ctypes.addressof(self.structure.linear)

        def make(begin: int, end: int, out: Tensor) -> int:
            status: int = kernel(self._instruction_set, "int8_linear")(
                *(layer, states.data_ptr(), len(states), begin, end, self._inputs, self._outputs),
                *(out.data_ptr(), self._slice),
            )
            return status

        return by_slices(states, self._outputs, self._slice, make, helpers)


class KernelInt8AfterAttention:
    """The part of a layer after attention: output projection, feed-forward block and both norms."""

    def __init__(
        self,
        instruction_set: InstructionSet,
        linears: tuple[LinearTensors, LinearTensors, LinearTensors],
        divisors: tuple[Tensor | None, Tensor | None],
        norms: tuple[LayerNorm, LayerNorm],
    ) -> None:
        """Quantise the weights; the originals are not kept.

        Args:
            instruction_set: The instruction set of the kernels.
            linears: The output projection and the two of the feed-forward block, in float32.
            divisors: What the inputs of the first two are divided by before they are quantised.
            norms: The norms after attention and after the feed-forward block.
        """
        output, up, down = linears
        self._instruction_set = instruction_set
        self._weights = (
            _Quantised(*output, instruction_set=instruction_set, divisor=divisors[0]),
            _Quantised(*up, instruction_set=instruction_set, divisor=divisors[1]),
            _Quantised(*down, instruction_set=instruction_set, chunk=_CHUNK),
        )
        # The kernel gets only addresses, so these tensors must stay alive.
        self._vectors, structures = norm_vectors(norms)
        intermediate, hidden = up[0].shape
        self.structure = _Layer(
            *(hidden, intermediate, min(_CHUNK, intermediate)),
            *(each.structure for each in self._weights),
            *(*structures, norms[0].epsilon),
        )

    def __call__(self, states: Tensor, attended: Tensor, helpers: Helpers = ALONE) -> Tensor:
        """Return the layer's output for its input states and the attended values.

        All have shape (rows, hidden), are in bfloat16 and contiguous.
        """
        after_attention = kernel(self._instruction_set, "int8_after_attention")
        return by_rows(after_attention, self.structure, states, attended, helpers)
