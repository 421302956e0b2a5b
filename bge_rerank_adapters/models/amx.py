"""An encoder's layers in bfloat16 on a processor with AMX, by this package's own kernels.

oneDNN leaves two thirds of such a processor's matrix units unused with the sizes that a reranker
has (benchmarks/NOTES.md); `amx.c` says how they are kept busier. Where that library was not built,
or the processor or the sizes are of other kinds, the layers of `encoder_layers` run.
"""

import ctypes
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from bge_rerank_adapters.models.attention import Layout
from bge_rerank_adapters.models.encoder_config import EncoderConfig
from bge_rerank_adapters.models.encoder_layers import EncoderReader, Parts, stacked
from bge_rerank_adapters.models.streams import in_parts

_log = logging.getLogger(__name__)
_VERSION = 1
_LIBRARY = Path(__file__).with_name("libamx.so")
# Numbers that a tile has side by side.
_STEP = 32
# Weights take as long to be read as so many rows to be multiplied with them.
_LEAST_ROWS = 64


class _Norm(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p))


class _Rest(ctypes.Structure):
    _fields_ = (
        ("hidden", ctypes.c_int64),
        ("intermediate", ctypes.c_int64),
        ("output", ctypes.c_void_p),
        ("up", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
        ("output_bias", ctypes.c_void_p),
        ("up_bias", ctypes.c_void_p),
        ("down_bias", ctypes.c_void_p),
        ("attention_norm", _Norm),
        ("output_norm", _Norm),
        ("epsilon", ctypes.c_float),
    )


@cache
def _kernels() -> ctypes.CDLL | None:
    """Return the library, or `None` if it was not built, or does not run here."""
    if _is_limited():
        return None
    try:
        library = ctypes.CDLL(str(_LIBRARY))
    except OSError:
        return None
    if library.bge_amx_version() != _VERSION:
        _log.warning("%s was built from another version of its source; it is left alone", _LIBRARY)
        return None
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    library.bge_amx_pack.argtypes = (pointer, size, size, pointer)
    library.bge_amx_pack.restype = None
    library.bge_amx_linear.argtypes = (
        *(pointer, size, size, size, size, size),
        *(pointer, pointer, pointer, size),
    )
    library.bge_amx_attention.argtypes = (
        *(pointer, pointer, pointer, pointer),
        *(size, size, size, size, size, ctypes.c_int32, pointer),
    )
    library.bge_amx_rest.argtypes = (ctypes.POINTER(_Rest), pointer, pointer, size, pointer)
    return library if library.bge_amx_supported() else None


def _is_limited() -> bool:
    """Return whether who started this process limits oneDNN to processors without AMX."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    return bool(limit) and limit not in ("DEFAULT", "ALL") and "AMX" not in limit


def amx_runs(config: EncoderConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernels run on this machine, for such a model.

    Args:
        config: Sizes that are multiples of 32 do, and the exact GELU.
        device: Where the model is to run.
        dtype: Of its activations.
    """
    sizes = (config.hidden, config.intermediate, config.hidden // config.heads)
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and config.activation == "gelu"
        and all(size % _STEP == 0 for size in sizes)
        and _kernels() is not None
    )


def amx_layer(read: EncoderReader, index: int) -> "AmxLayer":
    """Return the layer at a position counted from 0; `amx_runs` says for which models."""
    config, parts = read.config, read.layer_parts(index, torch.bfloat16)
    query, key_value = parts.projections
    projections = parts.projections if read.is_last(index) else (stacked(query, key_value),)
    norms = parts.attention_norm, parts.output_norm
    return AmxLayer(
        projections=tuple(
            AmxLinear(*each, slice_width=config.hidden // config.heads) for each in projections
        ),
        rest=AmxRest(
            (parts.attention_output, parts.up, parts.down),
            [(norm.weight, norm.bias) for norm in norms],
            config.epsilon,
        ),
    )


class AmxLinear:
    """A linear layer in bfloat16 whose outputs lie head by head."""

    def __init__(self, weight: Tensor, bias: Tensor, *, slice_width: int) -> None:
        """Lay out the weight, shape (outputs, inputs); the original is not kept.

        Args:
            weight: In bfloat16.
            bias: Shape (outputs,).
            slice_width: How many outputs lie together, a divisor of their number.
        """
        self._outputs, self._inputs = weight.shape
        self._weight, self._bias = _packed(weight), bias.float()
        self._slice = slice_width

    def __call__(self, states: Tensor) -> Tensor:
        """Return the outputs for states of shape (rows, inputs), contiguous.

        Shape (outputs / slice width, rows, slice width).
        """
        out = states.new_empty(self._outputs // self._slice, len(states), self._slice)

        def make(begin: int, end: int) -> None:
            _check(
                _library().bge_amx_linear(
                    *(states.data_ptr(), len(states), begin, end, self._inputs, self._outputs),
                    *(self._weight.data_ptr(), self._bias.data_ptr(), out.data_ptr(), self._slice),
                )
            )

        in_parts(len(states), _LEAST_ROWS, make)
        return out


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
        _check(
            _library().bge_amx_attention(
                *(query.data_ptr(), key.data_ptr(), value.data_ptr(), layout.bounds.data_ptr()),
                *(pairs, heads, begin, end, width, single, out.data_ptr()),
            )
        )

    in_parts(heads, 1, make)
    return out


class AmxRest:
    """What comes after attention in a layer: its output, the feed-forward block and both norms."""

    def __init__(self, linears: Sequence[Parts], norms: Sequence[Parts], epsilon: float) -> None:
        """Lay out the weights; the originals are not kept.

        Args:
            linears: Attention's output, and the feed-forward block's two, weights in bfloat16.
            norms: Weight and bias of the norms after attention and after the block.
            epsilon: Of both norms.
        """
        weights = [_packed(weight) for weight, _ in linears]
        biases = [bias.float() for _, bias in linears]
        vectors = [vector.float() for norm in norms for vector in norm]
        # The kernel has addresses alone.
        self._kept = weights, biases, vectors
        addresses = [vector.data_ptr() for vector in vectors]
        intermediate, hidden = linears[1][0].shape
        self._layer = _Rest(
            *(hidden, intermediate),
            *(each.data_ptr() for each in (*weights, *biases)),
            *(_Norm(*addresses[:2]), _Norm(*addresses[2:])),
            epsilon,
        )

    def __call__(self, states: Tensor, attended: Tensor) -> Tensor:
        """Return the layer's output for states and what their attention gave.

        All have shape (rows, hidden) and are contiguous.
        """
        out = torch.empty_like(states)
        row = states.shape[1] * states.element_size()

        def make(begin: int, end: int) -> None:
            places = (each.data_ptr() + begin * row for each in (states, attended, out))
            before, between, after = places
            _check(_library().bge_amx_rest(self._layer, before, between, end - begin, after))

        in_parts(len(states), _LEAST_ROWS, make)
        return out


@dataclass(frozen=True, slots=True)
class AmxLayer:
    """One layer.

    Attributes:
        projections: As in `encoder_layers.Layer`.
        rest: All that comes after attention.
    """

    projections: tuple[AmxLinear, ...]
    rest: AmxRest

    def project(self, states: Tensor) -> tuple[Tensor, ...]:
        """Return query, key and value for states of shape (rows, hidden), head by head."""
        return self.projections[0](states).chunk(3)

    def project_last(self, states: Tensor, first: Tensor) -> tuple[Tensor, ...]:
        """Return the query for the pairs' first tokens, and key and value for all."""
        return self.projections[0](first), *self.projections[1](states).chunk(2)


def _packed(weight: Tensor) -> Tensor:
    packed = torch.empty_like(weight, memory_format=torch.contiguous_format)
    weight = weight.contiguous()
    _library().bge_amx_pack(weight.data_ptr(), *weight.shape, packed.data_ptr())
    return packed


def _library() -> ctypes.CDLL:
    library = _kernels()
    if library is None:
        raise RuntimeError("The kernels for AMX do not run here; ask amx_runs() first.")
    return library


def _check(status: int) -> None:
    if status:
        raise MemoryError("There is not enough memory for a pack's intermediate results.")
