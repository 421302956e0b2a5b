"""The message for a model that is not supported, with what can run it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_FLAG = 'backend="flagembedding"'
_EXTRA = 'pip install "bge-rerank-adapters[flagembedding]"'


def unsupported_message(
    folder: Path,
    config: Mapping[str, Any],
    *,
    families: Mapping[str, Sequence[str]],
    asked: str | None,
) -> str:
    """Return what a model is, what is supported, and what can run this one.

    Args:
        folder: The checkpoint's folder.
        config: Its `config.json`.
        families: The model types that each family can run, by its name.
        asked: The `family` setting.
    """
    kind = config.get("model_type", "model of unknown type")
    named = ", ".join(_architectures(config) or ["no architecture named"])
    types = "; ".join(f"{name}: {', '.join(each)}" for name, each in families.items())
    wanted = "" if asked is None else f" as one of the {asked} family, which is set as family="
    family = next((name for name, each in families.items() if kind in each), None)
    if family is not None and asked is None:
        return (
            f"{folder} is a {kind!r} model ({named}), and most of these are not rerankers of the "
            f"{family} family. If it was fine-tuned for FlagEmbedding's FlagLLMReranker, give "
            f"family={family!r}; a reranker with another prompt (Qwen3-Reranker, "
            "mxbai-rerank-v2) would rank wrongly here, so use its author's library."
        )
    return (
        f"{folder} is a {kind!r} model ({named}), which is not supported{wanted}; supported are "
        f"these model types of each family: {types}. {_advice(config, families)}"
    )


def is_language_model(config: Mapping[str, Any]) -> bool:
    """Return whether a config names a causal language model."""
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in _architectures(config))


def _advice(config: Mapping[str, Any], families: Mapping[str, Sequence[str]]) -> str:
    kind = config.get("model_type")
    own = next((name for name, types in families.items() if kind in types), None)
    if own is not None:
        return f"It is of the {own} family: leave family= out."
    classifiers, language_models = _known_to_transformers()
    if is_language_model(config):
        if kind in language_models:
            return (
                f'If it is a reranker that answers "Yes" or "No", {_FLAG} with family="decoder" '
                f"runs it ({_EXTRA})."
            )
    elif kind in classifiers and _may_classify(config):
        return f"{_FLAG} runs it ({_EXTRA})."
    return (
        "It has no head that tells how relevant a document is; give a checkpoint that was "
        "fine-tuned as a reranker."
    )


def _may_classify(config: Mapping[str, Any]) -> bool:
    names = _architectures(config)
    return not names or any(name.endswith("ForSequenceClassification") for name in names)


def _architectures(config: Mapping[str, Any]) -> list[str]:
    return config.get("architectures") or []


def _known_to_transformers() -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the model types for which transformers has classifiers, and language models."""
    # Imported here, since only this error needs it.
    from transformers.models.auto import modeling_auto

    return (
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    )
