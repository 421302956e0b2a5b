"""Turns logits into tensors of scores, for hosts whose users expect tensors."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]


def named_activation(name: str | None) -> Activation:
    """Return the activation named like `"torch.nn.modules.linear.Identity"`.

    Args:
        name: The full name of a class of torch; `None` is the sigmoid.
    """
    made: Activation = getattr(nn, "Sigmoid" if name is None else name.rpartition(".")[2])()
    return made


@torch.inference_mode()
def activated(logits: Sequence[float], activation: Any) -> Tensor:
    """Return an activation of logits; float32, shape (n,).

    Args:
        logits: n >= 0 logits.
        activation: Called with shape (n, 1), the output shape of a model with one label.
    """
    scores: Tensor = activation(torch.tensor(logits, dtype=torch.float32)[:, None])
    return scores.reshape(len(logits)).float()
