"""XLM-RoBERTa, RoBERTa and BERT cross-encoders, run on packs without any padding.

The tokens of all pairs of a pack stand in one row; only attention looks at where a pair begins
and ends. Architecture: `modeling_xlm_roberta.py` and `modeling_bert.py` of transformers 4 and 5,
whose numbers this gives to float32 rounding.
"""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bge_rerank_adapters.engine.models.cpu.amx.bfloat16 import (
    AmxLayer,
    amx_attention,
    amx_layer,
    amx_runs,
)
from bge_rerank_adapters.engine.models.cpu.amx.int8 import amx_int8_layer
from bge_rerank_adapters.engine.models.cpu.onednn.int8_layers import int8_layer, run_sample
from bge_rerank_adapters.engine.models.devices import default_pack_tokens, int8_pays, resolve_dtype
from bge_rerank_adapters.engine.models.encoder.config import parse_config
from bge_rerank_adapters.engine.models.encoder.layers import (
    EncoderReader,
    Layer,
    check_feed_forward,
    check_last_layer,
    check_one_label,
)
from bge_rerank_adapters.engine.models.layers.activations import ACTIVATIONS
from bge_rerank_adapters.engine.models.layers.attention import (
    Attention,
    Layout,
    attention_for,
    grouped_attention,
    overlapping_attention,
)
from bge_rerank_adapters.engine.models.layers.linear import few_sizes
from bge_rerank_adapters.engine.models.weights import open_weights
from bge_rerank_adapters.engine.text.tokenizer import TokenIds, TokenPair

_log = logging.getLogger(__name__)


