"""Decoders, run on packs without any padding up to the layer whose logit is asked for.

The tokens of all pairs of a pack stand in one row, as in `encoder/model.py`. In the last layer that
is needed only each pair's last token is computed, and of its logits only the one that is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bge_rerank_adapters.engine.models.base import Coming, default_pack_tokens
from bge_rerank_adapters.engine.models.causal.attention import (
    CausalLayout,
    SharedRows,
    checked_causal_attention,
)
from bge_rerank_adapters.engine.models.causal.config import CausalConfig
from bge_rerank_adapters.engine.models.cpu.threads import ALONE, Helpers
from bge_rerank_adapters.engine.models.layers.activations import ACTIVATIONS
from bge_rerank_adapters.engine.models.layers.linear import Linear, linear_maker
from bge_rerank_adapters.engine.models.layers.norm import RmsNorm
from bge_rerank_adapters.engine.models.layers.transfers import transfers_for
from bge_rerank_adapters.engine.models.weights import Weights
from bge_rerank_adapters.engine.text.pairs import TokenPair
from bge_rerank_adapters.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class HeadRow:
    """The row of a head that gives the logit.

    Attributes:
        tensor: Name of the head's tensor.
        row: Which of its rows.
        rows: How many it has.
    """

    tensor: str
    row: int = 0
    rows: int = 1


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer.

    Attributes:
        attention_norm: Before the attention.
        query: From width h to that of all query heads.
        query_norm: Of each head of the query, where the model has such norms.
        key_value: To that of all keys, then all values.
        key_norm: Of each head of the key, likewise.
        attention_output: Back to width h.
        attention_end_norm: After the attention, where the model has such norms.
        feed_norm: Before the feed-forward block.
        gate_up: To twice the block's width: the gate, and what it lets through.
        down: Back to width h.
        feed_end_norm: After the block, where the model has such norms.
    """

    attention_norm: RmsNorm
    query: Linear
    query_norm: RmsNorm | None
    key_value: Linear
    key_norm: RmsNorm | None
    attention_output: Linear
    attention_end_norm: RmsNorm | None
    feed_norm: RmsNorm
    gate_up: Linear
    down: Linear
    feed_end_norm: RmsNorm | None


