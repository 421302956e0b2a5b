"""The entries of `config.json` that decide how a decoder is computed.

Keys, defaults and their meaning are those of transformers (`modeling_gemma.py` of 4.44.2; the
config and modelling files of Llama, Mistral, Qwen 2 and Qwen 3 of 5.23) and of the modelling code
that FlagEmbedding 1.4.2 carries (`modeling_minicpm_reranker.py`, `gemma_model.py`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bge_rerank_adapters.engine.models.causal.attention import Heads
from bge_rerank_adapters.engine.models.causal.rotary import Rotary, parse_rotary
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
        CheckpointError: An entry is missing or unusable.
        UnsupportedCheckpointError: An entry has a value that is not supported.
    """
    entries = ARCHITECTURES[config["model_type"]]
    path = folder / "config.json"
    try:
        parsed = CausalConfig(
            **_common(config) | entries(config),
            rotary=parse_rotary(config, folder=folder, kinds=_ROTARY.get(config["model_type"])),
        )
    except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: missing or unusable: {error!r}.") from error
    _check_sizes(parsed, path)
    if parsed.activation not in ACTIVATIONS:
        raise UnsupportedCheckpointError(
            f"{path}: the activation {parsed.activation!r} is not known; "
            f"supported are {', '.join(ACTIVATIONS)}."
        )
    return parsed


def _common(config: dict[str, Any]) -> dict[str, Any]:
    heads = int(config["num_attention_heads"])
    bias = bool(config.get("attention_bias", False))
    return {
        "layers": int(config["num_hidden_layers"]),
        "hidden": int(config["hidden_size"]),
        "query_heads": heads,
        "key_heads": int(config.get("num_key_value_heads") or heads),
        "intermediate": int(config["intermediate_size"]),
        "vocabulary": int(config["vocab_size"]),
        "positions": int(config["max_position_embeddings"]),
        "epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "input_bias": bias,
        "output_bias": bias,
        "tied": bool(config.get("tie_word_embeddings", False)),
    }


def _gemma(config: dict[str, Any]) -> dict[str, Any]:
    width = int(config["head_dim"])
    return {
        "head_width": width,
        "attention_scale": width**-0.5,
        # `hidden_act` was wrong in Gemma's first config files, so it is ignored
        # (huggingface/transformers#29402).
        "activation": str(config.get("hidden_activation") or "gelu_pytorch_tanh"),
        "embedding_scale": int(config["hidden_size"]) ** 0.5,
        "norms_add_one": True,
        "tied": bool(config.get("tie_word_embeddings", True)),
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
    # `attn_logit_softcapping` is ignored, as in FlagEmbedding: torch's attention function, which it
    # uses, does not have it.
    window = _window(config.get("sliding_window"))
    layers = int(config["num_hidden_layers"])
    return _gemma(config) | {
        "attention_scale": float(config["query_pre_attn_scalar"]) ** -0.5,
        "norms_after": True,
        "windows": tuple(None if layer % 2 else window for layer in range(layers)),
    }


def _llama(config: dict[str, Any]) -> dict[str, Any]:
    _check_full_rotary(config)
    width = int(
        config.get("head_dim") or int(config["hidden_size"]) // int(config["num_attention_heads"])
    )
    return {
        "head_width": width,
        "attention_scale": width**-0.5,
        "activation": str(config.get("hidden_act", "silu")),
        "feed_bias": bool(config.get("mlp_bias", False)),
    }


def _mistral(config: dict[str, Any]) -> dict[str, Any]:
    window = _window(config.get("sliding_window", 4096))
    return _llama(config) | {
        "input_bias": False,
        "output_bias": False,
        "feed_bias": False,
        "windows": (window,) * int(config["num_hidden_layers"]),
    }


def _qwen2(config: dict[str, Any]) -> dict[str, Any]:
    return _llama(config) | {
        "input_bias": True,
        "output_bias": False,
        "feed_bias": False,
        "windows": _some_windows(config),
    }


def _qwen3(config: dict[str, Any]) -> dict[str, Any]:
    return _llama({"head_dim": 128} | config) | {
        "feed_bias": False,
        "head_norms": True,
        "windows": _some_windows(config),
    }


def _some_windows(config: dict[str, Any]) -> tuple[int | None, ...]:
    """Return the windows of layers of which only some have one, as in Qwen's models."""
    window = _window(config.get("sliding_window", 4096))
    if not config.get("use_sliding_window", False) or window is None:
        return ()
    layers, first = int(config["num_hidden_layers"]), int(config.get("max_window_layers", 28))
    kinds = config.get("layer_types") or [
        "sliding_attention" if layer >= first else "full_attention" for layer in range(layers)
    ]
    if len(kinds) != layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise ValueError(f"layer_types {kinds!r}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _window(value: Any) -> int | None:
    return None if value is None else int(value)


def _check_full_rotary(config: dict[str, Any]) -> None:
    """Refuse partial rotary embeddings, which some models derived from Llama have."""
    rotary = config.get("rope_parameters") or {}
    part = config.get("partial_rotary_factor") or rotary.get("partial_rotary_factor") or 1.0
    if float(part) != 1.0:
        raise ValueError(f"partial_rotary_factor {part!r}")


# The entries that depend on the architecture, by model type.
ARCHITECTURES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    # BAAI/bge-reranker-v2-gemma
    "gemma": _gemma,
    # BAAI/bge-reranker-v2-minicpm-layerwise
    "minicpm": _minicpm,
    # BAAI/bge-reranker-v2.5-gemma2-lightweight
    "cost_wise_gemma": _gemma2,
    # Other bases of FlagEmbedding's FlagLLMReranker.
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
# Rotary types where FlagEmbedding's own modelling code supports only some.
_ROTARY = {"minicpm": ("default", "linear"), "cost_wise_gemma": ("default", "linear")}


def _check_sizes(config: CausalConfig, path: Path) -> None:
    """Refuse sizes that would only fail, or give wrong results, once the model runs."""
    least = {
        "num_hidden_layers": config.layers,
        "hidden_size": config.hidden,
        "num_attention_heads": config.query_heads,
        "num_key_value_heads": config.key_heads,
        "intermediate_size": config.intermediate,
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.positions,
        "sliding_window": min((each for each in config.windows if each is not None), default=1),
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
