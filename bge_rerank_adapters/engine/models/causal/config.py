"""The entries of `config.json` that decide how a decoder is computed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bge_rerank_adapters.engine.models.causal.architectures import ARCHITECTURES, ROTARY_KINDS
from bge_rerank_adapters.engine.models.causal.attention import Heads
from bge_rerank_adapters.engine.models.causal.entries import Entries
from bge_rerank_adapters.engine.models.causal.rotary import Rotary
from bge_rerank_adapters.engine.models.causal.rotary_config import parse_rotary
from bge_rerank_adapters.engine.models.layers.activations import ACTIVATIONS
from bge_rerank_adapters.errors import CheckpointError, UnsupportedCheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class CausalConfig:
    """How a decoder is computed.

    Attributes:
        layers: Number of layers.
        hidden: Width of a token's vector.
        query_heads: Number of query heads.
        key_heads: Number of key and value heads.
        head_width: Width of a head.
        intermediate: Width inside a feed-forward block.
        vocabulary: Number of rows of the word embeddings.
        positions: Maximum tokens of a text.
        epsilon: Epsilon of every norm.
        activation: Name of the feed-forward block's activation.
        rotary: The rotary position embedding.
        attention_scale: Factor of the products of query and key.
        tied: Whether the word embeddings are the head, if no head is stored.
        input_bias: Whether the linear layers of query, key and value have a bias.
        output_bias: Whether attention's output layer has a bias.
        feed_bias: Whether the feed-forward block's linear layers have a bias.
        head_norms: Whether each head of query and key is normed before it is rotated.
        embedding_scale: Factor of the embeddings.
        residual_scale: Factor of a block's output before it is added to its input.
        norms_add_one: Whether norms scale by their weight plus one.
        norms_after: Whether each block's output is normed before it is added.
        windows: The attention window of each layer in tokens, the token itself included; `None` is
            no window. Empty if no layer has one.
    """

    layers: int
    hidden: int
    query_heads: int
    key_heads: int
    head_width: int
    intermediate: int
    vocabulary: int
    positions: int
    epsilon: float
    activation: str
    rotary: Rotary
    attention_scale: float
    tied: bool = False
    input_bias: bool = False
    output_bias: bool = False
    feed_bias: bool = False
    head_norms: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    norms_add_one: bool = False
    norms_after: bool = False
    windows: tuple[int | None, ...] = ()

    @property
    def max_tokens(self) -> int:
        """Maximum tokens of a pair."""
        return self.positions

    def heads(self, layer: int) -> Heads:
        """Return the attention heads of a layer, counted from 0."""
        window = self.windows[layer] if self.windows else None
        return Heads(self.query_heads, self.key_heads, self.attention_scale, window)


def parse_causal(config: dict[str, Any], *, folder: Path) -> CausalConfig:
    """Return the config of a decoder, by the entry of `ARCHITECTURES` for its model type.

    Raises:
        CheckpointError: An entry is missing or unusable, or two contradict each other.
        UnsupportedCheckpointError: An entry has a value that is not supported.
    """
    kind, entries = config["model_type"], Entries(config, folder / "config.json")
    _check_supported(entries)
    parsed = CausalConfig(
        **ARCHITECTURES[kind](entries),
        rotary=parse_rotary(entries, kinds=ROTARY_KINDS.get(kind)),
    )
    _check_sizes(parsed, entries.path)
    _check_rotary(parsed, entries.path)
    if parsed.activation not in ACTIVATIONS:
        raise UnsupportedCheckpointError(
            f"{entries.path}: the activation {parsed.activation!r} is not known; "
            f'supported are {", ".join(ACTIVATIONS)}. backend="flagembedding" may run it.'
        )
    return parsed


# Entries with which transformers computes something else, and the values that leave it as it is.
_AS_USUAL: dict[str, tuple[Any, ...]] = {
    "is_causal": (True,),
    "use_bidirectional_attention": (None, False),
    "per_layer_config": (None, {}),
}


def _check_supported(entries: Entries) -> None:
    """Refuse models that transformers computes in another way."""
    for name, usual in _AS_USUAL.items():
        value = entries.values.get(name, usual[0])
        if value not in usual:
            raise UnsupportedCheckpointError(
                f"{entries.path}: {name} must be {usual[-1]!r} or left out, got {value!r}, with "
                "which tokens attend to later ones or layers differ; here each token attends to "
                'itself and earlier ones, alike in all layers. backend="flagembedding" may run it.'
            )


def check_language_model(config: dict[str, Any], *, folder: Path) -> None:
    """Refuse a model that was trained with a classification head.

    Raises:
        UnsupportedCheckpointError: The config names such a model.
    """
    for name in config.get("architectures") or []:
        if name.endswith("ForSequenceClassification"):
            raise UnsupportedCheckpointError(
                f"{folder / 'config.json'}: architectures names {name}, a model with a "
                'classification head, but this family reads the logit of "Yes" of a language '
                "model, so scores would be others. Run it with sentence-transformers' own "
                "CrossEncoder."
            )


def _check_sizes(config: CausalConfig, path: Path) -> None:
    """Refuse sizes that would only fail, or give wrong results, once the model runs."""
    if config.query_heads % config.key_heads:
        raise CheckpointError(
            f"{path}: num_attention_heads must be a multiple of num_key_value_heads "
            f"({config.key_heads}), got {config.query_heads}."
        )
    if config.head_width < 2 or config.head_width % 2:
        raise CheckpointError(
            f"{path}: the width of a head must be an even number, got {config.head_width}."
        )
    if not 0.0 <= config.epsilon <= 1.0:
        raise CheckpointError(f"{path}: rms_norm_eps must be from 0 to 1, got {config.epsilon}.")


def _check_rotary(config: CausalConfig, path: Path) -> None:
    """Refuse rotary positions whose angles overflow, which any head shows in its first channels."""
    if not config.rotary.frequencies(min(config.head_width, 64)).isfinite().all():
        raise CheckpointError(
            f"{path}: rope_theta, rope_scaling or rope_parameters give angles that are no finite "
            "numbers; copy or download the config.json that came with the weights."
        )
