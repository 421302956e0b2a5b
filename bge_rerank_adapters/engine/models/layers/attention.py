"""Attention over packs: tokens attend within their pair, without a mask over the whole pack."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bge_rerank_adapters.engine.models.cpu.threads import ALONE, Helpers, in_one_thread
from bge_rerank_adapters.engine.models.layers.attention_check import (
    PROBE_LENGTHS,
    agree,
    probe_states,
)
from bge_rerank_adapters.engine.models.layers.one_call import (
    AttentionOptions,
    Kernel,
    Spans,
    kernels_for,
)
from bge_rerank_adapters.engine.models.layers.transfers import Integers


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring pairs of equal length: rows `start` to `start + pairs * tokens` of a pack."""

    start: int
    pairs: int
    tokens: int


class Layout:
    """Where each pair of a pack begins and ends.

    Attributes:
        lengths: Number of tokens of each of the n pairs.
        device: Device of the model.
        groups: Runs of pairs of equal length, which share one attention call.
        bounds: Row at which each pair begins, and the end of the last; int32, shape (n + 1,).
        first: Row of each pair's first token; int64, shape (n,).
        counts: 0 to n, which are the bounds if each pair has one query row; int32, shape (n + 1,).
        longest: The largest length.
        helpers: Threads that share the work of each layer, if its layers do not use torch's.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device,
        helpers: Helpers = ALONE,
        *,
        bounds: Tensor | None = None,
    ) -> None:
        """Lay out pairs in the order of their lengths.

        Args:
            lengths: Number of tokens of each pair.
            device: Device of the model.
            helpers: Threads that share the work of each layer.
            bounds: `bounds_of` the lengths, if they are on the device already.
        """
        self.lengths = list(lengths)
        self.device, self.helpers = device, helpers
        self.groups: list[Group] = []
        start = 0
        for tokens, run in groupby(self.lengths):
            pairs = len(list(run))
            self.groups.append(Group(start, pairs, tokens))
            start += pairs * tokens
        if bounds is None:
            bounds = torch.from_numpy(bounds_of(self.lengths)).to(device)
        self.bounds, self.first = bounds.int(), bounds[:-1]
        self.counts = torch.arange(len(self.lengths) + 1, dtype=torch.int32, device=device)
        self.longest = max(self.lengths)

    def spans(self, *, single: bool) -> Spans:
        """Return where the pairs' rows are; if `single`, the query has one row for each pair."""
        if single:
            return Spans(self.counts, self.bounds, 1, self.longest)
        return Spans(self.bounds, self.bounds, self.longest, self.longest)


def bounds_of(lengths: Sequence[int]) -> Integers:
    """Return the row at which each of n pairs begins, and the end of the last; shape (n + 1,)."""
    return np.cumsum([0, *lengths], dtype=np.int64)


# Shorter pairs use torch's fused kernel in any dtype.
_SHORT_TOKENS = 64
_ROWS_STEP = 32
# Length of the pair on which attention is timed, and how often; ten milliseconds at most.
_TIMED_TOKENS = 192
_TIMINGS = 6

# Maps query, key and value of shapes (rows, heads * width) to the output. The query has either as
# many rows as key and value, or one for each pair: that of its first token.
Attention = Callable[[Tensor, Tensor, Tensor, Layout, int], Tensor]


# Attends over the pairs of a group, all at once.
GroupAttention = Callable[[Tensor, Tensor, Tensor, Group], Tensor]


def by_groups(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, attend: GroupAttention
) -> Tensor:
    """Attend by one call for each group of pairs; the query has all rows, or one for each pair."""
    single = len(query) != len(key)
    attended = torch.empty_like(query)
    begin = 0
    for group in layout.groups:
        rows = slice(group.start, group.start + group.pairs * group.tokens)
        query_rows = slice(begin, begin + group.pairs) if single else rows
        begin += group.pairs
        attended[query_rows] = attend(query[query_rows], key[rows], value[rows], group)
    return attended


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    heads: int,
    *,
    copied: bool = False,
) -> Tensor:
    """Attend by one call for each group of pairs; runs on any device.

    If `copied`, torch's kernel gets contiguous copies of each head.
    """
    return by_groups(query, key, value, layout, attend=partial(_attend, heads=heads, copied=copied))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, group: Group, *, heads: int, copied: bool = False
) -> Tensor:
    def split(rows: Tensor) -> Tensor:
        states = rows.reshape(group.pairs, -1, heads, rows.shape[-1] // heads).transpose(1, 2)
        return states.contiguous() if copied else states

    out = functional.scaled_dot_product_attention(split(query), split(key), split(value))
    return out.transpose(1, 2).reshape(-1, query.shape[-1])


def product_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, heads: int
) -> Tensor:
    """Attend by plain matrix products, one pair at a time: for bfloat16 on some CPUs.

    On CPUs with AVX512 but no AMX, torch's fused kernel takes nearly twice as long as oneDNN's
    matrix products, which run here. With AMX it takes half as long. In float32, and for short
    pairs, both are equally fast.
    """
    if len(query) != len(key):
        return grouped_attention(query, key, value, layout, heads)
    attended = torch.empty_like(query)
    for group in layout.groups:
        end = group.start + group.pairs * group.tokens
        if group.tokens < _SHORT_TOKENS:
            rows = slice(group.start, end)
            attended[rows] = _attend(query[rows], key[rows], value[rows], group, heads=heads)
            continue
        for start in range(group.start, end, group.tokens):
            rows = slice(start, start + group.tokens)
            attended[rows] = _products(query[start:], key[start:], value[rows], heads)
    return attended


