"""What of `config.json` decides how a decoder is computed.

Keys and their meaning are those of transformers 4.44.2 (`modeling_gemma.py`) and of the modelling
code that FlagEmbedding 1.4.2 carries (`modeling_minicpm_reranker.py`, `gemma_model.py`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bge_rerank_adapters.engine.models.causal.attention import Heads
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
        positions: Longest text that it was made for.
        epsilon: Of every norm.
        activation: Name of the feed-forward block's activation.
        rotary_base: Base of the rotary positions' wavelengths.
        rotary_factor: What positions are divided by.
        attention_scale: Factor of the products of query and key.
        attention_bias: Whether the attention's linear layers have a bias.
        embedding_scale: Factor of the embeddings.
        residual_scale: Factor of what a block adds to its input.
        norms_add_one: Whether norms scale by one more than their weight.
        norms_after: Whether each block's output is normed as well, before it is added.
        window: How many tokens a token of an even layer sees; `None` is all before it.
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
    rotary_base: float
    rotary_factor: float = 1.0
    attention_scale: float
    attention_bias: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    norms_add_one: bool = False
    norms_after: bool = False
    window: int | None = None

    @property
    def max_tokens(self) -> int:
        """Longest pair that the model was made for."""
        return self.positions

    def heads(self, layer: int) -> Heads:
        """Return the heads of a layer, counted from 0."""
        window = self.window if layer % 2 == 0 else None
        return Heads(self.query_heads, self.key_heads, self.attention_scale, window)


def parse_causal(config: dict[str, Any], *, folder: Path) -> CausalConfig:
    """Return the config of a decoder, by the entry of `ARCHITECTURES` for its model type.

    Raises:
        CheckpointError: An entry is missing or unusable.
        UnsupportedCheckpointError: It asks for something that is not known here.
    """
    entries = ARCHITECTURES[config["model_type"]]
    path = folder / "config.json"
    try:
        parsed = CausalConfig(**_common(config), **entries(config))
    except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: missing or unusable: {error!r}.") from error
    _check_sizes(parsed, path)
    _check_rotary(config, path)
    if parsed.activation not in ACTIVATIONS:
        raise UnsupportedCheckpointError(
            f"{path}: the activation {parsed.activation!r} is not known; "
            f"supported are {', '.join(ACTIVATIONS)}."
        )
    return parsed


def _common(config: dict[str, Any]) -> dict[str, Any]:
    heads = int(config["num_attention_heads"])
    rotary = _rotary(config)
    return {
        "layers": int(config["num_hidden_layers"]),
        "hidden": int(config["hidden_size"]),
        "query_heads": heads,
        "key_heads": int(config.get("num_key_value_heads") or heads),
        "intermediate": int(config["intermediate_size"]),
        "vocabulary": int(config["vocab_size"]),
        "positions": int(config["max_position_embeddings"]),
        "epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "rotary_base": float(rotary.get("rope_theta") or config.get("rope_theta", 10000.0)),
        "rotary_factor": float(rotary.get("factor") or 1.0),
        "attention_bias": bool(config.get("attention_bias", False)),
    }


def _gemma(config: dict[str, Any]) -> dict[str, Any]:
    width = int(config["head_dim"])
    return {
        "head_width": width,
        "attention_scale": width**-0.5,
        # `hidden_act` of Gemma's first config files was a mistake, which is not followed
        # (huggingface/transformers#29402).
        "activation": str(config.get("hidden_activation") or "gelu_pytorch_tanh"),
        "embedding_scale": int(config["hidden_size"]) ** 0.5,
        "norms_add_one": True,
    }


def _minicpm(config: dict[str, Any]) -> dict[str, Any]:
    width = int(config["hidden_size"]) // int(config["num_attention_heads"])
    layers = int(config["num_hidden_layers"])
    return {
        "head_width": width,
        "attention_scale": width**-0.5,
        "activation": str(config.get("hidden_act", "silu")),
        "embedding_scale": float(config.get("scale_emb", 1)),
        "residual_scale": float(config.get("scale_depth", 1)) / math.sqrt(layers),
    }


def _gemma2(config: dict[str, Any]) -> dict[str, Any]:
    # `attn_logit_softcapping` is left out, as FlagEmbedding leaves it out: it runs Gemma 2 with
    # torch's attention function, which has no such thing.
    window = config.get("sliding_window")
    return _gemma(config) | {
        "attention_scale": float(config["query_pre_attn_scalar"]) ** -0.5,
        "norms_after": True,
        "window": None if window is None else int(window),
    }


# What only an architecture itself says of its sizes and factors, by model type.
ARCHITECTURES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    # BAAI/bge-reranker-v2-gemma
    "gemma": _gemma,
    # BAAI/bge-reranker-v2-minicpm-layerwise
    "minicpm": _minicpm,
    # BAAI/bge-reranker-v2.5-gemma2-lightweight
    "cost_wise_gemma": _gemma2,
}


def _rotary(config: dict[str, Any]) -> dict[str, Any]:
    """Return what is said of rotary positions: by transformers 5 in one entry, before in two."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return dict(found)


def _check_rotary(config: dict[str, Any], path: Path) -> None:
    rotary = _rotary(config)
    kind = rotary.get("rope_type") or rotary.get("type") or "default"
    if kind not in ("default", "linear"):
        raise UnsupportedCheckpointError(
            f"{path}: rotary positions of the type {kind!r} are not known; "
            "supported are 'default' and 'linear'."
        )


def _check_sizes(config: CausalConfig, path: Path) -> None:
    """Refuse numbers that no model has, which would fail or give nonsense once it runs."""
    least = {
        "num_hidden_layers": config.layers,
        "hidden_size": config.hidden,
        "num_attention_heads": config.query_heads,
        "num_key_value_heads": config.key_heads,
        "intermediate_size": config.intermediate,
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.positions,
        "sliding_window": 1 if config.window is None else config.window,
    }
    for name, value in least.items():
        if value < 1:
            raise CheckpointError(f"{path}: {name} must be at least 1, got {value}.")
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
