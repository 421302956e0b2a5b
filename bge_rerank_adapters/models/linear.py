"""Linear layers as fast as the device allows: plain, prepacked by oneDNN, or in 8-bit integers.

The last two use operators that torch itself keeps private (its compiler emits them), so each is
tried once on a small product, and left alone where it is missing or wrong.
"""

from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

Activation = Callable[[Tensor], Tensor]


def few_sizes(rows: int) -> int:
    """Return the next number of rows, at least as many, that products on a processor use.

    oneDNN makes code of its own for each number of rows and keeps that of the last thousand
    products: two megabytes for each size of pack, half a gigabyte in a few hundred packs. So sizes
    are rounded up to sixteen for each power of two, by 2 % on average.
    """
    step = max(8, 1 << max(0, rows.bit_length() - 5))
    return -(-rows // step) * step


def _filled_up(states: Tensor) -> Tensor:
    """Return the states with rows of zeros after them, so that their number is one of few."""
    missing = few_sizes(len(states)) - len(states)
    return functional.pad(states, (0, 0, 0, missing)) if missing else states


class Linear(Protocol):
    """`activation(states @ weight.T + bias)`, from (rows, inputs) to (rows, outputs)."""

    def __call__(self, states: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the outputs, in the dtype of the states.

        Args:
            states: Shape (rows, inputs).
            residual: Added to the outputs, whose shape it has; not for layers with an activation.
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
    """A layer on a processor whose weight lies in oneDNN's own order, activation included."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, activation: Activation | None = None
    ) -> None:
        """Reorder the weight; the original is not kept."""
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight)  # noqa: SLF001
        self._bias = bias
        # "none" is the exact GELU, beside "tanh".
        fused = activation is functional.gelu
        self._post: tuple[str, list[float], str]
        self._post = ("gelu", [], "none") if fused else ("none", [], "")
        self._activation = None if fused else activation

    def __call__(self, states: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the outputs for states of shape (rows, inputs)."""
        product = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001
        out: Tensor
        filled = _filled_up(states)
        if residual is not None:
            out = product.binary(filled, _filled_up(residual), self._weight, self._bias, "add")
            return out[: len(states)]
        out = product(filled, self._weight, self._bias, *self._post)[: len(states)]
        return out if self._activation is None else self._activation(out)


class Int8Linear:
    """A layer whose product runs on unsigned 8-bit states and signed 8-bit weights.

    Weights have a scale per output. States have one per row, that is per token: in large
    XLM-RoBERTa models a few tokens (`<s>`, `</s>`) carry values many times larger than all others
    do (Bondarenko et al. 2021, arXiv:2109.12948), and a scale per tensor would leave the others
    two or three steps. A few channels are as large in every token (Kovaleva et al. 2021,
    arXiv:2105.06990), which no scale per token can mend: `smooth` moves their size into the
    weights, as SmoothQuant does (Xiao et al. 2022, arXiv:2211.10438), from the layer norm's
    parameters instead of calibration texts.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        activation: Activation | None = None,
        *,
        smooth: Tensor | None = None,
    ) -> None:
        """Quantise the weight.

        Args:
            weight: Shape (outputs, inputs), in a floating-point dtype.
            bias: Shape (outputs,); its dtype is that of the states.
            activation: Applied to the outputs.
            smooth: What each input is divided by before it is quantised, shape (inputs,).
        """
        exact = weight.float()
        self._divisor = None if smooth is None else smooth.float().reciprocal()
        if smooth is not None:
            exact = exact * smooth
        scale = exact.abs().amax(dim=1).clamp_min(1e-30) / 127.0
        rounded = (exact / scale[:, None]).round_().clamp_(-127, 127)
        self._weight = torch.ops.onednn.qlinear_prepack(rounded.to(torch.int8), None)
        self._scale, self._zeros = scale, torch.zeros_like(scale, dtype=torch.int32)
        self._sums = rounded.sum(dim=1) * scale
        self._bias, self._activation = bias.float(), activation

    def __call__(self, states: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the outputs for states of shape (rows, inputs)."""
        out = states.new_empty(len(states), len(self._scale))
        blocks = zip(*(torch.split(each, _BLOCK_ROWS) for each in (states, out)), strict=True)
        for block, block_out in blocks:
            block_out.copy_(self._block(block))
        return out if residual is None else out.add_(residual)

    def _block(self, states: Tensor) -> Tensor:
        """Return the outputs for some rows, in float32, which is rounded once at the end."""
        if self._divisor is not None:
            states = states * self._divisor
        quantised, scale, zero = _quantise(states)
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            _filled_up(quantised),
            1.0,
            0,
            self._weight,
            self._scale,
            self._zeros,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        # A state is (q - zero) * scale, so a sum of them times weights is likewise.
        out = product[: len(states)].addcmul_(zero, self._sums, value=-1.0)
        out = out.mul_(scale).add_(self._bias)
        return out if self._activation is None else self._activation(out)


# Rows that are quantised, multiplied and scaled back at a time: what lies between those steps
# stays in the cache. Without blocks it cost as much as the integers saved. Smaller ones take more
# steps, each of which waits for threads to wake where another thread of the process uses torch.
_BLOCK_ROWS = 512
# Times the median from where on a channel is taken for one of the outliers of large models, which
# reach tens of times as far as others.
_OUTLIER = 6.0
# Added to a float32 below 2**22 in size, it leaves no room for a fraction, so that the sum's last
# bits are the nearest integer: rounding for the price of an addition, where round() takes ten.
_ROUNDING = 1.5 * 2**23


def _quantise(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Spread each row's range, from its least to its largest value or zero, over the steps.

    Returns:
        q as uint8, and in float32, of shape (rows, 1), each row's scale and zero, an integer: a
        state is about (q - zero) * scale. Scale and zero of a row with NaN are NaN.
    """
    least = states.amin(dim=1, keepdim=True).float().clamp_max(0.0)
    largest = states.amax(dim=1, keepdim=True).float().clamp_min(0.0)
    # One step less than there are, since zero is rounded too.
    scale = (largest - least) / (_steps() - 1)
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    inverse = scale.reciprocal()
    zero = (least * -inverse).round_()
    sums = (states * inverse).add_(zero + _ROUNDING)
    return sums.view(torch.int32).to(torch.uint8), scale, zero


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


@cache
def packed_works(dtype: torch.dtype) -> bool:
    """Return whether oneDNN's prepacked product runs in this dtype here, and is right."""
    if dtype not in (torch.float32, torch.bfloat16) or not _has_onednn():
        return False
    weight = (torch.arange(32.0 * 16).reshape(32, 16) % 7 - 3).to(dtype)
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


@cache
def int8_works() -> bool:
    """Return whether the 8-bit product runs here, and is exact."""
    return _has_onednn() and _exact_up_to(127)


@cache
def _steps() -> int:
    """Return how many steps a state may have: 255, or 127 where 255 overflow.

    Processors without VNNI add pairs of 8-bit products in 16 bits, which 255 * 127 * 2 does not
    fit but 127 * 127 * 2 does (Intel's oneDNN guide, "Nuances of int8 computations").
    """
    return 255 if _exact_up_to(255) else 127


def _exact_up_to(largest: int) -> bool:
    """Return whether a product of the largest values is exact."""
    weight = torch.full((32, 64), 127, dtype=torch.int8)
    states = torch.full((8, 64), largest, dtype=torch.uint8)
    ones, zeros = torch.ones(32), torch.zeros(32, dtype=torch.int32)
    try:
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        out = torch.ops.onednn.qlinear_pointwise(
            states, 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
    except (AttributeError, RuntimeError):
        return False
    return bool((out == 64.0 * 127 * largest).all())


def linear_maker(device: torch.device, dtype: torch.dtype) -> Callable[..., Linear]:
    """Return the fastest kind of layer for weights of this dtype on this device.

    On a processor oneDNN's prepacked product measured 1.2 to 1.4 times as fast as torch's own, in
    float32 and bfloat16 (benchmarks/NOTES.md).
    """
    if device.type == "cpu" and packed_works(dtype):
        return PackedLinear
    return PlainLinear


def smoothing(gain: Tensor, shift: Tensor, weight: Tensor) -> Tensor | None:
    """Return what to divide each input of a layer by that follows a layer norm.

    A norm's output reaches about three times its gain around its shift. Where a channel reaches
    many times as far as the median one, what is large in it is shared between states and weights:
    the divisor is the square root of its reach over that of its weights, both counted in medians
    (SmoothQuant's alpha of one half). Other channels are left alone, since on a model without
    such channels dividing all of them measured worse than dividing none.

    Args:
        gain: The norm's weight, shape (inputs,).
        shift: The norm's bias, shape (inputs,).
        weight: The layer's, shape (outputs, inputs).

    Returns:
        Shape (inputs,), 1 for an ordinary channel; `None` if all are ordinary.
    """
    reach = 3.0 * gain.float().abs() + shift.float().abs()
    reach = reach / reach.median().clamp_min(1e-12)
    outliers = reach > _OUTLIER
    if not bool(outliers.any()):
        return None
    heights = weight.float().abs().amax(dim=0)
    heights = (heights / heights.median().clamp_min(1e-12)).clamp_min(1e-6)
    divisor = torch.minimum((reach / heights).sqrt(), reach).clamp_min(1.0)
    return torch.where(outliers, divisor, torch.ones_like(divisor))
