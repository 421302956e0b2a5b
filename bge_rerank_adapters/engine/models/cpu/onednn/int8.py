"""Linear layers in 8-bit integers, on a CPU.

Their product is a private operator of torch, which its compiler emits. So it is tried once on a
small product, and not used if it is missing or wrong.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from bge_rerank_adapters.engine.models.cpu.onednn.ranges import (
    ROUNDING,
    ROUNDING_BITS,
    Range,
    ordinary_range,
    quantise,
    steps,
)
from bge_rerank_adapters.engine.models.layers.calibration import smoothing
from bge_rerank_adapters.engine.models.layers.linear import Activation, filled_up

# Rows are processed in blocks, so that intermediate results stay in the cache: without blocks they
# cost as much time as the integers save. In smaller blocks there are more operations, and each may
# wait for torch's threads to wake.
_BLOCK_ROWS = 512
_ENCODED_ROWS = 256
# The minimum of GELU, rounded down.
_LEAST_GELU = -0.17


@dataclass(frozen=True, slots=True)
class _Calibrated:
    """A layer's range, the factor of states for it, and the bias corrected by its zero."""

    range: Range
    inverse: Tensor | float
    bias: Tensor


class Int8Linear:
    """A linear layer that multiplies unsigned 8-bit states with signed 8-bit weights.

    Weights have a scale per output. States have one per row, that is, per token: in large
    XLM-RoBERTa models a few tokens (`<s>`, `</s>`) have values many times larger than all others
    (Bondarenko et al. 2021, arXiv:2109.12948), and one scale for all would leave the others only
    two or three steps. A few channels are outliers as well (Kovaleva et al. 2021,
    arXiv:2105.06990). A scale per token cannot help there: `smoothing` moves their size into the
    weights.

    A scale per row has to be applied after the product. A scale that all rows share is applied by
    the product itself, together with residual, activation and rounding, which is faster. So a
    sample calibrates a range for ordinary rows, and only rows beyond it keep their own scale.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        activation: Activation | None = None,
        *,
        sample: Tensor | None = None,
        after_gelu: bool = False,
    ) -> None:
        """Quantise the weight.

        Args:
            weight: Shape (outputs, inputs), in a floating-point dtype.
            bias: Shape (outputs,).
            activation: Applied to the outputs.
            sample: Typical states, shape (rows, inputs), for calibration; with `None` each row has
                its own range, and channels are not smoothed.
            after_gelu: Whether states are the output of a GELU, perhaps quantised already.
        """
        exact = weight.float()
        # Quantised inputs have one scale for all channels.
        factor = None if sample is None or after_gelu else smoothing(sample)
        self._divisor = None if factor is None else factor.reciprocal()
        if factor is not None:
            exact = exact * factor
        scale = exact.abs().amax(dim=1).clamp_min(1e-30) / 127.0
        rounded = (exact / scale[:, None]).round_().clamp_(-127, 127)
        self._weight = torch.ops.onednn.qlinear_prepack(rounded.to(torch.int8), None)
        self._scale, self._zeros = scale, torch.zeros_like(scale, dtype=torch.int32)
        self._sums = rounded.sum(dim=1) * scale
        self._bias, self.activation = bias.float(), activation
        self._least = _LEAST_GELU if after_gelu else None
        self._calibrated: _Calibrated | None = None
        if sample is not None and fused_works(sample.dtype):
            self.calibrate(sample)

    def __call__(self, states: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the outputs for states of shape (rows, inputs)."""
        if self._calibrated is None or self.activation is not None:
            return self.by_row(states, residual)
        codes, outside = self.encode(states)
        out = self.product(codes, states.dtype, residual)
        if outside is not None:
            others = None if residual is None else residual[outside]
            out[outside] = self.by_row(states[outside], others)
        return out

    @property
    def range(self) -> Range | None:
        """The calibrated range, if there is one."""
        return None if self._calibrated is None else self._calibrated.range

    def by_row(self, states: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the same outputs, computed with a separate range for each row."""
        out = states.new_empty(len(states), len(self._scale))
        blocks = zip(*(torch.split(each, _BLOCK_ROWS) for each in (states, out)), strict=True)
        for block, block_out in blocks:
            block_out.copy_(self._block(block))
        return out if residual is None else out.add_(residual)

    def calibrate(self, sample: Tensor) -> None:
        """Calibrate the range, unless all of the sample is zero or not finite."""
        found = ordinary_range(_divided(sample, self._divisor), self._least)
        if found is not None:
            inverse = 1.0 / found.scale if self._divisor is None else self._divisor / found.scale
            bias = self._bias - found.zero * found.scale * self._sums
            self._calibrated = _Calibrated(found, inverse, bias)

    def encode(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return states quantised in the calibrated range, and the rows beyond it, if any."""
        calibrated, last = self._calibration(), steps()
        shift = calibrated.range.zero + ROUNDING
        codes = torch.empty(states.shape, dtype=torch.uint8)
        # In place, since allocating memory costs more than the arithmetic.
        scratch = torch.empty(min(_ENCODED_ROWS, len(states)), states.shape[1], dtype=torch.float32)
        bits = scratch.view(torch.int32)
        blocks = zip(*(torch.split(each, _ENCODED_ROWS) for each in (states, codes)), strict=True)
        for block, block_codes in blocks:
            scratch[: len(block)].copy_(block).mul_(calibrated.inverse).add_(shift)
            # As bits, which are ordered like positive numbers and put NaN at one end.
            block_codes.copy_(bits[: len(block)].clamp_(ROUNDING_BITS, ROUNDING_BITS + last))
        # Values beyond the range have become the first code or the last.
        if int(codes.amin()) > 0 and int(codes.amax()) < last:
            return codes, None
        return codes, _outside((codes.amin(1) > 0) & (codes.amax(1) < last))

    def product(self, codes: Tensor, dtype: torch.dtype, residual: Tensor | None = None) -> Tensor:
        """Return the outputs for states from `encode`, without the activation."""
        given = self._given(codes)
        out: Tensor
        if residual is None:
            out = torch.ops.onednn.qlinear_pointwise(
                *given, self._calibration().bias, 1.0, 0, dtype, "none", [], ""
            )
        else:
            out = torch.ops.onednn.qlinear_pointwise.binary(
                *(*given, filled_up(residual), self._calibration().bias),
                *(1.0, 0, dtype, 1.0, 0, "add", 1.0, "none", [], ""),
            )
        return out[: len(codes)]

    def gelu_codes(self, codes: Tensor, target: Range) -> tuple[Tensor, Tensor | None]:
        """Return the GELU of the outputs, quantised in a range, and the rows beyond it, if any."""
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            *(*self._given(codes), self._calibration().bias),
            *(target.scale, target.zero, torch.uint8, "gelu", [], "none"),
        )
        out = out[: len(codes)]
        return out, _outside(out.amax(1) < steps())

    def _given(self, codes: Tensor) -> tuple[Tensor, float, int, Tensor, Tensor, Tensor]:
        scale = self._calibration().range.scale
        return filled_up(codes), scale, 0, self._weight, self._scale, self._zeros

    def _calibration(self) -> _Calibrated:
        if self._calibrated is None:
            raise RuntimeError("the range is not calibrated")
        return self._calibrated

    def _block(self, states: Tensor) -> Tensor:
        """Return the outputs for some rows, in float32; rounded once, at the end."""
        quantised, scale, zero = quantise(_divided(states, self._divisor))
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            *(filled_up(quantised), 1.0, 0, self._weight, self._scale, self._zeros),
            *(None, 1.0, 0, torch.float32, "none", [], ""),
        )
        # A state is (q - zero) * scale, and so is a sum of states times weights.
        out = product[: len(states)].addcmul_(zero, self._sums, value=-1.0)
        out = out.mul_(scale).add_(self._bias)
        return out if self.activation is None else self.activation(out)


