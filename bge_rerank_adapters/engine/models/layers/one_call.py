"""Attention over a whole pack by one call of a kernel that knows where each pair begins and ends.

torch has three, all on CUDA alone: FlashAttention, for half types from compute capability 8.0 on,
as an operator of torch's own and, in newer releases, as a public function; and the
memory-efficient kernel, for float32 and older cards. The operators are private to torch, so each
is tried at load before it is used (`attention_for`, `causal_attention_for`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
# What FlashAttention's kernels in torch are built for.
_FLASH_CAPABILITY = (8, 0)


class Spans(NamedTuple):
    """Where the rows of each pair are.

    Attributes:
        queries: Bounds of each pair's rows of the query; int32, shape (pairs + 1,).
        keys: Likewise of key and value.
        most_queries: Most rows of the query that a pair has.
        most_keys: Likewise of key and value.
    """

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int


class Sight(NamedTuple):
    """What a token attends to in its pair.

    Attributes:
        scale: Factor of the products of query and key; `None` is one by the root of a head's width.
        causal: Whether it sees those before it alone, where the query has a row for each token.
        window: How many it sees then, itself included; `None` is all before it.
    """

    scale: float | None = None
    causal: bool = False
    window: int | None = None


# From query of shape (rows, heads, width), and key and value, whose heads may be fewer, to the
# attended values, shaped like the query.
Kernel = Callable[[Tensor, Tensor, Tensor, Spans, Sight], Tensor]


def flash(query: Tensor, key: Tensor, value: Tensor, spans: Spans, sight: Sight) -> Tensor:
    """Attend by FlashAttention's operator, which torch has since before 2.6."""
    left, right = _window(sight)
    out: Tensor = torch.ops.aten._flash_attention_forward(  # noqa: SLF001
        query,
        key,
        value,
        spans.queries,
        spans.keys,
        spans.most_queries,
        spans.most_keys,
        0.0,  # no dropout
        sight.causal,
        False,  # no mask for debugging
        scale=sight.scale,
        window_size_left=left,
        window_size_right=right,
    )[0]
    return out


def varlen(query: Tensor, key: Tensor, value: Tensor, spans: Spans, sight: Sight) -> Tensor:
    """Attend by the public function around the same kernel, which costs some more time a call."""
    # Imported here: torch before 2.10 lacks it.
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        query,
        key,
        value,
        spans.queries,
        spans.keys,
        spans.most_queries,
        spans.most_keys,
        scale=sight.scale,
        window_size=_window(sight),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    # A tuple only where more than the values is asked for.
    return cast(Tensor, out)


def efficient(query: Tensor, key: Tensor, value: Tensor, spans: Spans, sight: Sight) -> Tensor:
    """Attend by the memory-efficient kernel, which knows no window (`takes_windows`)."""
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = (rows.repeat_interleave(shared, dim=1) for rows in (key, value))
    out: Tensor = torch.ops.aten._efficient_attention_forward(  # noqa: SLF001
        query[None],
        key[None],
        value[None],
        None,  # nothing is added to the products
        spans.queries,
        spans.keys,
        spans.most_queries,
        spans.most_keys,
        0.0,  # no dropout
        # 1 is causal, counted from a pair's first token.
        int(sight.causal),
        scale=sight.scale,
    )[0]
    return out[0]


def takes_windows(kernel: Kernel) -> bool:
    """Return whether a kernel limits how many tokens are seen where it is told to."""
    return kernel is not efficient


def kernels_for(device: torch.device, dtype: torch.dtype) -> Sequence[Kernel]:
    """Return what may run on a device in a dtype, the fastest first; none on most devices."""
    if device.type != "cuda":
        return ()
    has_flash = torch.cuda.get_device_capability(device) >= _FLASH_CAPABILITY
    return (flash, varlen, efficient) if dtype in _HALF and has_flash else (efficient,)


def _window(sight: Sight) -> tuple[int, int]:
    """Return how many tokens are seen to the left and to the right, -1 for all of them."""
    left = -1 if sight.window is None else sight.window - 1
    return left, 0 if sight.causal or sight.window is not None else -1
