"""What each architecture of decoders reads from its `config.json`.

Keys, defaults and their meaning are those of transformers 5.23 (the config and modelling files of
Gemma, Llama, Mistral, Qwen 2 and Qwen 3) and of the modelling code that FlagEmbedding 1.4.2
carries (`modeling_minicpm_reranker.py`, `gemma_model.py`).
"""

import math
from collections.abc import Callable
from typing import Any

from bge_rerank_adapters.engine.models.causal.entries import Entries
from bge_rerank_adapters.errors import CheckpointError

_WINDOWED, _FULL = "sliding_attention", "full_attention"
_GELU = "gelu_pytorch_tanh"


def _common(entries: Entries, *, tied: bool = False) -> dict[str, Any]:
    bias = entries.flag("attention_bias", False)
    return {
        "layers": entries.whole("num_hidden_layers"),
        "hidden": entries.whole("hidden_size"),
        "query_heads": entries.whole("num_attention_heads"),
        "intermediate": entries.whole("intermediate_size"),
        "vocabulary": entries.whole("vocab_size"),
        "positions": entries.whole("max_position_embeddings"),
        "epsilon": entries.number("rms_norm_eps", 1e-6),
        "input_bias": bias,
        "output_bias": bias,
        "tied": entries.flag("tie_word_embeddings", tied),
    }


def _gemma(entries: Entries) -> dict[str, Any]:
    width = entries.whole("head_dim", 256)
    return _gemma_common(entries, key_heads=16) | {
        "head_width": width,
        "attention_scale": width**-0.5,
        "activation": _gemma_activation(entries),
    }


def _gemma_common(entries: Entries, *, key_heads: int) -> dict[str, Any]:
    return _common(entries, tied=True) | {
        "key_heads": entries.whole("num_key_value_heads", key_heads),
        "embedding_scale": entries.whole("hidden_size") ** 0.5,
        "norms_add_one": True,
    }


def _gemma_activation(entries: Entries) -> str:
    """Return the activation, if all releases of transformers agree on it.

    Those of 2024 read `hidden_activation`, where null is the tanh form, and ignore `hidden_act`,
    which was wrong in Gemma's first config files (huggingface/transformers#29402). Release 5 reads
    `hidden_act` alone, where "gelu" is the tanh form.
    """
    act = entries.text("hidden_act", _GELU)
    new = _GELU if act == "gelu" else act
    if "hidden_activation" in entries.values:
        old = entries.values["hidden_activation"] or _GELU
    else:
        old = new  # Written by release 5.
    if old != new:
        raise CheckpointError(
            f"{entries.path}: hidden_act {act!r} and hidden_activation "
            f"{entries.values['hidden_activation']!r} name different activations, and releases of "
            "transformers differ in which one counts; write the one that the model was trained "
            "with into both, where 'gelu' in hidden_act means 'gelu_pytorch_tanh'."
        )
    return new


def _minicpm(entries: Entries) -> dict[str, Any]:
    common = _common(entries)
    hidden, heads, layers = (common[name] for name in ("hidden", "query_heads", "layers"))
    if hidden % heads:
        raise entries.refusal("hidden_size", f"a multiple of num_attention_heads ({heads})")
    width = hidden // heads
    return common | {
        "key_heads": entries.optional_whole("num_key_value_heads") or heads,
        "head_width": width,
        "attention_scale": width**-0.5,
        "activation": entries.text("hidden_act", "silu"),
        "embedding_scale": entries.number("scale_emb", 1),
        "residual_scale": entries.number("scale_depth", 1) / math.sqrt(layers),
    }


def _gemma2(entries: Entries) -> dict[str, Any]:
    common = _gemma_common(entries, key_heads=4)
    window = entries.whole("sliding_window", 4096)
    _check_plain_attention(entries)
    return common | {
        "head_width": entries.whole("head_dim", 256),
        "attention_scale": entries.number("query_pre_attn_scalar", above=0) ** -0.5,
        "activation": entries.text("hidden_activation", _GELU),
        "norms_after": True,
        "windows": tuple(None if layer % 2 else window for layer in range(common["layers"])),
    }


