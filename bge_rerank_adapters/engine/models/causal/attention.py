"""Attention of decoders over packs: each token attends to those before it in its own pair."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from bge_rerank_adapters.engine.models.layers.attention import (
    PROBE_LENGTHS,
    Group,
    Layout,
    agree,
    bounds_of,
    probe_states,
)
from bge_rerank_adapters.engine.models.layers.attention_check import Trial, first_right
from bge_rerank_adapters.engine.models.layers.one_call import (
    Kernel,
    Sight,
    kernels_for,
    takes_windows,
)
from bge_rerank_adapters.engine.models.layers.transfers import Integers, waiting_transfers
from bge_rerank_adapters.engine.text.pairs import TokenPair

# Rows are shared where that saves at least this part of them: repeating rows has a price as well.
_LEAST_SAVED = 0.05


@dataclass(frozen=True, slots=True)
class SharedRows:
    """Which rows of a pack need computing where pairs begin with the same tokens.

    A token of a decoder depends on those before it alone, so pairs that begin with one query have
    the same rows for it.

    Attributes:
        computed: Which of all rows are computed; int64, shape (computed rows,).
        repeated: For each of all rows its place among the computed ones; int64, shape (rows,).
    """

    computed: npt.NDArray[np.int64]
    repeated: npt.NDArray[np.int64]

    @classmethod
    def of(cls, pairs: Sequence[TokenPair]) -> Self | None:
        """Return the rows of a pack; `None` where next to nothing is shared."""
        firsts: dict[bytes, int] = {}
        source, start = [], 0
        for pair in pairs:
            rows = np.arange(start, start + len(pair), dtype=np.int64)
            query = pair.ids[: pair.document_start]
            first = firsts.setdefault(query.tobytes(), start)
            rows[: len(query)] += first - start
            source.append(rows)
            start += len(pair)
        rows = np.concatenate(source)
        computed, repeated = np.unique(rows, return_inverse=True)
        return cls(computed, repeated) if len(computed) <= (1 - _LEAST_SAVED) * start else None


class CausalLayout(Layout):
    """Where each pair of a pack begins and ends, and where each token stands in its pair.

    Pairs may share the rows of what they begin with: these are computed once, and repeated for
    attention alone. `bounds` and `groups` are of the rows with all repetitions.

    Attributes:
        last: Computed row of each pair's last token; int64, shape (n,).
        positions: Each computed row's position within its pair, counted from 0; int64,
            shape (computed rows,).
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device,
        *,
        shared: SharedRows | None = None,
        on_device: Sequence[Tensor] | None = None,
    ) -> None:
        """Take the lengths, in the order in which the pairs stand in the row.

        Args:
            lengths: Number of tokens of each pair.
            device: Where the model runs.
            shared: Which rows are computed; `None` is all.
            on_device: The tensors of `places`, where they are on the device already.
        """
        if on_device is None:
            on_device = waiting_transfers(device).upload(self.places(lengths, shared=shared))
        bounds, self.last, self.positions, *rows = on_device
        super().__init__(lengths, device, bounds=bounds)
        self._computed: Tensor | None
        self._repeated: Tensor | None
        self._computed, self._repeated = rows if rows else (None, None)

    @staticmethod
    def places(lengths: Sequence[int], *, shared: SharedRows | None = None) -> list[Integers]:
        """Return what a layout needs on the device, in an order of its own."""
        bounds = bounds_of(lengths)
        last = bounds[1:] - 1
        positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
        if shared is None:
            return [bounds, last, positions]
        last, positions = shared.repeated[last], positions[shared.computed]
        return [bounds, last, positions, shared.computed, shared.repeated]

    def computed(self, rows: Tensor) -> Tensor:
        """Return of rows with all repetitions those that are computed."""
        return rows if self._computed is None else rows[self._computed]

    def repeated(self, rows: Tensor) -> Tensor:
        """Return computed rows with all repetitions."""
        return rows if self._repeated is None else rows[self._repeated]


@dataclass(frozen=True, slots=True)
class Heads:
    """How a decoder's attention is cut into heads.

    Attributes:
        queries: Number of query heads.
        keys: Number of key and value heads; each serves `queries / keys` query heads.
        scale: Factor of the products of query and key.
        window: How many tokens a token sees, itself included; `None` is all before it.
    """

    queries: int
    keys: int
    scale: float
    window: int | None = None


# From query of shape (rows, queries * width) and key and value of shapes (rows, keys * width) to
# the attended values, shaped like the query; it has as many rows as key and value, or one per
# pair, which is the pair's last token's.
CausalAttention = Callable[[Tensor, Tensor, Tensor, Layout, Heads], Tensor]


