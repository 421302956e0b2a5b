"""An encoder's layers of own kernels: what all instruction sets and dtypes share."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bge_rerank_adapters.engine.models.cpu.kernels.library import InstructionSet, kernel, pack
from bge_rerank_adapters.engine.models.cpu.threads import ALONE, Helpers
from bge_rerank_adapters.engine.models.encoder.config import EncoderConfig
from bge_rerank_adapters.engine.models.layers.attention import Attention, Layout
from bge_rerank_adapters.engine.models.layers.norm import LayerNorm

# Bytes in a row of a tile.
_TILE_BYTES = 64
# Reading the weights takes as long as multiplying them with about this many rows.
_LEAST_ROWS = 64


def suits(config: EncoderConfig, *, int8: bool) -> bool:
    """Return whether the kernels can run a model: it needs GELU, and sizes that fill tiles."""
    step = _TILE_BYTES // (1 if int8 else 2)
    # Attention is never in 8 bits.
    steps = (config.hidden, step), (config.intermediate, step), (config.hidden // config.heads, 32)
    return config.activation == "gelu" and all(size % each == 0 for size, each in steps)


class NormVectors(ctypes.Structure):
    """`struct norm` of the kernels."""

    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p))


class Projection(Protocol):
    """A linear layer whose outputs are stored head by head."""

    @property
    def structure(self) -> ctypes.Structure:
        """The kernels' `struct projection` of it."""
        ...

    def __call__(self, states: Tensor, helpers: Helpers = ALONE) -> Tensor:
        """Return outputs of shape (outputs / width of a head, rows, width of a head)."""
        ...


class AfterAttention(Protocol):
    """The part of a layer after attention."""

    @property
    def structure(self) -> ctypes.Structure:
        """The kernels' structure of it."""
        ...

    def __call__(self, states: Tensor, attended: Tensor, helpers: Helpers = ALONE) -> Tensor:
        """Return the layer's output for its input and the attended values, all (rows, hidden)."""
        ...


@dataclass(frozen=True, slots=True)
class KernelLayer:
    """One layer.

    Attributes:
        projections: As in `encoder.layer.LinearLayer`.
        after: The part after attention.
    """

    projections: tuple[Projection, ...]
    after: AfterAttention

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
        """Return the output for input states and attended values, both (rows, hidden)."""
        return self.after(states, attended, layout.helpers)


def attention_by(instruction_set: InstructionSet) -> Attention:
    """Return the attention kernel of an instruction set.

    Query, key and value are in bfloat16, contiguous, of shape (heads, rows, width of a head). The
    query has as many rows as key and value, or one for each pair.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, layout: Layout, heads: int) -> Tensor:
        rows, width = query.shape[1:]
        out = query.new_empty(rows, heads * width)
        pairs, single = len(layout.lengths), rows != key.shape[1]

        def make(begin: int, end: int) -> None:
            check(
                kernel(instruction_set, "attention")(
                    *(query.data_ptr(), key.data_ptr(), value.data_ptr(), layout.bounds.data_ptr()),
                    *(pairs, heads, begin, end, width, single, out.data_ptr()),
                )
            )

        layout.helpers.split(heads, 1 if key.shape[1] > _LEAST_ROWS else heads, make)
        return out

    return attend


def packed(weight: Tensor, instruction_set: InstructionSet) -> Tensor:
    """Return a weight of shape (outputs, inputs), of 8 or 16 bits, in the kernels' layout."""
    weight = weight.contiguous()
    out = torch.empty_like(weight)
    outputs, inputs = weight.shape
    if outputs % 32 or inputs * weight.element_size() % _TILE_BYTES:
        raise ValueError(f"A weight of {outputs} outputs and {inputs} inputs fills no tiles.")
    pieces = inputs * weight.element_size() // 2
    pack(instruction_set)(weight.data_ptr(), outputs, pieces, out.data_ptr())
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
    """Return a kernel's outputs for states, of shape (outputs / width, rows, width).

    Args:
        states: Shape (rows, inputs).
        outputs: Number of outputs of each row.
        width: Width of a slice.
        make: Computes the outputs of a range of rows, and returns a status, 0 for success.
        helpers: Threads that share the rows.
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
    """Return the output of an `after_attention` kernel; all of shape (rows, hidden)."""
    out = torch.empty_like(states)
    row = states.shape[1] * states.element_size()

    def make(begin: int, end: int) -> None:
        before, between, after = (each.data_ptr() + begin * row for each in (states, attended, out))
        check(kernel(ctypes.addressof(layer), before, between, end - begin, after))

    helpers.split(len(states), _LEAST_ROWS, make)
    return out


def check(status: int) -> None:
    """Raise `MemoryError`, which the engine handles, if a kernel has failed."""
    if status:
        raise MemoryError("There is not enough memory for a pack's intermediate results.")