class CausalModel:
    """A decoder on one device, up to the layer whose output is read; the base of its families.

    Attributes:
        config: What the checkpoint's `config.json` says.
        device: Where it runs.
        dtype: Of weights and activations; norms and logits are computed in float32 always.
        depth: How many layers are run.
        streams: 1: it runs a pack as a whole.
        pack_tokens: Token budget of a pack that suits the device.
        runs_ahead: Whether `launch` leaves the work to the device and returns.
        transfers: Copies token ids to the device, and logits back.
        shares_queries: Whether the query of several pairs is computed once for all of them.
    """

    streams = 1
    shares_queries = True

    def __init__(
        self,
        config: CausalConfig,
        weights: Weights,
        *,
        device: torch.device,
        dtype: torch.dtype,
        depth: int,
        head: HeadRow,
    ) -> None:
        """Load the layers that are needed.

        Args:
            config: The checkpoint's.
            weights: Its open files.
            device: Where to run.
            dtype: A floating-point dtype.
            depth: How many layers to run, from 1 to the config's number.
            head: What gives the logit.

        Raises:
            CheckpointError: Tensors are missing, damaged or of the wrong shape.
        """
        self.config, self.device, self.dtype, self.depth = config, device, dtype, depth
        self.pack_tokens = default_pack_tokens(device)
        self.transfers = transfers_for(device)
        self.runs_ahead = self.transfers.overlap
        self._activation = ACTIVATIONS[config.activation]
        _check_last_layer(weights, config)
        read = CausalReader(weights, config, device, dtype)
        self._words = read.tensor("model.embed_tokens.weight", (config.vocabulary, config.hidden))
        self._norm = read.norm("model.norm")
        self._layers = [read.layer(index) for index in range(depth)]
        self._attend = checked_causal_attention(
            device, dtype, heads=config.heads(0), width=config.head_width
        )
        self._frequencies = config.rotary.frequencies(config.head_width).to(device)
        self._head = read.row(head.tensor, head.row, (head.rows, config.hidden))

    def logits(self, pairs: Sequence[TokenPair], *, helpers: Helpers = ALONE) -> list[float]:
        """Return the logit of each pair of a pack.

        Args:
            pairs: n >= 1 pairs; best in order of length, since neighbours of equal length share
                one attention call.
            helpers: Not needed: the layers use torch's threads.

        Returns:
            n floats, which are NaN or infinite where the model gives that.
        """
        return self.launch(pairs, helpers=helpers)()

    @torch.inference_mode()
    def launch(self, pairs: Sequence[TokenPair], *, helpers: Helpers = ALONE) -> Coming:
        """Begin with a pack, and return what gives its logits; arguments as of `logits`.

        Nothing here waits for a device that runs ahead.
        """
        del helpers
        raw = self.last_states(pairs).float() @ self._head
        return self.transfers.download(self.after_head(raw))

    def last_states(self, pairs: Sequence[TokenPair]) -> Tensor:
        """Return the normed output of each pair's last token; shape (n, hidden).

        Args:
            pairs: n >= 1 pairs.
        """
        return self.states_after((self.depth,), pairs)[0]

    def states_after(self, layers: Sequence[int], pairs: Sequence[TokenPair]) -> list[Tensor]:
        """Return the normed output of each pair's last token after each of the layers, in one pass.

        Args:
            layers: Numbers of layers run, ascending, the last at most `depth`.
            pairs: n >= 1 pairs.

        Returns:
            One tensor for each of the layers; shape (n, hidden).
        """
        shared = SharedRows.of(pairs) if self.shares_queries else None
        lengths = [len(pair) for pair in pairs]
        words = np.concatenate([pair.ids for pair in pairs])
        places = CausalLayout.places(lengths, shared=shared)
        ids, *on_device = self.transfers.upload([words, *places])
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
        """Return what a layer takes in; families that change tokens on the way do it here.

        Args:
            index: The layer's, counted from 0.
            states: Output of the layer before; shape (rows, hidden).
            layout: Of these rows.
            pairs: As they came in.
        """
        del index, pairs
        return states, layout

    def after_head(self, raw: Tensor) -> Tensor:
        """Return the logits for what the head gives; families that limit them do it here."""
        return raw

    def _embed(self, ids: Tensor) -> Tensor:
        # Rounded to the dtype first, as Gemma was trained (huggingface/transformers#29402);
        # MiniCPM's is a small whole number, or 1, which rounding leaves as it is.
        scale = torch.tensor(self.config.embedding_scale, dtype=self.dtype)
        return functional.embedding(ids, self._words) * scale

    def _run_layer(self, index: int, states: Tensor, layout: CausalLayout, *, last: bool) -> Tensor:
        """Return the layer's output: of all tokens, or of each pair's last in the last layer."""
        layer, config = self._layers[index], self.config
        normed = layer.attention_norm(states)
        key, value = layer.key_value(normed).chunk(2, dim=-1)
        key = _norm_heads(key, layer.key_norm)
        key = self._rotate(key, layout.positions, config.key_heads)
        positions = layout.positions
        if last:
            states, normed, positions = (each[layout.last] for each in (states, normed, positions))
        query = _norm_heads(layer.query(normed), layer.query_norm)
        query = self._rotate(query, positions, config.query_heads)
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

    def _rotate(self, rows: Tensor, positions: Tensor, heads: int) -> Tensor:
        """Turn each head of each row by its position; shape (rows, heads * width) as before."""
        angles = positions[:, None, None].float() * self._frequencies
        scale = self.config.rotary.scale
        cosine, sine = angles.cos() * scale, angles.sin() * scale
        first, second = rows.view(len(rows), heads, -1).float().chunk(2, dim=-1)
        turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
        return turned.to(rows.dtype).view(rows.shape)