def grouped_causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    heads: Heads,
    *,
    copied: bool = False,
) -> Tensor:
    """Attend by one call for each run of pairs of equal length; runs on any device.

    With `copied` torch's kernel is given contiguous copies that lie head by head.
    """
    single = len(query) != len(key)
    attended = torch.empty_like(query)
    begin = 0
    for group in layout.groups:
        rows = slice(group.start, group.start + group.pairs * group.tokens)
        asked = slice(begin, begin + group.pairs) if single else rows
        begin += group.pairs
        attended[asked] = _attend(query[asked], key[rows], value[rows], group, heads, copied=copied)
    return attended


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: Group,
    heads: Heads,
    *,
    copied: bool = False,
) -> Tensor:
    def split(rows: Tensor, number: int) -> Tensor:
        return rows.reshape(group.pairs, -1, number, rows.shape[-1] // number).transpose(1, 2)

    asked = split(query, heads.queries)
    keys, values = (_spread(split(rows, heads.keys), heads) for rows in (key, value))
    single = asked.shape[2] != group.tokens
    mask = None
    if heads.window is not None and heads.window < group.tokens:
        if single:
            keys, values = keys[:, :, -heads.window :], values[:, :, -heads.window :]
        else:
            mask = _window_mask(group.tokens, heads.window, query.device)
    if copied:
        asked, keys, values = asked.contiguous(), keys.contiguous(), values.contiguous()
    out = functional.scaled_dot_product_attention(
        asked,
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None and not single,
        scale=heads.scale,
    )
    return out.transpose(1, 2).reshape(query.shape)


def _spread(rows: Tensor, heads: Heads) -> Tensor:
    """Repeat each key head for the query heads that it serves, shape (pairs, queries, ...)."""
    return (
        rows
        if heads.keys == heads.queries
        else rows.repeat_interleave(heads.queries // heads.keys, dim=1)
    )


def _window_mask(tokens: int, window: int, device: torch.device) -> Tensor:
    """Return which tokens each token sees; bool, shape (tokens, tokens)."""
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    return seen.triu(1 - window)


def one_call_causal_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, heads: Heads, *, kernel: Kernel
) -> Tensor:
    """Attend by one call of a kernel for the whole pack."""
    single = len(query) != len(key)
    narrow = heads.window is not None and heads.window < layout.longest
    if narrow and not takes_windows(kernel):
        return grouped_causal_attention(query, key, value, layout, heads)
    out = kernel(
        query.reshape(len(query), heads.queries, -1),
        key.reshape(len(key), heads.keys, -1),
        value.reshape(len(value), heads.keys, -1),
        layout.spans(single=single),
        # A pair's last token sees all before it, so its row alone needs no more limits.
        Sight(heads.scale, causal=not single, window=heads.window if narrow else None),
    )
    return out.reshape(query.shape)


def checked_causal_attention(
    device: torch.device, dtype: torch.dtype, *, heads: Heads, width: int
) -> CausalAttention:
    """Return the fastest attention that is right on this device; see `first_right`."""
    ways = (
        causal_attention_for(device, dtype, heads=heads, width=width),
        partial(grouped_causal_attention, copied=True),
    )
    layout = CausalLayout(PROBE_LENGTHS, device)
    trial = Trial(heads.queries, heads.keys, width, heads.scale, causal=True, window=heads.window)
    place = first_right(
        [lambda *states, way=way: way(*states, layout, heads) for way in ways],
        trial,
        asked=layout.last,
        device=device,
        dtype=dtype,
    )
    return ways[place]


def causal_attention_for(
    device: torch.device, dtype: torch.dtype, *, heads: Heads, width: int
) -> CausalAttention:
    """Return the fastest attention that this device and dtype can run.

    Args:
        device: Where the model runs.
        dtype: Of its activations.
        heads: The model's.
        width: Of a head.
    """
    for kernel in kernels_for(device, dtype):
        if _works(kernel, device, dtype, heads=heads, width=width):
            return partial(one_call_causal_attention, kernel=kernel)
    return grouped_causal_attention


def _works(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, *, heads: Heads, width: int
) -> bool:
    """Return whether a kernel runs for such heads, and is right, on a small pack."""
    layout = CausalLayout(PROBE_LENGTHS, device)
    query, key, value = (
        probe_states(number * width, device, dtype, seed=seed)
        for seed, number in enumerate((heads.queries, heads.keys, heads.keys))
    )
    return agree(
        lambda asked: one_call_causal_attention(asked, key, value, layout, heads, kernel=kernel),
        lambda asked: grouped_causal_attention(asked, key, value, layout, heads),
        (query, query[layout.last]),
    )
