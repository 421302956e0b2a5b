"""The forward pass of decoders on packs without padding, up to the layer whose logit is read.

The tokens of all pairs of a pack are concatenated, as in `encoder/model.py`. The last layer that
runs computes only each pair's last token, and the head only the logit that is read.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bge_rerank_adapters.engine.models.base import PendingLogits, default_pack_tokens
from bge_rerank_adapters.engine.models.causal.attention import (
    CausalLayout,
    SharedRows,
    checked_causal_attention,
)
from bge_rerank_adapters.engine.models.causal.tensors import CausalReader, HeadRow
from bge_rerank_adapters.engine.models.cpu.threads import ALONE, Helpers
from bge_rerank_adapters.engine.models.layers.activations import ACTIVATIONS
from bge_rerank_adapters.engine.models.layers.norm import RmsNorm
from bge_rerank_adapters.engine.models.layers.transfers import transfers_for
from bge_rerank_adapters.engine.text.pairs import TokenPair


class CausalModel:
    """Base class of the decoder families: a decoder on one device, up to a layer.

    Attributes:
        config: The checkpoint's parsed config.
        device: Device it runs on.
        dtype: Dtype of weights and activations; norms and logits are computed in float32 always.
        depth: Number of layers that run.
        streams: 1: a pack runs as a whole.
        pack_tokens: Default token budget of a pack.
        runs_ahead: Whether `launch` returns before the device has finished.
        transfers: Copies token ids to the device, and logits back.
        shares_queries: Whether pairs with the same query share the rows computed for it.
    """

    streams = 1
    shares_queries = True

    def __init__(self, read: CausalReader, *, depth: int, head: HeadRow) -> None:
        """Load the first `depth` layers.

        Args:
            read: Reads the checkpoint; its dtype is a floating-point dtype.
            depth: Number of layers to run, from 1 to the config's number.
            head: The row that gives the logit.

        Raises:
            CheckpointError: Tensors are missing, damaged or of the wrong shape.
        """
        self.config = config = read.config
        self.device, self.dtype, self.depth = read.device, read.dtype, depth
        self.pack_tokens = default_pack_tokens(self.device)
        self.transfers = transfers_for(self.device)
        self.runs_ahead = self.transfers.overlap
        self._activation = ACTIVATIONS[config.activation]
        beyond = f"{read.inner}layers.{config.layers}.mlp.down_proj.weight"
        read.weights.check_absent(beyond, layers=config.layers)
        self._words = read.words()
        self._norm = read.norm(f"{read.inner}norm")
        self._layers = [read.layer(index) for index in range(depth)]
        self._attend = checked_causal_attention(
            self.device, self.dtype, heads=config.heads(0), width=config.head_width
        )
        self._frequencies = config.rotary.frequencies(config.head_width).to(self.device)
        self._head = read.row(head.tensor, head.row, (head.rows, config.hidden))

    def logits(self, pairs: Sequence[TokenPair], *, helpers: Helpers = ALONE) -> list[float]:
        """Return the logit of each pair of a pack.

        Args:
            pairs: n >= 1 pairs; best in order of length, since neighbours of equal length share
                one attention call.
            helpers: Ignored: the layers use torch's threads.

        Returns:
            n floats, which are NaN or infinite where the model gives that.
        """
        return self.launch(pairs, helpers=helpers)()

    @torch.inference_mode()
    def launch(self, pairs: Sequence[TokenPair], *, helpers: Helpers = ALONE) -> PendingLogits:
        """Start a pack and return a function that waits for its logits; see `logits`.

        Nothing here waits for a device that runs asynchronously.
        """
        del helpers
        raw = self.last_states(pairs).float() @ self._head
        return self.transfers.download(self.after_head(raw))

    def last_states(self, pairs: Sequence[TokenPair]) -> Tensor:
        """Return the final hidden state of each pair's last token, normed; shape (n, hidden).

        Args:
            pairs: n >= 1 pairs.
        """
        return self.states_after((self.depth,), pairs)[0]

    def states_after(self, layers: Sequence[int], pairs: Sequence[TokenPair]) -> list[Tensor]:
        """Return each pair's last token after several layers, normed, in one pass.

        Args:
            layers: Numbers of layers to run, ascending; the last is at most `depth`.
            pairs: n >= 1 pairs.

        Returns:
            One tensor for each of the layers; shape (n, hidden).
        """
        shared = SharedRows.of(pairs) if self.shares_queries else None
        lengths = [len(pair) for pair in pairs]
        words = np.concatenate([pair.ids for pair in pairs])
        indices = CausalLayout.indices(lengths, shared=shared)
        ids, *on_device = self.transfers.upload([words, *indices])
        layout = CausalLayout(lengths, self.device, on_device=on_device)
        states, found = layout.computed(self._embed(ids)), []
        for index in range(layers[-1]):
            if index in layers:
                found.append(self._norm(states[layout.last]))
            states, layout = self.before_layer(index, states, layout, pairs)
            states = self._run_layer(index, states, layout, last=index == layers[-1] - 1)
        return [*found, self._norm(states)]

    def before_layer(
        self, index: int, states: Tensor, layout: CausalLayout, pairs: Sequence[TokenPair]
    ) -> tuple[Tensor, CausalLayout]:
        """Return the input of a layer; overridden by families that compress tokens.

        Args:
            index: Index of the layer, counted from 0.
            states: Output of the layer before; shape (rows, hidden).
            layout: Layout of these rows.
            pairs: The pairs of the pack, uncompressed.
        """
        del index, pairs
        return states, layout

    def after_head(self, raw: Tensor) -> Tensor:
        """Return the logits for the head's output; overridden by families that cap them."""
        return raw

    def _embed(self, ids: Tensor) -> Tensor:
        # Gemma was trained with the scale rounded to the dtype (huggingface/transformers#29402).
        # Rounding changes no other model's scale, which is a small integer.
        scale = torch.tensor(self.config.embedding_scale, dtype=self.dtype)
        return functional.embedding(ids, self._words) * scale

    def _run_layer(self, index: int, states: Tensor, layout: CausalLayout, *, last: bool) -> Tensor:
        """Return the layer's output, only for each pair's last token if `last`."""
        layer, config = self._layers[index], self.config
        normed = layer.attention_norm(states)
        key, value = layer.key_value(normed).chunk(2, dim=-1)
        key = _norm_heads(key, layer.key_norm)
        cosine, sine = self._turns(layout)
        key = _rotate(key, cosine, sine, heads=config.key_heads)
        if last:
            states, normed, cosine, sine = (
                each[layout.last] for each in (states, normed, cosine, sine)
            )
        query = _norm_heads(layer.query(normed), layer.query_norm)
        query = _rotate(query, cosine, sine, heads=config.query_heads)
        if not last:
            query = layout.repeated(query)
        key, value = layout.repeated(key), layout.repeated(value)
        attended = self._attend(query, key, value, layout, config.heads(index))
        if not last:
            attended = layout.computed(attended)
        states = self._add(states, layer.attention_output(attended), layer.attention_end_norm)
        gate, up = layer.gate_up(layer.feed_norm(states)).chunk(2, dim=-1)
        fed = layer.down(self._activation(gate) * up)
        return self._add(states, fed, layer.feed_end_norm)

    def _add(self, states: Tensor, change: Tensor, norm: RmsNorm | None) -> Tensor:
        change = change if norm is None else norm(change)
        return states + change * self.config.residual_scale

    def _turns(self, layout: CausalLayout) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of each row's angles, scaled; float32, shape (rows, 1, width / 2).

        All layers of a layout share them.
        """
        if layout.turns is None:
            angles = layout.positions[:, None, None].float() * self._frequencies
            scale = self.config.rotary.scale
            layout.turns = angles.cos() * scale, angles.sin() * scale
        return layout.turns


def _rotate(rows: Tensor, cosine: Tensor, sine: Tensor, *, heads: int) -> Tensor:
    """Apply rotary position embeddings; shape (rows, heads * width) as before."""
    first, second = rows.view(len(rows), heads, -1).float().chunk(2, dim=-1)
    rotated = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
    return rotated.to(rows.dtype).view(rows.shape)


def _norm_heads(rows: Tensor, norm: RmsNorm | None) -> Tensor:
    """Norm each head of each row; shape (rows, heads * width) as before."""
    if norm is None:
        return rows
    return norm(rows.view(len(rows), -1, len(norm.weight))).view(rows.shape)
