"""Scores as torch's tensors, for a host whose users work with them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]


def named_activation(name: str | None) -> Activation:
    """Return the activation of a name such as `"torch.nn.modules.linear.Identity"`.

    Args:
        name: One of torch's; `None` is the sigmoid.
    """
    made: Activation = getattr(nn, "Sigmoid" if name is None else name.rpartition(".")[2])()
    return made


@torch.inference_mode()
def activated(logits: Sequence[float], activation: Any) -> Tensor:
    """Return what an activation makes of logits; float32, shape (n,).

    Args:
        logits: n >= 0 logits.
        activation: Gets them with shape (n, 1), as a model of one label gives them.
    """
    scores: Tensor = activation(torch.tensor(logits, dtype=torch.float32)[:, None])
    return scores.reshape(len(logits)).float()
