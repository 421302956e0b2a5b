"""Parses the `config.json` of an encoder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bge_rerank_adapters.engine.models.layers.activations import ACTIVATIONS
from bge_rerank_adapters.errors import CheckpointError, UnsupportedCheckpointError


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """The entries of `config.json` that decide how an encoder is computed.

    Attributes:
        prefix: Prefix of the names of the encoder's tensors.
        layers: Number of layers.
        hidden: Width of a token's vector.
        heads: Number of attention heads.
        intermediate: Width inside a feed-forward block.
        vocabulary: Number of rows of the word embeddings.
        positions: Number of rows of the position embeddings.
        types: Number of rows of the token type embeddings.
        epsilon: Epsilon of every layer norm.
        activation: Name of the feed-forward block's activation.
        pad_id: Id of the padding token.
        counts_from_pad: Whether positions count from `pad_id + 1`, as RoBERTa's do; BERT's count
            from 0.
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
        """Maximum tokens of a pair, by the number of positions."""
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
    """Return the config of an encoder.

    Raises:
        CheckpointError: An entry is missing or of the wrong type.
        UnsupportedCheckpointError: The activation or the kind of positions is not known, or tokens
            do not see all others.
    """
    prefix, counts_from_pad = _ARCHITECTURES[config["model_type"]]
    path = folder / "config.json"
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
            pad_id=_pad_id(config, counts_from_pad=counts_from_pad),
            counts_from_pad=counts_from_pad,
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{path}: missing or unusable: {error}; copy the config.json of the model that the "
            "weights belong to."
        ) from error
    _check_sizes(parsed, path)
    _check_supported(parsed, config, path)
    return parsed


def _pad_id(config: dict[str, Any], *, counts_from_pad: bool) -> int:
    found = config.get("pad_token_id", 1 if counts_from_pad else 0)
    if found is not None:
        return int(found)
    if counts_from_pad:
        raise ValueError("pad_token_id is null, but positions count from it; 1 is usual")
    return 0  # BERT's positions do not depend on it


def _check_supported(parsed: EncoderConfig, config: dict[str, Any], path: Path) -> None:
    """Refuse options that change the computation and are not supported."""
    if parsed.activation not in ACTIVATIONS:
        raise UnsupportedCheckpointError(
            f"{path}: hidden_act {parsed.activation!r} is not known; "
            f"supported are {', '.join(ACTIVATIONS)}."
        )
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise UnsupportedCheckpointError(
            f"{path}: position_embedding_type must be 'absolute', "
            f"got {config['position_embedding_type']!r}."
        )
    if config.get("is_decoder"):
        raise UnsupportedCheckpointError(
            f"{path}: is_decoder is {config['is_decoder']!r}, with which "
            "transformers lets a token see those before it alone; here all tokens of a pair see "
            "each other, so scores would be others. Write false there if it was trained so."
        )


def _check_sizes(config: EncoderConfig, path: Path) -> None:
    """Refuse sizes that would only fail, or give wrong results, once the model runs."""
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