class Int8FeedForward:
    """Two layers; the states between them stay in 8 bits if both are calibrated."""

    def __init__(self, up: Int8Linear, down: Int8Linear) -> None:
        """Take the layers: the first has an activation, the second may be `after_gelu`."""
        self._up, self._down = up, down

    def __call__(self, states: Tensor) -> Tensor:
        """Return the outputs plus the states, shape (rows, hidden)."""
        target, fused = self._down.range, self._up.activation is functional.gelu
        if not fused or target is None or self._up.range is None:
            return self._by_row(states)
        codes, outside = self._up.encode(states)
        inner, beyond = self._up.gelu_codes(codes, target)
        out = self._down.product(inner, states.dtype, states)
        if outside is not None or beyond is not None:
            # Rows beyond the first range are mostly beyond the second as well.
            rows = torch.unique(torch.cat([each for each in (outside, beyond) if each is not None]))
            out[rows] = self._by_row(states[rows])
        return out

    def _by_row(self, states: Tensor) -> Tensor:
        return self._down.by_row(self._up.by_row(states), states)


def _divided(states: Tensor, inverse: Tensor | None) -> Tensor:
    return states if inverse is None else states * inverse


def _outside(inside: Tensor) -> Tensor | None:
    """Return the rows that are not inside; `None` if all are, which is the usual case."""
    return None if bool(inside.all()) else inside.logical_not_().nonzero().squeeze(1)


@cache
def fused_works(dtype: torch.dtype) -> bool:
    """Return whether the product can apply scales, residual and GELU here, correctly.

    With 127 steps it is not used, since it lowered nDCG@10 by 0.005 (benchmarks/NOTES.md).
    """
    if steps() < 255:
        return False
    generator = torch.Generator().manual_seed(0)
    weight, states = (
        torch.randn(16, 16, generator=generator, dtype=torch.float32) for _ in range(2)
    )
    bias, states = weight[0].clone(), states.to(dtype)
    up = Int8Linear(weight, bias, functional.gelu)
    down = Int8Linear(weight, bias, after_gelu=True)
    inner = up.by_row(states)
    exact = down.by_row(inner, states), down.by_row(inner)
    up.calibrate(states)
    down.calibrate(inner)
    try:
        outs = Int8FeedForward(up, down)(states), down(inner)
    except (AttributeError, RuntimeError):
        return False
    return all(
        out.dtype == dtype and bool((out - each).norm() < 0.05 * each.norm())
        for out, each in zip(outs, exact, strict=True)
    )