class EncoderModel:
    """A cross-encoder on one device.

    Attributes:
        config: What the checkpoint's `config.json` says.
        device: Where it runs.
        dtype: Of weights and activations; the head and the logits are float32 always. With int8,
            activations are of the fastest floating-point dtype, and so is all else where that is
            faster than 8-bit integers.
        layer_dtype: What the layers are in: int8, or a floating-point dtype.
        own_kernels: Whether these are of this package's own kernels, for processors with AMX.
        streams: 1: it runs a pack as a whole.
        pack_tokens: Token budget of a pack that suits the device.
    """

    streams = 1

    def __init__(
        self,
        config: dict[str, Any],
        folder: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        sample: Callable[[], Sequence[TokenPair]],
    ) -> None:
        """Load the weights.

        Args:
            config: The checkpoint's `config.json`.
            folder: Holds its safetensors.
            device: Where to run.
            dtype: A floating-point dtype, or int8.
            sample: Gives pairs like those to come, which tell 8-bit layers what is ordinary.

        Raises:
            CheckpointError: Tensors are missing, damaged or of the wrong shape.
            UnsupportedCheckpointError: The model gives several labels instead of one logit.
        """
        self.config = parse_config(config, folder=folder)
        self.device, self.dtype = device, dtype
        self.pack_tokens = default_pack_tokens(device)
        compute = resolve_dtype("auto", device) if dtype == torch.int8 else dtype
        heads = self.config.heads
        width = self.config.hidden // heads
        self.own_kernels = amx_runs(self.config, device, compute)
        self._attend = (
            amx_attention
            if self.own_kernels
            else attention_for(device, compute, heads=heads, width=width)
        )
        with open_weights(folder) as weights:
            check_one_label(weights, self.config)
            check_last_layer(weights, self.config)
            check_feed_forward(weights, self.config)
            int8 = dtype == torch.int8 and self._int8_pays(compute)
            self.layer_dtype = dtype if int8 else compute
            self._load(
                EncoderReader(weights, self.config, device, compute), sample() if int8 else None
            )

    @torch.inference_mode()
    def logits(self, pairs: Sequence[TokenPair]) -> list[float]:
        """Return the logit of each pair of a pack.

        Args:
            pairs: n >= 1 pairs of at most `config.max_tokens` tokens; best in order of length,
                since neighbours of equal length share one attention call.

        Returns:
            n floats, which are NaN or infinite where the model gives that.
        """
        logits = self._run(pairs, self._attend)
        if self._attend is overlapping_attention and not all(map(math.isfinite, logits)):
            # What is not finite in one pair may have come into others.
            return self._run(pairs, grouped_attention)
        return logits

    def _run(self, pairs: Sequence[TokenPair], attend: Attention) -> list[float]:
        count = len(pairs)
        pairs = [*pairs, *self._fillers(pairs)]
        layout = Layout([len(pair) for pair in pairs], self.device)
        heads = self.config.heads
        states = self._embed(pairs)
        for layer in self._layers[:-1]:
            query, key, value = layer.project(states)
            states = layer.after_attention(states, attend(query, key, value, layout, heads))
        last = self._layers[-1]
        # The head reads the first token of each pair, so no other is computed further.
        first = states[layout.first]
        query, key, value = last.project_last(states, first)
        states = last.after_attention(first, attend(query, key, value, layout, heads))
        logits: list[float] = self._head(states[:count].float()).squeeze(-1).tolist()
        return logits

    def _fillers(self, pairs: Sequence[TokenPair]) -> list[TokenPair]:
        """Return pairs of one token that bring a pack on a processor to one of few sizes."""
        if self.device.type != "cpu" or self.own_kernels:
            return []
        tokens = sum(map(len, pairs))
        filler = TokenPair(pairs[0].ids[:1], 1, truncated=False, index=0)
        return [filler] * (few_sizes(tokens) - tokens)

    def _int8_pays(self, compute: torch.dtype) -> bool:
        config = self.config
        activation = ACTIVATIONS[config.activation]
        pays = (
            amx_runs(config, self.device, compute, int8=True)
            if self.own_kernels
            else int8_pays(compute, config.hidden, config.intermediate, activation)
        )
        if not pays:
            _log.info("8-bit layers are no faster than %s ones here, which run instead", compute)
        return pays

    def _load(self, read: EncoderReader, sample: Sequence[TokenPair] | None) -> None:
        config = self.config
        rows = {"word": config.vocabulary, "position": config.positions, "token_type": config.types}
        self._words, self._positions, self._types = (
            read.tensor(f"{config.prefix}.embeddings.{name}_embeddings.weight", (n, config.hidden))
            for name, n in rows.items()
        )
        self._embedding_norm = read.norm(f"{config.prefix}.embeddings.LayerNorm")
        self._layers: Sequence[Layer | AmxLayer]
        if sample is not None:
            self._layers = self._int8_layers(read, sample)
        elif self.own_kernels:
            self._layers = [amx_layer(read, index) for index in range(config.layers)]
        else:
            self._layers = [read.layer(index) for index in range(config.layers)]
        self._head = read.head()

    @torch.inference_mode()
    def _int8_layers(
        self, read: EncoderReader, sample: Sequence[TokenPair]
    ) -> Sequence[Layer | AmxLayer]:
        layout = Layout([len(pair) for pair in sample], self.device)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return grouped_attention(query, key, value, layout, self.config.heads)

        config, layers = self.config, []
        activation = ACTIVATIONS[config.activation]
        states = self._embed(sample)
        for index in range(config.layers):
            # Quantised from what is stored, not from what bfloat16 leaves of it.
            parts, last = read.layer_parts(index, torch.float32), read.is_last(index)
            sampled = run_sample(parts, activation, states, attend)
            layers.append(
                amx_int8_layer(parts, sampled, heads=config.heads, last=last)
                if self.own_kernels
                else int8_layer(parts, activation, sampled, last=last)
            )
            states = sampled.output
        return layers

    def _embed(self, pairs: Sequence[TokenPair]) -> Tensor:
        """Return the embeddings of all tokens in a row, shape (tokens, hidden)."""
        ids = np.concatenate([pair.ids for pair in pairs])
        positions = np.concatenate([self._position_ids(pair) for pair in pairs])
        states = functional.embedding(torch.from_numpy(ids).to(self.device), self._words)
        states = states + functional.embedding(
            torch.from_numpy(positions).to(self.device), self._positions
        )
        if self.config.types > 1 and not self.config.counts_from_pad:
            types = np.concatenate([_token_types(pair) for pair in pairs])
            states = states + functional.embedding(
                torch.from_numpy(types).to(self.device), self._types
            )
        else:
            states = states + self._types[0]
        return self._embedding_norm(states)

    def _position_ids(self, pair: TokenPair) -> TokenIds:
        if not self.config.counts_from_pad:
            return np.arange(len(pair), dtype=np.int64)
        # A literal "<pad>" in a text is read as the padding token: it keeps the padding position
        # and the count goes on after it, as create_position_ids_from_input_ids does.
        real = pair.ids != self.config.pad_id
        positions: TokenIds = np.cumsum(real, dtype=np.int64) * real + self.config.pad_id
        return positions


def _token_types(pair: TokenPair) -> TokenIds:
    return (np.arange(len(pair)) >= pair.document_start).astype(np.int64)
