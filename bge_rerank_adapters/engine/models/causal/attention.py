"""Causal attention over packs: each token attends to itself and earlier tokens of its pair."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from bge_rerank_adapters.engine.models.layers.attention import Group, Layout, bounds_of, by_groups
from bge_rerank_adapters.engine.models.layers.attention_check import (
    PROBE_LENGTHS,
    Trial,
    agree,
    first_correct,
    probe_states,
)
from bge_rerank_adapters.engine.models.layers.one_call import (
    AttentionOptions,
    Kernel,
    kernels_for,
    takes_windows,
)
from bge_rerank_adapters.engine.models.layers.transfers import Integers, waiting_transfers
from bge_rerank_adapters.engine.text.pairs import TokenPair

# Rows are shared if that saves at least this fraction of them, since repeating rows costs time.
_LEAST_SAVED = 0.05


@dataclass(frozen=True, slots=True)
class SharedRows:
    """Which rows of a pack are computed if pairs begin with the same tokens.

    A token of a decoder depends only on earlier tokens, so pairs with the same query have the same
    rows for it.

    Attributes:
        computed: Indices of the rows that are computed; int64, shape (computed rows,).
        repeated: For each row its index among the computed ones; int64, shape (rows,).
    """

    computed: npt.NDArray[np.int64]
    repeated: npt.NDArray[np.int64]

    @classmethod
    def of(cls, pairs: Sequence[TokenPair]) -> Self | None:
        """Return the rows of a pack; `None` if hardly any are shared."""
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
    """Where each pair of a pack begins and ends, and the position of each token in its pair.

    Pairs may share their first rows, which are then computed once and repeated only for attention.
    `bounds` and `groups` count the rows with repetitions.

    Attributes:
        last: Computed row of each pair's last token; int64, shape (n,).
        positions: Position of each computed row in its pair, counted from 0; int64,
            shape (computed rows,).
        turns: Cosine and sine of the rotary angles, once a layer has computed them.
    """

    turns: tuple[Tensor, Tensor] | None

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device,
        *,
        on_device: Sequence[Tensor] | None = None,
    ) -> None:
        """Lay out pairs in the order of their lengths.

        Args:
            lengths: Number of tokens of each pair.
            device: Device of the model.
            on_device: The tensors of `indices`, if they are on the device already; `None` is
                without shared rows.
        """
        if on_device is None:
            on_device = waiting_transfers(device).upload(self.indices(lengths))
        bounds, self.last, self.positions, *rows = on_device
        super().__init__(lengths, device, bounds=bounds)
        self.turns = None
        self._computed: Tensor | None
        self._repeated: Tensor | None
        self._computed, self._repeated = rows if rows else (None, None)

    @staticmethod
    def indices(lengths: Sequence[int], *, shared: SharedRows | None = None) -> list[Integers]:
        """Return the arrays that a layout needs on the device, in the order of `on_device`."""
        bounds = bounds_of(lengths)
        last = bounds[1:] - 1
        positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
        if shared is None:
            return [bounds, last, positions]
        last, positions = shared.repeated[last], positions[shared.computed]
        return [bounds, last, positions, shared.computed, shared.repeated]

    def computed(self, rows: Tensor) -> Tensor:
        """Return the computed rows out of rows with repetitions."""
        return rows if self._computed is None else rows[self._computed]

    def repeated(self, rows: Tensor) -> Tensor:
        """Return computed rows with repetitions."""
        return rows if self._repeated is None else rows[self._repeated]


@dataclass(frozen=True, slots=True)
class Heads:
    """The attention heads of a decoder.

    Attributes:
        queries: Number of query heads.
        keys: Number of key and value heads; each serves `queries / keys` query heads.
        scale: Factor of the attention scores.
        window: Number of tokens that a token attends to, itself included; `None` is no limit.
    """

    queries: int
    keys: int
    scale: float
    window: int | None = None


# Maps query (rows, queries * width), key and value (rows, keys * width) to the output, shaped like
# the query. The query has either as many rows as key and value, or one for each pair: that of its
# last token.
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
    """Attend by one call for each group of pairs; runs on any device.

    If `copied`, torch's kernel gets contiguous copies of each head.
    """
    return by_groups(query, key, value, layout, attend=partial(_attend, heads=heads, copied=copied))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: Group,
    *,
    heads: Heads,
    copied: bool = False,
) -> Tensor:
    def split(rows: Tensor, number: int) -> Tensor:
        return rows.reshape(group.pairs, -1, number, rows.shape[-1] // number).transpose(1, 2)

    queries = split(query, heads.queries)
    keys, values = (_repeat(split(rows, heads.keys), heads) for rows in (key, value))
    single = queries.shape[2] != group.tokens
    mask = None
    if heads.window is not None and heads.window < group.tokens:
        if single:
            keys, values = keys[:, :, -heads.window :], values[:, :, -heads.window :]
        else:
            mask = _window_mask(group.tokens, heads.window, query.device)
    if copied:
        queries, keys, values = queries.contiguous(), keys.contiguous(), values.contiguous()
    out = functional.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None and not single,
        scale=heads.scale,
    )
    return out.transpose(1, 2).reshape(query.shape)


def _repeat(rows: Tensor, heads: Heads) -> Tensor:
    """Repeat each key head for the query heads that it serves; shape (pairs, queries, ...)."""
    return (
        rows
        if heads.keys == heads.queries
        else rows.repeat_interleave(heads.queries // heads.keys, dim=1)
    )


def _window_mask(tokens: int, window: int, device: torch.device) -> Tensor:
    """Return which tokens each token attends to; bool, shape (tokens, tokens)."""
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril().triu(1 - window)


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
        # A pair's last token comes after all others, so it needs no causal mask.
        AttentionOptions(heads.scale, causal=not single, window=heads.window if narrow else None),
    )
    return out.reshape(query.shape)


def checked_causal_attention(
    device: torch.device, dtype: torch.dtype, *, heads: Heads, width: int
) -> CausalAttention:
    """Return the fastest attention that is correct on this device; see `first_correct`."""
    candidates = (
        causal_attention_for(device, dtype, heads=heads, width=width),
        partial(grouped_causal_attention, copied=True),
    )
    layout = CausalLayout(PROBE_LENGTHS, device)
    trial = Trial(heads.queries, heads.keys, width, heads.scale, causal=True, window=heads.window)
    index = first_correct(
        [lambda *states, attend=attend: attend(*states, layout, heads) for attend in candidates],
        trial,
        single_rows=layout.last,
        device=device,
        dtype=dtype,
    )
    return candidates[index]


def causal_attention_for(
    device: torch.device, dtype: torch.dtype, *, heads: Heads, width: int
) -> CausalAttention:
    """Return the fastest attention that this device and dtype can run.

    Args:
        device: Device of the model.
        dtype: Dtype of its activations.
        heads: The model's heads.
        width: Width of a head.
    """
    for kernel in kernels_for(device, dtype):
        if _works(kernel, device, dtype, heads=heads, width=width):
            return partial(one_call_causal_attention, kernel=kernel)
    return grouped_causal_attention


def _works(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, *, heads: Heads, width: int
) -> bool:
    """Return whether a kernel runs for such heads and gives correct values on a small pack."""
    layout = CausalLayout(PROBE_LENGTHS, device)
    query, key, value = (
        probe_states(number * width, device, dtype, seed=seed)
        for seed, number in enumerate((heads.queries, heads.keys, heads.keys))
    )
    return agree(
        lambda rows: one_call_causal_attention(rows, key, value, layout, heads, kernel=kernel),
        lambda rows: grouped_causal_attention(rows, key, value, layout, heads),
        (query, query[layout.last]),
    )
