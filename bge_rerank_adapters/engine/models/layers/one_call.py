"""Attention over a whole pack by one call of torch's kernels for sequences of variable length.

torch has three, all for CUDA: FlashAttention as a private operator and, in newer releases, as a
public function, for half types from compute capability 8.0 on; and the memory-efficient kernel,
for float32 and older GPUs. Since the operators are private, each is tried at load before it is
used (`attention_for`, `causal_attention_for`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
# Lowest compute capability that torch's FlashAttention supports.
_FLASH_CAPABILITY = (8, 0)


class Spans(NamedTuple):
    """Where the rows of each pair are.

    Attributes:
        queries: Row of the query at which each pair begins, and the end; int32, (pairs + 1,).
        keys: The same for key and value.
        max_queries: Maximum number of query rows of a pair.
        max_keys: The same for key and value.
    """

    queries: Tensor
    keys: Tensor
    max_queries: int
    max_keys: int


class AttentionOptions(NamedTuple):
    """How tokens attend within their pair.

    Attributes:
        scale: Factor of the attention scores; `None` is 1 / sqrt(head width).
        causal: Whether a token attends only to itself and earlier ones.
        window: Number of tokens it then attends to, itself included; `None` is no limit.
    """

    scale: float | None = None
    causal: bool = False
    window: int | None = None


# Maps query (rows, heads, width), key and value, which may have fewer heads, to the output, shaped
# like the query.
Kernel = Callable[[Tensor, Tensor, Tensor, Spans, AttentionOptions], Tensor]


def flash(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, options: AttentionOptions
) -> Tensor:
    """Attend by FlashAttention's private operator, in all supported releases of torch."""
    left, right = _window(options)
    out: Tensor = torch.ops.aten._flash_attention_forward(  # noqa: SLF001
        query,
        key,
        value,
        spans.queries,
        spans.keys,
        spans.max_queries,
        spans.max_keys,
        0.0,  # no dropout
        options.causal,
        False,  # no debug mask
        scale=options.scale,
        window_size_left=left,
        window_size_right=right,
    )[0]
    return out


def varlen(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, options: AttentionOptions
) -> Tensor:
    """Attend by the public function for the same kernel, whose calls take a little longer."""
    # Imported here: torch before 2.10 lacks it.
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        query,
        key,
        value,
        spans.queries,
        spans.keys,
        spans.max_queries,
        spans.max_keys,
        scale=options.scale,
        window_size=_window(options),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    # A tuple only if more than the values is requested.
    return cast(Tensor, out)


def efficient(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, options: AttentionOptions
) -> Tensor:
    """Attend by the memory-efficient kernel, which has no window (`takes_windows`)."""
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = (rows.repeat_interleave(shared, dim=1) for rows in (key, value))
    out: Tensor = torch.ops.aten._efficient_attention_forward(  # noqa: SLF001
        query[None],
        key[None],
        value[None],
        None,  # no bias
        spans.queries,
        spans.keys,
        spans.max_queries,
        spans.max_keys,
        0.0,  # no dropout
        # 1 is a causal mask that starts at a pair's first token.
        int(options.causal),
        scale=options.scale,
    )[0]
    return out[0]


def takes_windows(kernel: Kernel) -> bool:
    """Return whether a kernel supports a window."""
    return kernel is not efficient


def kernels_for(device: torch.device, dtype: torch.dtype) -> Sequence[Kernel]:
    """Return the kernels for a device and dtype, the fastest first; none on most devices."""
    if device.type != "cuda":
        return ()
    has_flash = torch.cuda.get_device_capability(device) >= _FLASH_CAPABILITY
    return (flash, varlen, efficient) if dtype in _HALF and has_flash else (efficient,)


def _window(options: AttentionOptions) -> tuple[int, int]:
    """Return how many tokens to the left and right are attended to, -1 for all of them."""
    left = -1 if options.window is None else options.window - 1
    return left, 0 if options.causal or options.window is not None else -1
