"""Attention over packs: each pair attends to itself alone, without a mask over the whole row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring pairs of equal length in a pack: rows `start` to `start + pairs * tokens`."""

    start: int
    pairs: int
    tokens: int


class Layout:
    """Where each pair of a pack begins and ends.

    Attributes:
        lengths: Number of tokens of each of the n pairs.
        device: Where the model runs.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        """Take the lengths, in the order in which the pairs stand in the row."""
        self.lengths = list(lengths)
        self.device = device

    @cached_property
    def groups(self) -> list[Group]:
        """Runs of pairs of equal length, which one call can serve."""
        groups: list[Group] = []
        start = 0
        for tokens, run in groupby(self.lengths):
            pairs = len(list(run))
            groups.append(Group(start, pairs, tokens))
            start += pairs * tokens
        return groups

    @cached_property
    def bounds(self) -> Tensor:
        """Row at which each pair begins, and the end of the last; int32, shape (n + 1,)."""
        return torch.from_numpy(np.cumsum([0, *self.lengths], dtype=np.int32)).to(self.device)

    @cached_property
    def first(self) -> Tensor:
        """Row of each pair's first token; int64, shape (n,)."""
        return self.bounds[:-1].long()

    @cached_property
    def counts(self) -> Tensor:
        """0 to n; int32, shape (n + 1,): the bounds of rows of one query each."""
        return torch.arange(len(self.lengths) + 1, dtype=torch.int32, device=self.device)


# A megabyte or two of scores, as much as a core's own cache holds; measured best from 20 to 500
# tokens a pair.
_SCORES_AT_ONCE = 500_000

# From query, key and value of shapes (rows, heads * width) to the attended values; query has
# either as many rows as key and value, or one per pair, which is the pair's first token's.
Attention = Callable[[Tensor, Tensor, Tensor, Layout, int], Tensor]


def grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, heads: int
) -> Tensor:
    """Attend by one call for each run of pairs of equal length; runs on any device."""
    single = len(query) != len(key)
    attended = torch.empty_like(query)
    begin = 0
    for group in layout.groups:
        rows = slice(group.start, group.start + group.pairs * group.tokens)
        asked = slice(begin, begin + group.pairs) if single else rows
        begin += group.pairs
        attended[asked] = _attend(query[asked], key[rows], value[rows], group.pairs, heads)
    return attended


def _attend(query: Tensor, key: Tensor, value: Tensor, pairs: int, heads: int) -> Tensor:
    def split(rows: Tensor) -> Tensor:
        return rows.reshape(pairs, -1, heads, rows.shape[-1] // heads).transpose(1, 2)

    out = functional.scaled_dot_product_attention(split(query), split(key), split(value))
    return out.transpose(1, 2).reshape(-1, query.shape[-1])


def product_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, heads: int
) -> Tensor:
    """Attend by plain matrix products of few pairs at a time: for bfloat16 on a processor.

    There torch's fused kernel takes nearly twice as long as oneDNN's own products, which run here;
    in float32 it is as fast. What a softmax reads stays in the cache, since no more pairs are
    taken at once than have so many scores.
    """
    single = len(query) != len(key)
    attended = torch.empty_like(query)
    begin = 0
    for group in layout.groups:
        asked = 1 if single else group.tokens
        at_once = max(1, _SCORES_AT_ONCE // (heads * asked * group.tokens))
        for first in range(0, group.pairs, at_once):
            pairs = min(at_once, group.pairs - first)
            rows = slice(
                group.start + first * group.tokens, group.start + (first + pairs) * group.tokens
            )
            end = begin + pairs * asked
            attended[begin:end] = _products(query[begin:end], key[rows], value[rows], pairs, heads)
            begin = end
    return attended


def _products(query: Tensor, key: Tensor, value: Tensor, pairs: int, heads: int) -> Tensor:
    width = query.shape[-1] // heads

    def split(rows: Tensor) -> Tensor:
        by_head = rows.reshape(pairs, -1, heads, width).transpose(1, 2)
        return by_head.reshape(pairs * heads, -1, width)

    scores = torch.bmm(split(query * width**-0.5), split(key).transpose(1, 2))
    # It sums in float32, whatever the dtype.
    weights = torch.softmax(scores, dim=-1)
    out = torch.bmm(weights, split(value)).reshape(pairs, heads, -1, width)
    return out.transpose(1, 2).reshape(-1, query.shape[-1])


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, heads: int
) -> Tensor:
    """Attend by one call for the whole pack; CUDA in half precision alone."""
    # Imported here: torch before 2.10 lacks it.
    from torch.nn.attention.varlen import varlen_attn

    def split(rows: Tensor) -> Tensor:
        return rows.reshape(len(rows), heads, -1)

    single = len(query) != len(key)
    longest = max(layout.lengths)
    out = varlen_attn(
        split(query),
        split(key),
        split(value),
        layout.counts if single else layout.bounds,
        layout.bounds,
        1 if single else longest,
        longest,
    )
    # A tuple only where more than the values is asked for.
    return cast(Tensor, out).reshape(len(query), -1)


def attention_for(device: torch.device, dtype: torch.dtype) -> Attention:
    """Return the fastest attention that this device and dtype can run."""
    half = dtype in (torch.float16, torch.bfloat16)
    if device.type == "cpu" and dtype == torch.bfloat16:
        return product_attention
    if device.type != "cuda" or not half or torch.cuda.get_device_capability(device) < (8, 0):
        return grouped_attention
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return grouped_attention
    return varlen_attention
