"""Times whether layers in 8-bit integers are faster on this CPU."""

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from bge_rerank_adapters.engine.models.cpu.onednn.int8 import Int8FeedForward, Int8Linear
from bge_rerank_adapters.engine.models.cpu.threads import in_one_thread
from bge_rerank_adapters.engine.models.layers.linear import Activation, FeedForward, linear_maker

# A smaller gain is not worth the loss of exactness.
_WORTHWHILE_SPEEDUP = 1.15
# Rows of the states that feed-forward blocks are timed on.
_TIMED_ROWS = 512


@cache
def int8_pays(
    dtype: torch.dtype,
    hidden: int = 768,
    intermediate: int = 3072,
    activation: Activation = functional.gelu,
) -> bool:
    """Return whether 8-bit layers are faster on this CPU, by timing a feed-forward block.

    It is timed in one thread. The default sizes are bge-reranker-base's.

    Args:
        dtype: The dtype to compare with: what `"auto"` resolves to.
        hidden: Width of the model.
        intermediate: Width of its feed-forward blocks.
        activation: Their activation.
    """

    def seconds(block: Callable[[Tensor], Tensor], states: Tensor) -> float:
        begin = time.perf_counter()
        block(states)
        return time.perf_counter() - begin

    def compare() -> bool:
        plain, integers, states = _feed_forwards(dtype, hidden, intermediate, activation)
        with torch.inference_mode():
            plain_s, integers_s = (
                min(seconds(block, states) for _ in range(6)) for block in (plain, integers)
            )
        return integers_s < plain_s / _WORTHWHILE_SPEEDUP

    return in_one_thread(compare)


def _feed_forwards(
    dtype: torch.dtype, hidden: int, intermediate: int, activation: Activation
) -> tuple[FeedForward, Int8FeedForward, Tensor]:
    """Return feed-forward blocks of equal size of both kinds, and states for them."""
    generator = torch.Generator().manual_seed(0)
    sizes = (_TIMED_ROWS, hidden), (intermediate, hidden), (hidden, intermediate)
    states, up, down = (
        torch.randn(size, generator=generator, dtype=torch.float32) / 8 for size in sizes
    )
    states = states.to(dtype)
    up_bias, down_bias = (torch.zeros(size, dtype=torch.float32) for size in (intermediate, hidden))
    make = linear_maker(torch.device("cpu"), dtype)
    plain = FeedForward(
        make(up.to(dtype), up_bias.to(dtype), activation),
        make(down.to(dtype), down_bias.to(dtype)),
    )
    inner = activation(functional.linear(states, up.to(dtype)))
    integers = Int8FeedForward(
        Int8Linear(up, up_bias, activation, sample=states),
        Int8Linear(down, down_bias, sample=inner, after_gelu=True),
    )
    return plain, integers, states