def _products(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Attend over one pair.

    oneDNN compiles and keeps code for each size of a product, so pairs are padded to a multiple of
    32 rows. Query and key are padded with the rows that follow, whose scores are not used; the
    value is padded with zeros, which add nothing to the output.

    Args:
        query: The pair's rows, and all after them.
        key: The same for the key.
        value: The rows of the pair only.
        heads: Number of attention heads.
    """
    tokens, hidden = value.shape
    rows = -(-tokens // _ROWS_STEP) * _ROWS_STEP

    def split(states: Tensor) -> Tensor:
        taken = states[:rows]
        if len(taken) < rows:
            taken = functional.pad(taken, (0, 0, 0, rows - len(taken)))
        return taken.view(rows, heads, -1).transpose(0, 1)

    # Copied, since oneDNN's product gains more from contiguous heads than the copy costs.
    keys = split(key).contiguous().transpose(1, 2)
    scores = torch.bmm(split(query) * (hidden // heads) ** -0.5, keys)
    scores[:, :, tokens:] = float("-inf")
    # softmax sums in float32, whatever the dtype.
    out = torch.bmm(torch.softmax(scores, dim=-1), split(value))
    return out[:, :tokens].transpose(0, 1).reshape(tokens, hidden)


def one_call_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, heads: int, *, kernel: Kernel
) -> Tensor:
    """Attend by one call of a kernel for the whole pack."""

    def split(rows: Tensor) -> Tensor:
        return rows.reshape(len(rows), heads, -1)

    spans = layout.spans(single=len(query) != len(key))
    return kernel(split(query), split(key), split(value), spans, AttentionOptions()).reshape(
        len(query), -1
    )


def attention_for(device: torch.device, dtype: torch.dtype, *, heads: int, width: int) -> Attention:
    """Return the fastest attention that this device and dtype can run.

    Args:
        device: Device of the model.
        dtype: Dtype of its activations.
        heads: Number of heads.
        width: Width of a head.
    """
    if device.type == "cpu" and dtype == torch.bfloat16:
        return product_attention if _products_win(heads, width) else grouped_attention
    for kernel in kernels_for(device, dtype):
        if _works(kernel, device, dtype, heads=heads, width=width):
            return partial(one_call_attention, kernel=kernel)
    return grouped_attention


@cache
def _products_win(heads: int, width: int) -> bool:
    """Return whether plain products are faster in bfloat16 here than torch's fused kernel.

    One is about twice as fast as the other, so a short timing always gives the same answer.
    """
    layout = Layout([_TIMED_TOKENS], torch.device("cpu"))
    states = torch.ones(_TIMED_TOKENS, 3 * heads * width, dtype=torch.bfloat16)
    query, key, value = states.chunk(3, dim=-1)

    def seconds(attend: Attention) -> float:
        begin = time.perf_counter()
        attend(query, key, value, layout, heads)
        return time.perf_counter() - begin

    def compare() -> bool:
        with torch.inference_mode():
            products, fused = (
                min(seconds(attend) for _ in range(_TIMINGS))
                for attend in (product_attention, grouped_attention)
            )
        return products < fused

    return in_one_thread(compare)


def _works(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, *, heads: int, width: int
) -> bool:
    """Return whether a kernel runs for such heads and gives correct values on a small pack."""
    layout = Layout(PROBE_LENGTHS, device)
    # Columns of one matrix, as a layer returns them.
    query, key, value = probe_states(3 * heads * width, device, dtype).chunk(3, dim=-1)
    return agree(
        lambda rows: one_call_attention(rows, key, value, layout, heads, kernel=kernel),
        lambda rows: grouped_attention(rows, key, value, layout, heads),
        (query, query[layout.first]),
    )