def _check_plain_attention(entries: Entries) -> None:
    """Refuse attention functions that cap scores.

    `attn_logit_softcapping` is ignored, as in FlagEmbedding: torch's attention function, which it
    uses, does not have it. Others do.
    """
    for name in ("attn_implementation", "_attn_implementation"):
        if entries.values.get(name) not in (None, "sdpa"):
            raise entries.refusal(name, "'sdpa' or left out, as for the published checkpoint")


def _llama(entries: Entries) -> dict[str, Any]:
    common = _common(entries)
    heads = common["query_heads"]
    width = entries.optional_whole("head_dim") or common["hidden"] // heads
    return common | {
        "key_heads": entries.optional_whole("num_key_value_heads") or heads,
        "head_width": width,
        "attention_scale": width**-0.5,
        "activation": entries.text("hidden_act", "silu"),
        "feed_bias": entries.flag("mlp_bias", False),
    }


_NO_BIAS = {"input_bias": False, "output_bias": False, "feed_bias": False}


def _mistral(entries: Entries) -> dict[str, Any]:
    window = entries.optional_whole("sliding_window", 4096)
    found = _llama(entries) | _NO_BIAS | _default_key_heads(entries, 8)
    kinds = _layer_types(entries, found["layers"])
    if kinds is not None and set(kinds) != {_FULL if window is None else _WINDOWED}:
        raise CheckpointError(
            f"{entries.path}: layer_types {kinds!r} contradict sliding_window {window!r}, which "
            "transformers applies to every layer of a model of the type 'mistral'; leave out what "
            "the model was not trained with."
        )
    return found | {"windows": (window,) * found["layers"]}


def _qwen2(entries: Entries) -> dict[str, Any]:
    found = _llama(entries) | _NO_BIAS | _default_key_heads(entries, 32)
    return found | {"input_bias": True, "windows": _some_windows(entries, found["layers"])}


def _qwen3(entries: Entries) -> dict[str, Any]:
    width = entries.whole("head_dim", 128)
    found = _llama(entries) | _default_key_heads(entries, 32)
    return found | {
        "head_width": width,
        "attention_scale": width**-0.5,
        "feed_bias": False,
        "head_norms": True,
        "windows": _some_windows(entries, found["layers"]),
    }


def _default_key_heads(entries: Entries, default: int) -> dict[str, int]:
    """Return the number of key heads of a class with a default; none if the entry is given."""
    return {} if "num_key_value_heads" in entries.values else {"key_heads": default}


def _some_windows(entries: Entries, layers: int) -> tuple[int | None, ...]:
    """Return the windows of layers of which only some have one, as in Qwen's models."""
    window = entries.optional_whole("sliding_window", 4096)
    if not entries.flag("use_sliding_window", False):
        window = None
    kinds = _layer_types(entries, layers)
    if kinds is not None and _WINDOWED in kinds and window is None:
        raise CheckpointError(
            f"{entries.path}: layer_types {kinds!r} contradict use_sliding_window "
            f"{entries.values.get('use_sliding_window')!r} and sliding_window "
            f"{entries.values.get('sliding_window')!r}; write what the model was trained with."
        )
    if window is None:
        return ()
    first = entries.whole("max_window_layers", 28, least=0)
    kinds = kinds or [_WINDOWED if layer >= first else _FULL for layer in range(layers)]
    return tuple(window if kind == _WINDOWED else None for kind in kinds)


def _layer_types(entries: Entries, layers: int) -> list[str] | None:
    kinds = entries.values.get("layer_types")
    if kinds is None:
        return None
    known = isinstance(kinds, list) and all(kind in (_WINDOWED, _FULL) for kind in kinds)
    if not known or len(kinds) != layers:
        raise entries.refusal("layer_types", f"a list of {layers} times {_WINDOWED!r} or {_FULL!r}")
    return list(kinds)


# The entries that depend on the architecture, by model type.
ARCHITECTURES: dict[str, Callable[[Entries], dict[str, Any]]] = {
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
ROTARY_KINDS = {"minicpm": ("default", "linear"), "cost_wise_gemma": ("default",)}
