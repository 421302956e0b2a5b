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
    probe_states,
)
from bge_rerank_adapters.engine.models.layers.attention_check import Trial, first_right
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
        self, lengths: Sequence[int], device: torch.device, *, shared: SharedRows | None = None
    ) -> None:
        """Take the lengths, in the order in which the pairs stand in the row.

        Args:
            lengths: Number of tokens of each pair.
            device: Where the model runs.
            shared: Which rows are computed; `None` is all.
        """
        super().__init__(lengths, device)
        last = np.cumsum(self.lengths, dtype=np.int64) - 1
        positions = np.concatenate([np.arange(each, dtype=np.int64) for each in self.lengths])
        self._computed = self._repeated = None
        if shared is not None:
            last, positions = shared.repeated[last], positions[shared.computed]
            self._computed = torch.from_numpy(shared.computed).to(device)
            self._repeated = torch.from_numpy(shared.repeated).to(device)
        self.last = torch.from_numpy(last).to(device)
        self.positions = torch.from_numpy(positions).to(device)

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


def varlen_causal_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, heads: Heads
) -> Tensor:
    """Attend by one call for the whole pack; CUDA in half precision alone."""
    # Imported here: torch before 2.10 lacks it.
    from torch.nn.attention.varlen import varlen_attn

    single = len(query) != len(key)
    longest = max(layout.lengths)
    out = varlen_attn(
        query.reshape(len(query), heads.queries, -1),
        key.reshape(len(key), heads.keys, -1),
        value.reshape(len(value), heads.keys, -1),
        layout.counts if single else layout.bounds,
        layout.bounds,
        1 if single else longest,
        longest,
        scale=heads.scale,
        # Tokens seen to the left and to the right, the token itself not counted.
        window_size=(-1 if heads.window is None else heads.window - 1, 0),
        enable_gqa=heads.keys != heads.queries,
    )
    # A tuple only where more than the values is asked for.
    attended: Tensor = out[0] if isinstance(out, tuple) else out
    return attended.reshape(query.shape)


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
    half = dtype in (torch.float16, torch.bfloat16)
    if device.type != "cuda" or not half or torch.cuda.get_device_capability(device) < (8, 0):
        return grouped_causal_attention
    if _varlen_works(device, dtype, heads, width):
        return varlen_causal_attention
    return grouped_causal_attention


def _varlen_works(device: torch.device, dtype: torch.dtype, heads: Heads, width: int) -> bool:
    """Return whether the one call runs for such heads, and is right, on a small pack."""
    layout = CausalLayout(PROBE_LENGTHS, device)
    query, key, value = (
        probe_states(number * width, device, dtype, seed=seed)
        for seed, number in enumerate((heads.queries, heads.keys, heads.keys))
    )
    return agree(
        lambda asked: varlen_causal_attention(asked, key, value, layout, heads),
        lambda asked: grouped_causal_attention(asked, key, value, layout, heads),
        (query, query[layout.last]),
    )