def _norm_heads(rows: Tensor, norm: RmsNorm | None) -> Tensor:
    """Norm each head of each row; shape (rows, heads * width) as before."""
    if norm is None:
        return rows
    return norm(rows.view(len(rows), -1, len(norm.weight))).view(rows.shape)


def _check_last_layer(weights: Weights, config: CausalConfig) -> None:
    """Refuse to leave layers out by mistake: the model would run, and give other numbers."""
    beyond = f"model.layers.{config.layers}.mlp.down_proj.weight"
    if beyond in weights:
        raise CheckpointError(
            f"{weights.path} has the tensor {beyond}, but num_hidden_layers in config.json is "
            f"{config.layers}; config and weights are not of one checkpoint."
        )


@dataclass(frozen=True, slots=True)
class CausalReader:
    """Reads the parts of a decoder from its tensors."""

    weights: Weights
    config: CausalConfig
    device: torch.device
    dtype: torch.dtype

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor on the device."""
        stored = self.weights.tensor(name, shape)
        # Copied even where nothing changes: a view of the file would die with it.
        return stored.to(self.device, dtype or self.dtype, copy=True)

    def row(self, name: str, index: int, shape: tuple[int, ...]) -> Tensor:
        """Return a row of a tensor of this shape, in float32, without keeping the rest."""
        row = self.weights.tensor(name, shape)[index]
        return row.to(self.device, torch.float32, copy=True)

    def norm(self, name: str, *, width: int | None = None) -> RmsNorm:
        """Return a norm, in float32; over the width of a token's vector unless told another."""
        weight = self.tensor(f"{name}.weight", (width or self.config.hidden,), torch.float32)
        return RmsNorm(weight + float(self.config.norms_add_one), self.config.epsilon)

    def layer(self, index: int) -> _Layer:
        """Return a layer, counted from 0."""
        name, config = f"model.layers.{index}", self.config
        queries = config.query_heads * config.head_width
        keys = config.key_heads * config.head_width
        hidden, inner, after = config.hidden, config.intermediate, config.norms_after
        bias, output_bias, feed_bias = config.input_bias, config.output_bias, config.feed_bias
        return _Layer(
            attention_norm=self.norm(f"{name}.input_layernorm"),
            query=self._linear([f"{name}.self_attn.q_proj"], queries, hidden, bias=bias),
            query_norm=self._head_norm(f"{name}.self_attn.q_norm"),
            key_value=self._linear(
                [f"{name}.self_attn.k_proj", f"{name}.self_attn.v_proj"], keys, hidden, bias=bias
            ),
            key_norm=self._head_norm(f"{name}.self_attn.k_norm"),
            attention_output=self._linear(
                [f"{name}.self_attn.o_proj"], hidden, queries, bias=output_bias
            ),
            attention_end_norm=self.norm(f"{name}.post_attention_layernorm") if after else None,
            feed_norm=self.norm(
                f"{name}.pre_feedforward_layernorm" if after else f"{name}.post_attention_layernorm"
            ),
            gate_up=self._linear(
                [f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj"], inner, hidden, bias=feed_bias
            ),
            down=self._linear([f"{name}.mlp.down_proj"], hidden, inner, bias=feed_bias),
            feed_end_norm=self.norm(f"{name}.post_feedforward_layernorm") if after else None,
        )

    def _head_norm(self, name: str) -> RmsNorm | None:
        return self.norm(name, width=self.config.head_width) if self.config.head_norms else None

    def _linear(self, names: list[str], outputs: int, inputs: int, *, bias: bool) -> Linear:
        """Return layers of equal size side by side as one."""
        weight = torch.cat([self.tensor(f"{name}.weight", (outputs, inputs)) for name in names])
        shift = None
        if bias:
            shift = torch.cat([self.tensor(f"{name}.bias", (outputs,)) for name in names])
        return linear_maker(self.device, self.dtype)(weight, shift)
