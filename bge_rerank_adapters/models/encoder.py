"""XLM-RoBERTa, RoBERTa and BERT cross-encoders, run on packs without any padding.

The tokens of all pairs of a pack stand in one row; only attention looks at where a pair begins
and ends. Architecture: `modeling_xlm_roberta.py` and `modeling_bert.py` of transformers 4 and 5,
whose numbers this gives to float32 rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bge_rerank_adapters.errors import CheckpointError, UnsupportedCheckpointError
from bge_rerank_adapters.models.activations import ACTIVATIONS
from bge_rerank_adapters.models.attention import Layout, attention_for
from bge_rerank_adapters.models.devices import resolve_dtype
from bge_rerank_adapters.models.linear import (
    Activation,
    Int8Linear,
    Linear,
    PlainLinear,
    few_sizes,
    linear_maker,
    smoothing,
)
from bge_rerank_adapters.models.weights import Weights, open_weights
from bge_rerank_adapters.tokenization import TokenIds, TokenPair


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """What of `config.json` decides how an encoder is computed.

    Attributes:
        prefix: What the names of the encoder's tensors begin with.
        layers: Number of layers.
        hidden: Width of a token's vector.
        heads: Number of attention heads.
        intermediate: Width inside a feed-forward block.
        vocabulary: Number of rows of the word embeddings.
        positions: Number of rows of the position embeddings.
        types: Number of rows of the token type embeddings.
        epsilon: Of every layer norm.
        activation: Name of the feed-forward block's activation.
        pad_id: Id of the padding token; RoBERTa counts positions from the one after it.
        counts_from_pad: Whether it does so; BERT counts from 0.
    """

    prefix: str
    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocabulary: int
    positions: int
    types: int
    epsilon: float
    activation: str
    pad_id: int
    counts_from_pad: bool

    @property
    def max_tokens(self) -> int:
        """Most tokens of a pair that the positions allow."""
        return self.positions - self.pad_id - 1 if self.counts_from_pad else self.positions


# Model type to the prefix of its tensors, and whether positions count from the pad id.
_ARCHITECTURES = {
    "xlm-roberta": ("roberta", True),
    "roberta": ("roberta", True),
    "camembert": ("roberta", True),
    "bert": ("bert", False),
}


ENCODER_TYPES = tuple(_ARCHITECTURES)


def parse_config(config: dict[str, Any], *, folder: Path) -> EncoderConfig:
    """Return the parts of `config.json` that matter.

    Raises:
        CheckpointError: An entry is missing or of the wrong type.
        UnsupportedCheckpointError: The activation or the kind of positions is not known.
    """
    prefix, counts_from_pad = _ARCHITECTURES[config["model_type"]]
    try:
        parsed = EncoderConfig(
            prefix=prefix,
            layers=int(config["num_hidden_layers"]),
            hidden=int(config["hidden_size"]),
            heads=int(config["num_attention_heads"]),
            intermediate=int(config["intermediate_size"]),
            vocabulary=int(config["vocab_size"]),
            positions=int(config["max_position_embeddings"]),
            types=int(config["type_vocab_size"]),
            epsilon=float(config.get("layer_norm_eps", 1e-12)),
            activation=str(config.get("hidden_act", "gelu")),
            pad_id=int(config.get("pad_token_id", 1 if counts_from_pad else 0)),
            counts_from_pad=counts_from_pad,
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: missing or unusable: {error}.") from error
    _check_sizes(parsed, folder / "config.json")
    if parsed.activation not in ACTIVATIONS:
        raise UnsupportedCheckpointError(
            f"{folder / 'config.json'}: hidden_act {parsed.activation!r} is not known; "
            f"supported are {', '.join(ACTIVATIONS)}."
        )
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise UnsupportedCheckpointError(
            f"{folder / 'config.json'}: position_embedding_type must be 'absolute', "
            f"got {config['position_embedding_type']!r}."
        )
    return parsed


def _check_sizes(config: EncoderConfig, path: Path) -> None:
    """Refuse numbers that no model has, which would fail or give nonsense once it runs."""
    heads = config.heads
    rules = (
        ("num_hidden_layers", config.layers, "at least 1", config.layers >= 1),
        ("num_attention_heads", heads, "at least 1", heads >= 1),
        (
            "hidden_size",
            config.hidden,
            f"a multiple of num_attention_heads ({heads})",
            config.hidden >= 1 and config.hidden % max(1, heads) == 0,
        ),
        ("pad_token_id", config.pad_id, "at least 0", config.pad_id >= 0),
        (
            "max_position_embeddings",
            config.positions,
            "enough for a text",
            config.max_tokens >= 1,
        ),
        ("type_vocab_size", config.types, "at least 1", config.types >= 1),
        ("layer_norm_eps", config.epsilon, "from 0 to 1", 0.0 <= config.epsilon <= 1.0),
    )
    for name, value, rule, is_kept in rules:
        if not is_kept:
            raise CheckpointError(f"{path}: {name} must be {rule}, got {value}.")


@dataclass(frozen=True, slots=True)
class _Norm:
    weight: Tensor
    bias: Tensor
    epsilon: float

    def __call__(self, states: Tensor) -> Tensor:
        return functional.layer_norm(
            states, self.weight.shape, self.weight, self.bias, self.epsilon
        )


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer.

    Attributes:
        projections: One that gives query, key and value side by side, of width 3h; in the last
            layer one for the query and one for key and value, since there the only queries are
            those of the pairs' first tokens.
        attention_output: From the attended values back to width h.
        attention_norm: After the first residual sum.
        up: To the feed-forward block's width, its activation included.
        down: Back to width h.
        output_norm: After the second residual sum.
    """

    projections: tuple[Linear, ...]
    attention_output: Linear
    attention_norm: _Norm
    up: Linear
    down: Linear
    output_norm: _Norm


