"""XLM-RoBERTa, RoBERTa and BERT cross-encoders, run on packs without any padding.

The tokens of all pairs of a pack stand in one row; only attention looks at where a pair begins
and ends. Architecture: `modeling_xlm_roberta.py` and `modeling_bert.py` of transformers 4 and 5,
whose numbers this gives to float32 rounding.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bge_rerank_adapters.engine.checkpoints.adapter import Adapter
from bge_rerank_adapters.engine.models.base import default_pack_tokens
from bge_rerank_adapters.engine.models.cpu.threads import ALONE, Helpers, in_one_thread
from bge_rerank_adapters.engine.models.encoder.calibration import SampleRun
from bge_rerank_adapters.engine.models.encoder.config import parse_config
from bge_rerank_adapters.engine.models.encoder.kit import choose_kit
from bge_rerank_adapters.engine.models.encoder.layer import EncoderLayer, LayerSource
from bge_rerank_adapters.engine.models.encoder.tensors import EncoderReader, check_tensors
from bge_rerank_adapters.engine.models.layers.attention import Layout
from bge_rerank_adapters.engine.models.lora import open_weights
from bge_rerank_adapters.engine.text.pairs import TokenIds, TokenPair


class EncoderModel:
    """A cross-encoder on one device.

    Attributes:
        config: What the checkpoint's `config.json` says.
        device: Where it runs.
        dtype: Of weights and activations; the head and the logits are float32 always. With int8,
            activations are of the fastest floating-point dtype, and so is all else where that is
            faster than 8-bit integers.
        streams: 1: it runs a pack as a whole.
        pack_tokens: Token budget of a pack that suits the device.
        kit: The layers, attention and streams that it runs with.
    """

    streams = 1

    def __init__(
        self,
        config: dict[str, Any],
        folder: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        adapter: Adapter | None = None,
        sample: Callable[[], Sequence[TokenPair]],
    ) -> None:
        """Load the weights.

        Args:
            config: The checkpoint's `config.json`.
            folder: Holds its safetensors.
            device: Where to run.
            dtype: A floating-point dtype, or int8.
            adapter: What is merged with the weights, if anything.
            sample: Gives pairs like those to come, which tell 8-bit layers what is ordinary.

        Raises:
            CheckpointError: Tensors are missing, damaged or of the wrong shape.
            UnsupportedCheckpointError: The model gives several labels instead of one logit.
        """
        self.config = parse_config(config, folder=folder)
        self.device, self.dtype = device, dtype
        self.pack_tokens = default_pack_tokens(device)
        with open_weights(folder, adapter) as weights:
            check_tensors(weights, self.config)
            self.kit = choose_kit(self.config, device, dtype)
            self._attend = self.kit.attention()
            self._load(EncoderReader(weights, self.config, device, self.kit.dtype), sample)

    @torch.inference_mode()
    def logits(self, pairs: Sequence[TokenPair], *, helpers: Helpers = ALONE) -> list[float]:
        """Return the logit of each pair of a pack.

        Args:
            pairs: n >= 1 pairs of at most `config.max_tokens` tokens; best in order of length,
                since neighbours of equal length share one attention call.
            helpers: Threads that take a share of each layer, where the kit's layers run in one
                thread.

        Returns:
            n floats, which are NaN or infinite where the model gives that.
        """
        count = len(pairs)
        pairs = [*pairs, *self._fillers(pairs)]
        layout = Layout([len(pair) for pair in pairs], self.device, helpers)
        states = self._embed(pairs)
        *layers, last = self._layers
        for layer in layers:
            attended = self._attend(*layer.project(states, layout), layout, self.config.heads)
            states = layer.after_attention(states, attended, layout)
        # The head reads the first token of each pair, so no other is computed further.
        first = states[layout.first]
        projected = last.project_last(states, first, layout)
        attended = self._attend(*projected, layout, self.config.heads)
        states = last.after_attention(first, attended, layout)
        logits: list[float] = self._head(states[:count].float()).squeeze(-1).tolist()
        return logits

    def _fillers(self, pairs: Sequence[TokenPair]) -> list[TokenPair]:
        """Return pairs of one token that bring a pack to the size that the kit asks for."""
        tokens = sum(map(len, pairs))
        filler = TokenPair(pairs[0].ids[:1], 1, truncated=False, index=0)
        return [filler] * (self.kit.pack_rows(tokens) - tokens)

    def _load(self, read: EncoderReader, sample: Callable[[], Sequence[TokenPair]]) -> None:
        config = self.config
        rows = {"word": config.vocabulary, "position": config.positions, "token_type": config.types}
        self._words, self._positions, self._types = (
            read.tensor(f"{config.prefix}.embeddings.{name}_embeddings.weight", (n, config.hidden))
            for name, n in rows.items()
        )
        self._embedding_norm = read.norm(
            f"{config.prefix}.embeddings.LayerNorm", self.kit.norm_dtype
        )
        self._layers: list[EncoderLayer]
        self._layers = self._int8_layers(read, sample()) if self.kit.int8 else self._layers_of(read)
        self._head = read.head()

    def _layers_of(self, read: EncoderReader) -> list[EncoderLayer]:
        return [self.kit.layer(self._source(read, index)) for index in range(self.config.layers)]

    def _int8_layers(self, read: EncoderReader, sample: Sequence[TokenPair]) -> list[EncoderLayer]:
        # Threads that share each of the sample's many small products wait for one another after
        # each, which takes ten times as long where other programs keep the CPU busy.
        return in_one_thread(lambda: self._calibrated_layers(read, sample))

    @torch.inference_mode()
    def _calibrated_layers(
        self, read: EncoderReader, sample: Sequence[TokenPair]
    ) -> list[EncoderLayer]:
        run = SampleRun(self.config, self._embed(sample), [len(pair) for pair in sample])
        layers = []
        for index in range(self.config.layers):
            source = self._source(read, index)
            layers.append(self.kit.layer(source._replace(sample=run.through(source.tensors))))
        return layers

    def _source(self, read: EncoderReader, index: int) -> LayerSource:
        tensors = read.layer_tensors(index, self.kit.tensor_dtype, norm_dtype=self.kit.norm_dtype)
        return LayerSource(tensors, last=read.is_last(index))

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
