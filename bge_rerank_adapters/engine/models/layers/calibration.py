"""Which inputs of a layer reach so far that they are scaled before they become 8-bit integers."""

import torch
from torch import Tensor

# How many times as far as the median channel one may reach, beyond which it is divided.
_MOST_REACH = 2.0


def smoothing(sample: Tensor) -> Tensor | None:
    """Return what to divide each input of a layer by before it is quantised.

    What is large in a channel is moved into its weights, as in SmoothQuant (Xiao et al. 2022,
    arXiv:2211.10438), but wholly, and only where it would leave fewer steps for all others: with
    an equal share for both, or with all channels, more rows were beyond the range, or logits
    further off. Weights have a scale per output, which one channel of many hardly widens.

    Args:
        sample: States like those to come, shape (rows, inputs).

    Returns:
        Shape (inputs,), 1 for an ordinary channel; `None` if all are ordinary.
    """
    reach = sample.float().abs().amax(dim=0)
    # By zero, where most channels are silent, it is not finite.
    reach = reach / reach.median()
    outliers = (reach > _MOST_REACH) & reach.isfinite()
    if not bool(outliers.any()):
        return None
    return torch.where(outliers, reach / _MOST_REACH, torch.ones_like(reach))
