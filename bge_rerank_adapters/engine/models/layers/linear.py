"""Linear layers: torch's own, and those with weights prepacked by oneDNN.

Prepacked ones use private operators of torch, which its compiler emits. So they are tried once on a
small product, and not used if they are missing or wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

Activation = Callable[[Tensor], Tensor]


def few_sizes(rows: int) -> int:
    """Return the number of rows, rounded up to one of few sizes for products on a CPU.

    oneDNN compiles code for each number of rows and caches that of the last thousand products: two
    megabytes for each size of pack, half a gigabyte in a few hundred packs. So there are sixteen
    sizes for each power of two, which adds 2 % of rows on average.
    """
    step = max(8, 1 << max(0, rows.bit_length() - 5))
    return -(-rows // step) * step


def filled_up(states: Tensor) -> Tensor:
    """Return the states padded with rows of zeros to one of few sizes."""
    missing = few_sizes(len(states)) - len(states)
    return functional.pad(states, (0, 0, 0, missing)) if missing else states


class Linear(Protocol):
    """`activation(states @ weight.T + bias)`, from (rows, inputs) to (rows, outputs)."""

    def __call__(self, states: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the outputs, in the dtype of the states.

        Args:
            states: Shape (rows, inputs).
            residual: Added to the outputs, same shape; not for layers with an activation.
        """
        ...


class PlainLinear:
    """torch's own linear layer."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, activation: Activation | None = None
    ) -> None:
        """Keep the weight, shape (outputs, inputs), and the bias, shape (outputs,), if any."""
        self._weight, self._bias, self._activation = weight, bias, activation

    def __call__(self, states: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the outputs for states of shape (rows, inputs)."""
        out = functional.linear(states, self._weight, self._bias)
        if residual is not None:
            return out.add_(residual)
        return out if self._activation is None else self._activation(out)


class PackedLinear:
    """A layer on a CPU with a weight prepacked by oneDNN, which also applies a GELU."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, activation: Activation | None = None
    ) -> None:
        """Prepack the weight; the original is not kept."""
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight)  # noqa: SLF001
        self._bias = bias
        # "none" is the exact GELU, as opposed to "tanh".
        fused = activation is functional.gelu
        self._post: tuple[str, list[float], str]
        self._post = ("gelu", [], "none") if fused else ("none", [], "")
        self._activation = None if fused else activation

    def __call__(self, states: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the outputs for states of shape (rows, inputs)."""
        product = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001
        out: Tensor
        filled = filled_up(states)
        if residual is not None:
            out = product.binary(filled, filled_up(residual), self._weight, self._bias, "add")
            return out[: len(states)]
        out = product(filled, self._weight, self._bias, *self._post)[: len(states)]
        return out if self._activation is None else self._activation(out)


@dataclass(frozen=True, slots=True)
class FeedForward:
    """Two linear layers, the first with an activation, and the residual sum."""

    up: Linear
    down: Linear

    def __call__(self, states: Tensor) -> Tensor:
        """Return the outputs for states, both (rows, hidden)."""
        return self.down(self.up(states), states)


def has_onednn() -> bool:
    """Return whether this build of torch has oneDNN."""
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


@cache
def packed_works(dtype: torch.dtype) -> bool:
    """Return whether oneDNN's prepacked product runs in this dtype here, correctly."""
    if dtype not in (torch.float32, torch.bfloat16) or not has_onednn():
        return False
    weight = (torch.arange(32 * 16).reshape(32, 16) % 7 - 3).to(dtype)
    states, bias = weight[:8].contiguous(), weight[:, 0].contiguous()
    residual = weight.reshape(16, 32)[:8].contiguous()

    def outputs(kind: Callable[..., Linear]) -> Tensor:
        activated = kind(weight, bias, functional.gelu)(states)
        return torch.cat((activated, kind(weight, bias)(states, residual))).float()

    try:
        out = outputs(PackedLinear)
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(out, outputs(PlainLinear), rtol=0.01)


def linear_maker(device: torch.device, dtype: torch.dtype) -> Callable[..., Linear]:
    """Return the fastest kind of layer for weights of this dtype on this device.

    On a CPU oneDNN's prepacked product measured 1.2 to 1.4 times as fast as torch's own, in
    float32 and bfloat16 (benchmarks/NOTES.md).
    """
    if device.type == "cpu" and packed_works(dtype):
        return PackedLinear
    return PlainLinear
