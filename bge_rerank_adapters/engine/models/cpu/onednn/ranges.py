"""Quantisation to 8-bit integers: ranges of numbers, and their steps."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from bge_rerank_adapters.engine.models.layers.linear import has_onednn

# Added to a float32 below 2**22, it leaves no bits for a fraction: the last bits of the sum are the
# nearest integer. This is ten times as fast as round().
ROUNDING = 1.5 * 2**23
ROUNDING_BITS = 0x4B400000
# A calibrated range is this many times as wide as the median row of the sample needs. With less,
# most packs have a row beyond it; with more, all rows have fewer steps.
_ROOM = 2.5


@dataclass(frozen=True, slots=True)
class Range:
    """A range that rows share: a value is about (code - zero) * scale."""

    scale: float
    zero: int


def ordinary_range(states: Tensor, least: float | None) -> Range | None:
    """Return a range for most rows like those of a sample; `None` if none is finite.

    Args:
        states: The sample, shape (rows, inputs).
        least: The minimum of all states; `None` estimates it from the sample.
    """
    high = _reach(states.amax(dim=1).float())
    low = _reach(states.amin(dim=1).float().neg_()) if least is None else -least
    if high + low == 0.0:
        return None
    # The first and the last step are for values beyond the range.
    scale = (high + low) / (steps() - 3)
    return Range(scale, 1 + round(low / scale))


def _reach(largest: Tensor) -> float:
    """Return the bound of a range, from the maxima of rows; 0 if none is finite."""
    largest = largest[largest.isfinite()].clamp_min_(0.0)
    return _ROOM * float(largest.median()) if len(largest) else 0.0


def quantise(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise each row in its own range, which always contains zero.

    Returns:
        q as uint8; each row's scale and zero in float32, shape (rows, 1). A state is about
        (q - zero) * scale, and zero is an integer. Scale and zero of a row with NaN are NaN.
    """
    least = states.amin(dim=1, keepdim=True).float().clamp_max(0.0)
    largest = states.amax(dim=1, keepdim=True).float().clamp_min(0.0)
    # One step less than there are, since zero is rounded too.
    scale = (largest - least) / (steps() - 1)
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    inverse = scale.reciprocal()
    zero = (least * -inverse).round_()
    sums = (states * inverse).add_(zero + ROUNDING)
    return sums.view(torch.int32).to(torch.uint8), scale, zero


@cache
def int8_works() -> bool:
    """Return whether the 8-bit product runs here and is exact."""
    return has_onednn() and _exact_up_to(127)


@cache
def steps() -> int:
    """Return how many steps a state may have: 255, or 127 where 255 overflow.

    CPUs without VNNI add pairs of 8-bit products in 16 bits: 127 * 127 * 2 fits, 255 * 127 * 2 does
    not (Intel's oneDNN guide, "Nuances of int8 computations").
    """
    return 255 if _exact_up_to(255) else 127


def _exact_up_to(largest: int) -> bool:
    """Return whether a product of the largest values is exact."""
    weight = torch.full((32, 64), 127, dtype=torch.int8)
    states = torch.full((8, 64), largest, dtype=torch.uint8)
    ones, zeros = torch.ones(32, dtype=torch.float32), torch.zeros(32, dtype=torch.int32)
    try:
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        out = torch.ops.onednn.qlinear_pointwise(
            states, 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
    except (AttributeError, RuntimeError):
        return False
    return bool((out == 64.0 * 127 * largest).all())