class EncoderModel:
    """A cross-encoder on one device.

    Attributes:
        config: What the checkpoint's `config.json` says.
        device: Where it runs.
        dtype: Of weights and activations; the head and the logits are float32 always. With int8,
            activations are of the fastest floating-point dtype.
    """

    def __init__(
        self, config: dict[str, Any], folder: Path, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Load the weights.

        Args:
            config: The checkpoint's `config.json`.
            folder: Holds its safetensors.
            device: Where to run.
            dtype: A floating-point dtype, or int8.

        Raises:
            CheckpointError: Tensors are missing, damaged or of the wrong shape.
            UnsupportedCheckpointError: The model gives several labels instead of one logit.
        """
        self.config = parse_config(config, folder=folder)
        self.device, self.dtype = device, dtype
        compute = resolve_dtype("auto", device) if dtype == torch.int8 else dtype
        heads = self.config.heads
        width = self.config.hidden // heads
        self._attend = attention_for(device, compute, heads=heads, width=width)
        with open_weights(folder) as weights:
            check_one_label(weights, self.config)
            _check_last_layer(weights, self.config)
            self._load(_Reader(weights, self.config, device, compute, int8=dtype == torch.int8))

    @torch.inference_mode()
    def logits(self, pairs: Sequence[TokenPair]) -> list[float]:
        """Return the logit of each pair of a pack.

        Args:
            pairs: n >= 1 pairs of at most `config.max_tokens` tokens; best in order of length,
                since neighbours of equal length share one attention call.

        Returns:
            n floats, which are NaN or infinite where the model gives that.
        """
        count = len(pairs)
        pairs = [*pairs, *self._fillers(pairs)]
        layout = Layout([len(pair) for pair in pairs], self.device)
        states = self._embed(pairs)
        for layer in self._layers[:-1]:
            query, key, value = layer.projections[0](states).chunk(3, dim=-1)
            states = self._rest(layer, states, query, key, value, layout)
        last = self._layers[-1]
        # The head reads the first token of each pair, so no other is computed further.
        first = states[layout.first]
        key, value = last.projections[1](states).chunk(2, dim=-1)
        states = self._rest(last, first, last.projections[0](first), key, value, layout)
        logits: list[float] = self._head(states[:count].float()).squeeze(-1).tolist()
        return logits

    def _fillers(self, pairs: Sequence[TokenPair]) -> list[TokenPair]:
        """Return pairs of one token that bring a pack on a processor to one of few sizes."""
        if self.device.type != "cpu":
            return []
        tokens = sum(map(len, pairs))
        filler = TokenPair(pairs[0].ids[:1], 1, truncated=False, index=0)
        return [filler] * (few_sizes(tokens) - tokens)

    def _load(self, read: "_Reader") -> None:
        config = self.config
        rows = {"word": config.vocabulary, "position": config.positions, "token_type": config.types}
        self._words, self._positions, self._types = (
            read.tensor(f"{config.prefix}.embeddings.{name}_embeddings.weight", (n, config.hidden))
            for name, n in rows.items()
        )
        self._embedding_norm = read.norm(f"{config.prefix}.embeddings.LayerNorm")
        self._layers = [read.layer(index) for index in range(config.layers)]
        self._head = read.head()

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

    def _rest(
        self,
        layer: _Layer,
        states: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Layout,
    ) -> Tensor:
        """Return what a layer makes of its states, given their projections."""
        attended = self._attend(query, key, value, layout, self.config.heads)
        states = layer.attention_norm(layer.attention_output(attended) + states)
        return layer.output_norm(layer.down(layer.up(states)) + states)


def _token_types(pair: TokenPair) -> TokenIds:
    return (np.arange(len(pair)) >= pair.document_start).astype(np.int64)


def check_one_label(weights: Weights, config: EncoderConfig) -> None:
    """Check that the head gives one logit.

    Raises:
        CheckpointError: There is no head.
        UnsupportedCheckpointError: It gives several.
    """
    name = "classifier.out_proj.weight" if config.counts_from_pad else "classifier.weight"
    shape = weights.shape(name)
    if len(shape) == 2 and shape[0] > 1:
        raise UnsupportedCheckpointError(
            f"{weights.folder} is a classifier of {shape[0]} labels; a reranker has one, whose "
            "logit says how relevant a document is."
        )


def _check_last_layer(weights: Weights, config: EncoderConfig) -> None:
    """Refuse to leave layers out: the model would run, and give other numbers."""
    beyond = f"{config.prefix}.encoder.layer.{config.layers}.output.dense.weight"
    if beyond in weights:
        raise CheckpointError(
            f"{weights.path} has the tensor {beyond}, but num_hidden_layers in config.json is "
            f"{config.layers}; config and weights are not of one checkpoint."
        )


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads the parts of an encoder from its tensors."""

    weights: Weights
    config: EncoderConfig
    device: torch.device
    dtype: torch.dtype
    int8: bool

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        stored = self.weights.tensor(name, shape)
        # Copied even where nothing changes: a view of the file would die with it.
        return stored.to(self.device, dtype or self.dtype, copy=True)

    def norm(self, name: str) -> _Norm:
        shape = (self.config.hidden,)
        return _Norm(
            self.tensor(f"{name}.weight", shape),
            self.tensor(f"{name}.bias", shape),
            self.config.epsilon,
        )

    def layer(self, index: int) -> _Layer:
        name = f"{self.config.prefix}.encoder.layer.{index}"
        before = (
            f"{self.config.prefix}.encoder.layer.{index - 1}.output.LayerNorm"
            if index
            else f"{self.config.prefix}.embeddings.LayerNorm"
        )
        attention_norm = self.norm(f"{name}.attention.output.LayerNorm")
        activation = ACTIVATIONS[self.config.activation]
        hidden, wide = self.config.hidden, self.config.intermediate
        # GELU and its approximation reach down to -0.17.
        lowest = -0.17 if self.config.activation.startswith("gelu") else None
        return _Layer(
            projections=self._projections(name, self.norm(before), last=self._is_last(index)),
            attention_output=self._linear(f"{name}.attention.output.dense", hidden, hidden),
            attention_norm=attention_norm,
            up=self._linear(
                f"{name}.intermediate.dense", wide, hidden, activation, after=attention_norm
            ),
            down=self._linear(f"{name}.output.dense", hidden, wide, lowest=lowest),
            output_norm=self.norm(f"{name}.output.LayerNorm"),
        )

    def head(self) -> Callable[[Tensor], Tensor]:
        """Return the classification head, from the first token's states to (pairs, 1)."""
        hidden = self.config.hidden
        roberta = self.config.counts_from_pad
        dense_name = "classifier.dense" if roberta else f"{self.config.prefix}.pooler.dense"
        out_name = "classifier.out_proj" if roberta else "classifier"
        dense = PlainLinear(*self._parts(dense_name, hidden, hidden, torch.float32), torch.tanh)
        out = PlainLinear(*self._parts(out_name, 1, hidden, torch.float32))
        return lambda states: out(dense(states))

    def _is_last(self, index: int) -> bool:
        return index == self.config.layers - 1

    def _projections(self, name: str, before: _Norm, *, last: bool) -> tuple[Linear, ...]:
        hidden = self.config.hidden
        query, key, value = (
            self._parts(f"{name}.attention.self.{part}", hidden, hidden)
            for part in ("query", "key", "value")
        )
        stacks = ((query,), (key, value)) if last else ((query, key, value),)
        return tuple(
            self._make(
                torch.cat([weight for weight, _ in stack]),
                torch.cat([bias for _, bias in stack]),
                after=before,
            )
            for stack in stacks
        )

    def _linear(
        self,
        name: str,
        outputs: int,
        inputs: int,
        activation: Activation | None = None,
        *,
        after: _Norm | None = None,
        lowest: float | None = None,
    ) -> Linear:
        parts = self._parts(name, outputs, inputs)
        return self._make(*parts, activation, after=after, lowest=lowest)

    def _make(
        self,
        weight: Tensor,
        bias: Tensor,
        activation: Activation | None = None,
        *,
        after: _Norm | None = None,
        lowest: float | None = None,
    ) -> Linear:
        """Return a layer of the kind that this model runs on.

        Args:
            weight: Shape (outputs, inputs).
            bias: Shape (outputs,).
            activation: Applied to the outputs.
            after: The norm whose output it reads, if it does.
            lowest: The smallest value that it reads, if that is known.
        """
        if not self.int8:
            return linear_maker(self.device, self.dtype)(weight, bias, activation)
        smooth = None if after is None else smoothing(after.weight, after.bias, weight)
        return Int8Linear(weight, bias, activation, smooth=smooth, lowest=lowest)

    def _parts(
        self, name: str, outputs: int, inputs: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        # Quantised from what is stored, not from what bfloat16 leaves of it.
        exact = torch.float32 if self.int8 else None
        return (
            self.tensor(f"{name}.weight", (outputs, inputs), dtype or exact),
            self.tensor(f"{name}.bias", (outputs,), dtype),
        )
