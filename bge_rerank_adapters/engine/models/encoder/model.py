"""The forward pass of XLM-RoBERTa, RoBERTa and BERT cross-encoders on packs without padding.

The tokens of all pairs of a pack are concatenated; only attention needs to know where a pair begins
and ends. The results equal those of `modeling_xlm_roberta.py` and `modeling_bert.py` of
transformers 4 and 5 up to float32 rounding.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bge_rerank_adapters.engine.models.base import PendingLogits, default_pack_tokens
from bge_rerank_adapters.engine.models.cpu.threads import ALONE, Helpers, in_one_thread
from bge_rerank_adapters.engine.models.encoder.calibration import SampleRun, sample_pairs
from bge_rerank_adapters.engine.models.encoder.config import parse_config
from bge_rerank_adapters.engine.models.encoder.kit import choose_kit
from bge_rerank_adapters.engine.models.encoder.layer import EncoderLayer, LayerSource
from bge_rerank_adapters.engine.models.encoder.tensors import EncoderReader, check_tensors
from bge_rerank_adapters.engine.models.layers.attention import Layout, bounds_of
from bge_rerank_adapters.engine.models.layers.transfers import transfers_for
from bge_rerank_adapters.engine.models.lora import open_weights
from bge_rerank_adapters.engine.models.source import ModelSource
from bge_rerank_adapters.engine.text.pairs import TokenIds, TokenPair
from bge_rerank_adapters.engine.text.tokenizer import PairTokenizer


class EncoderModel:
    """A cross-encoder on one device.

    Attributes:
        config: The checkpoint's parsed config.
        device: Device it runs on.
        dtype: Dtype of weights and activations; the head is float32 always. With int8, activations
            have the fastest floating-point dtype, and so have weights if int8 is no faster.
        streams: 1: a pack runs as a whole.
        pack_tokens: Default token budget of a pack.
        runs_ahead: Whether `launch` returns before the device has finished.
        kit: The implementation of layers and attention.
    """

    streams = 1

    def __init__(self, source: ModelSource) -> None:
        """Load the weights.

        Raises:
            CheckpointError: Tensors are missing, damaged or of the wrong shape.
            UnsupportedCheckpointError: The model gives several labels instead of one logit.
        """
        self.config = parse_config(source.config, folder=source.folder)
        self.device, self.dtype = source.device, source.dtype
        self.pack_tokens = default_pack_tokens(self.device)
        self._transfers = transfers_for(self.device)
        self.runs_ahead = self._transfers.overlap
        with open_weights(source.folder, source.adapter) as weights:
            check_tensors(weights, self.config)
            self.kit = choose_kit(self.config, self.device, self.dtype)
            self._attend = self.kit.attention()
            read = EncoderReader(weights, self.config, self.device, self.kit.dtype)
            self._load(read, source.tokenizer)

    def logits(self, pairs: Sequence[TokenPair], *, helpers: Helpers = ALONE) -> list[float]:
        """Return the logit of each pair of a pack.

        Args:
            pairs: n >= 1 pairs of at most `config.max_tokens` tokens; best in order of length,
                since neighbours of equal length share one attention call.
            helpers: Threads that share the work of each layer, if the kit's layers do not use
                torch's.

        Returns:
            n floats, which are NaN or infinite where the model gives that.
        """
        return self.launch(pairs, helpers=helpers)()

    @torch.inference_mode()
    def launch(self, pairs: Sequence[TokenPair], *, helpers: Helpers = ALONE) -> PendingLogits:
        """Start a pack and return a function that waits for its logits; see `logits`.

        Nothing here waits for a device that runs asynchronously: all input is copied at once, and
        no size depends on what it computes.
        """
        count = len(pairs)
        pairs = [*pairs, *self._fillers(pairs)]
        lengths = [len(pair) for pair in pairs]
        *ids, bounds = self._transfers.upload([*self._ids(pairs), bounds_of(lengths)])
        layout = Layout(lengths, self.device, helpers, bounds=bounds)
        states = self._embed(ids)
        if (
            self._stack
            and helpers.size > 1
            and len(states) <= self.kit.small_pack(helpers.size).uneven
        ):
            states = self._stack(states, layout)
        else:
            states = self._layer_by_layer(states, layout)
        return self._transfers.download(self._head(states[:count].float()).squeeze(-1))

    def _layer_by_layer(self, states: Tensor, layout: Layout) -> Tensor:
        """Return the last layer's output for the pairs' first tokens, shape (n, hidden)."""
        *layers, last = self._layers
        for layer in layers:
            attended = self._attend(*layer.project(states, layout), layout, self.config.heads)
            states = layer.after_attention(states, attended, layout)
        # The head reads only the first token of each pair, so the others end here.
        first = states[layout.first]
        projected = last.project_last(states, first, layout)
        attended = self._attend(*projected, layout, self.config.heads)
        return last.after_attention(first, attended, layout)

    def _fillers(self, pairs: Sequence[TokenPair]) -> list[TokenPair]:
        """Return pairs of one token that fill a pack up to `kit.pack_rows`."""
        tokens = sum(map(len, pairs))
        filler = TokenPair(pairs[0].ids[:1], 1, truncated=False, index=0)
        return [filler] * (self.kit.pack_rows(tokens) - tokens)

    def _load(self, read: EncoderReader, tokenizer: PairTokenizer) -> None:
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
        if self.kit.int8:
            sample = tokenizer.tokenize(sample_pairs()).distinct
            self._layers = self._int8_layers(read, sample)
        else:
            self._layers = self._layers_of(read)
        self._stack = self.kit.stack(self._layers)
        self._head = read.head()

    def _layers_of(self, read: EncoderReader) -> list[EncoderLayer]:
        return [self.kit.layer(self._source(read, index)) for index in range(self.config.layers)]

    def _int8_layers(self, read: EncoderReader, sample: Sequence[TokenPair]) -> list[EncoderLayer]:
        # With several threads, each of the many small products would wait for the slowest thread,
        # which takes ten times as long if other programs keep the CPU busy.
        return in_one_thread(lambda: self._calibrated_layers(read, sample))

    @torch.inference_mode()
    def _calibrated_layers(
        self, read: EncoderReader, sample: Sequence[TokenPair]
    ) -> list[EncoderLayer]:
        states = self._embed(self._transfers.upload(self._ids(sample)))
        run = SampleRun(self.config, states, [len(pair) for pair in sample])
        layers = []
        for index in range(self.config.layers):
            source = self._source(read, index)
            layers.append(self.kit.layer(source._replace(sample=run.through(source.tensors))))
        return layers

    def _source(self, read: EncoderReader, index: int) -> LayerSource:
        tensors = read.layer_tensors(index, self.kit.tensor_dtype, norm_dtype=self.kit.norm_dtype)
        return LayerSource(tensors, last=read.is_last(index))

    def _ids(self, pairs: Sequence[TokenPair]) -> list[TokenIds]:
        """Return the word ids, position ids and any token type ids of a pack; shape (tokens,)."""
        ids = [np.concatenate([pair.ids for pair in pairs])]
        ids.append(np.concatenate([self._position_ids(pair) for pair in pairs]))
        if self.config.types > 1 and not self.config.counts_from_pad:
            ids.append(np.concatenate([_token_types(pair) for pair in pairs]))
        return ids

    def _embed(self, ids: Sequence[Tensor]) -> Tensor:
        """Return the sum of the embeddings of `_ids`, normed; shape (tokens, hidden)."""
        words, positions, *types = ids
        states = functional.embedding(words, self._words)
        states = states + functional.embedding(positions, self._positions)
        states = states + (functional.embedding(types[0], self._types) if types else self._types[0])
        return self._embedding_norm(states)

    def _position_ids(self, pair: TokenPair) -> TokenIds:
        if not self.config.counts_from_pad:
            return np.arange(len(pair), dtype=np.int64)
        # A literal "<pad>" in a text is the padding token. As in
        # create_position_ids_from_input_ids, it gets the padding position and is not counted.
        real = pair.ids != self.config.pad_id
        positions: TokenIds = np.cumsum(real, dtype=np.int64) * real + self.config.pad_id
        return positions


def _token_types(pair: TokenPair) -> TokenIds:
    return (np.arange(len(pair)) >= pair.document_start).astype(np.int64)
