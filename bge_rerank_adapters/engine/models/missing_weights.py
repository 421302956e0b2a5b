"""Finds weights that a checkpoint lacks, which transformers initialises at random."""

from pathlib import Path
from typing import Any

from bge_rerank_adapters.engine.models.unsupported import is_language_model
from bge_rerank_adapters.errors import CheckpointError

_SHOWN = 3


def missing_weights(model: Any, folder: Path) -> list[str]:
    """Return the names of a loaded model's weights that are not in its files.

    Transformers reports them only while it loads, so the model is loaded again, to the meta device.

    Args:
        model: A model of transformers, loaded from the folder.
        folder: The checkpoint's folder.
    """
    _, found = type(model).from_pretrained(
        str(folder),
        output_loading_info=True,
        device_map="meta",
        local_files_only=True,
        trust_remote_code=False,
    )
    mismatched = [each[0] if isinstance(each, tuple) else each for each in found["mismatched_keys"]]
    return sorted({*found["missing_keys"], *mismatched})


def missing_weights_error(
    names: list[str], folder: Path, *, model: Any, config: dict[str, Any], prefix: str
) -> CheckpointError:
    """Return the error for missing weights.

    Args:
        names: The names of the weights.
        folder: The checkpoint's folder.
        model: The model that was loaded from it.
        config: Its `config.json`.
        prefix: The prefix that training left before all names in the files.
    """
    shown = ", ".join(names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return CheckpointError(
        f"{folder}: the weights lack {shown}{more} of {type(model).__name__}, which transformers "
        f"would fill with random numbers; {_advice(config, prefix)}."
    )


def _advice(config: dict[str, Any], prefix: str) -> str:
    if prefix:
        return (
            f"training left {prefix!r} before all names, which FlagEmbedding does not read: use "
            'backend="native", or save the model without the wrapper'
        )
    if is_language_model(config):
        return (
            'a language model that answers "Yes" or "No" is run by family="decoder"; otherwise '
            "give a checkpoint that was fine-tuned as a reranker"
        )
    return "give a checkpoint that was fine-tuned as a reranker, with its head"
