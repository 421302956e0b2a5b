"""Whether layers in 8-bit integers are worth their price on this CPU."""

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from bge_rerank_adapters.engine.models.cpu.onednn.int8 import Int8FeedForward, Int8Linear
from bge_rerank_adapters.engine.models.cpu.threads import in_one_thread
from bge_rerank_adapters.engine.models.layers.linear import Activation, FeedForward, linear_maker

# They cost some exactness, and near the limit a timing falls now here, now there.
_WORTHWHILE_SPEEDUP = 1.15
# Of the states that feed-forward blocks are timed on.
_TIMED_ROWS = 512


@cache
def int8_pays(
    dtype: torch.dtype,
    hidden: int = 768,
    intermediate: int = 3072,
    activation: Activation = functional.gelu,
) -> bool:
    """Return whether 8-bit layers are faster on this CPU than those of the fastest dtype.

    It is a timing, of a feed-forward block in one thread.

    Args:
        dtype: What `"auto"` resolves to.
        hidden: Width of the model; as the other sizes, bge-reranker-base's unless given.
        intermediate: Width of its feed-forward blocks.
        activation: Of these.
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
    """Return blocks of equal size of both kinds, and states for them."""
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
