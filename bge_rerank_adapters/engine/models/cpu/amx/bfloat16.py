"""An encoder's layers on a processor with AMX, by this package's own kernels.

oneDNN leaves two thirds of such a processor's matrix units unused with the sizes that a reranker
has (benchmarks/NOTES.md); `kernels/tiles.h` says how they are kept busier. Where the library was
not built, or the CPU or the sizes are of other kinds, another of `encoder.kit.KITS` is chosen.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bge_rerank_adapters.engine.models.cpu.kernels.library import AMX, kernel, lack, pack
from bge_rerank_adapters.engine.models.cpu.threads import ALONE, Helpers
from bge_rerank_adapters.engine.models.encoder.config import EncoderConfig
from bge_rerank_adapters.engine.models.encoder.layer import LayerSource
from bge_rerank_adapters.engine.models.encoder.tensors import LinearTensors, stacked
from bge_rerank_adapters.engine.models.layers.attention import Layout
from bge_rerank_adapters.engine.models.layers.norm import LayerNorm

# Bytes that a tile has side by side.
_TILE_BYTES = 64
# Weights take as long to be read as so many rows to be multiplied with them.
_LEAST_ROWS = 64


class NormVectors(ctypes.Structure):
    """`struct norm` of the kernels."""

    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p))


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


def amx_runs(
    config: EncoderConfig, device: torch.device, dtype: torch.dtype, *, int8: bool = False
) -> bool:
    """Return whether the kernels run on this machine, for such a model.

    Args:
        config: Of the model; sizes that fill tiles do, and the exact GELU.
        device: Where the model is to run.
        dtype: Of its activations.
        int8: Whether its layers are to be in 8 bits.
    """
    step = _TILE_BYTES // (1 if int8 else 2)
    # Attention is in bfloat16 always.
    steps = (config.hidden, step), (config.intermediate, step), (config.hidden // config.heads, 32)
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and config.activation == "gelu"
        and all(size % each == 0 for size, each in steps)
        and lack(AMX) is None
    )


def amx_layer(source: LayerSource, *, heads: int) -> "AmxLayer":
    """Return a layer in bfloat16.

    Args:
        source: What it is made from, tensors in bfloat16.
        heads: Number of attention heads.
    """
    tensors = source.tensors
    query, key_value = tensors.projections
    width = len(query[0]) // heads
    projections = tensors.projections if source.last else (stacked(query, key_value),)
    return AmxLayer(
        projections=tuple(AmxLinear(*each, slice_width=width) for each in projections),
        after=AmxAfterAttention(
            (tensors.attention_output, tensors.up, tensors.down),
            (tensors.attention_norm, tensors.output_norm),
        ),
    )


def amx_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, heads: int) -> Tensor:
    """Let each pair of a pack attend to itself.

    Args:
        query: Shape (heads, rows, width of a head), contiguous as the others; a row for each one
            of key and value, or one for each pair.
        key: Likewise.
        value: Likewise.
        layout: Of the pack.
        heads: Their number.

    Returns:
        The attended values, shape (rows of the query, heads * width).
    """
    rows, width = query.shape[1:]
    out = query.new_empty(rows, heads * width)
    pairs, single = len(layout.lengths), rows != key.shape[1]

    def make(begin: int, end: int) -> None:
        check(
            kernel(AMX, "attention")(
                *(query.data_ptr(), key.data_ptr(), value.data_ptr(), layout.bounds.data_ptr()),
                *(pairs, heads, begin, end, width, single, out.data_ptr()),
            )
        )

    layout.helpers.split(heads, 1 if key.shape[1] > _LEAST_ROWS else heads, make)
    return out


@dataclass(frozen=True, slots=True)
class AmxLayer:
    """One layer.

    Attributes:
        projections: As in `encoder.layer.LinearLayer`; their outputs lie head by head, shape
            (outputs / width of a head, rows, width of a head).
        after: All that comes after attention, from states and what was attended.
    """

    projections: tuple[Callable[[Tensor, Helpers], Tensor], ...]
    after: Callable[[Tensor, Tensor, Helpers], Tensor]

    def project(self, states: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value for states of shape (rows, hidden), head by head."""
        query, key, value = self.projections[0](states, layout.helpers).chunk(3)
        return query, key, value

    def project_last(
        self, states: Tensor, first: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the query for the pairs' first tokens, and key and value for all."""
        query, key_value = self.projections
        key, value = key_value(states, layout.helpers).chunk(2)
        return query(first, layout.helpers), key, value

    def after_attention(self, states: Tensor, attended: Tensor, layout: Layout) -> Tensor:
        """Return the output for states and what their attention gave, both (rows, hidden)."""
        return self.after(states, attended, layout.helpers)


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
        self._weight, self._bias = packed(weight), bias.float()
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
        weights = [packed(weight) for weight, _ in linears]
        biases = [bias.float() for _, bias in linears]
        vectors, structures = norm_vectors(norms)
        # The kernel has addresses alone.
        self._kept = weights, biases, vectors
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


def packed(weight: Tensor) -> Tensor:
    """Return a weight of shape (outputs, inputs), of 8 or 16 bits, as the kernels read it."""
    weight = weight.contiguous()
    out = torch.empty_like(weight)
    outputs, inputs = weight.shape
    if outputs % 32 or inputs * weight.element_size() % _TILE_BYTES:
        raise ValueError(f"A weight of {outputs} outputs and {inputs} inputs fills no tiles.")
    pieces = inputs * weight.element_size() // 2
    pack(AMX)(weight.data_ptr(), outputs, pieces, out.data_ptr())
    return out


def norm_vectors(norms: tuple[LayerNorm, LayerNorm]) -> tuple[list[Tensor], list[NormVectors]]:
    """Return the norms' vectors in float32, and structures with their addresses."""
    vectors = [vector.float() for norm in norms for vector in (norm.weight, norm.bias)]
    first, second, third, fourth = (vector.data_ptr() for vector in vectors)
    return vectors, [NormVectors(first, second), NormVectors(third, fourth)]


def by_slices(
    states: Tensor,
    outputs: int,
    width: int,
    make: Callable[[int, int, Tensor], int],
    helpers: Helpers,
) -> Tensor:
    """Return what a kernel makes of states, of shape (outputs / width, rows, width).

    Args:
        states: Shape (rows, inputs).
        outputs: For each row.
        width: Of a slice.
        make: Makes those from a row to another, and returns whether it failed.
        helpers: Threads that make a share of the rows.
    """
    out = states.new_empty(outputs // width, len(states), width)
    helpers.split(len(states), _LEAST_ROWS, lambda begin, end: check(make(begin, end, out)))
    return out


def by_rows(
    kernel: Callable[..., int],
    layer: ctypes.Structure,
    states: Tensor,
    attended: Tensor,
    helpers: Helpers,
) -> Tensor:
    """Return what a kernel for all after attention gives, all of shape (rows, hidden)."""
    out = torch.empty_like(states)
    row = states.shape[1] * states.element_size()

    def make(begin: int, end: int) -> None:
        before, between, after = (each.data_ptr() + begin * row for each in (states, attended, out))
        check(kernel(ctypes.addressof(layer), before, between, end - begin, after))

    helpers.split(len(states), _LEAST_ROWS, make)
    return out


def check(status: int) -> None:
    """Raise an error that the engine knows if a kernel has failed."""
    if status:
        raise MemoryError("There is not enough memory for a pack's intermediate results.")
