"""Finds outlier channels, which are scaled down before they are quantised to 8 bits."""

import torch
from torch import Tensor

# A channel is an outlier if its maximum is more than this many times the median channel's.
_OUTLIER_RATIO = 2.0


def smoothing(sample: Tensor) -> Tensor | None:
    """Return the divisor of each input of a layer before it is quantised.

    The size of outlier channels is moved into the weights, as in SmoothQuant (Xiao et al. 2022,
    arXiv:2211.10438), but wholly, and for outliers only. Moving half of it, or smoothing all
    channels, left more rows beyond the range, or less exact logits. Weights have a scale per
    output, which one channel of many hardly changes.

    Args:
        sample: Typical states, shape (rows, inputs).

    Returns:
        Shape (inputs,), 1 except for outliers; `None` if there are none.
    """
    reach = sample.float().abs().amax(dim=0)
    # Not finite if most channels are zero.
    reach = reach / reach.median()
    outliers = (reach > _OUTLIER_RATIO) & reach.isfinite()
    if not bool(outliers.any()):
        return None
    return torch.where(outliers, reach / _OUTLIER_RATIO, torch.ones_like(reach))
