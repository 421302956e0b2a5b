"""Weights that transformers made up at random, because a checkpoint has none of that name."""

from pathlib import Path
from typing import Any

from bge_rerank_adapters.engine.models.unsupported import is_language_model
from bge_rerank_adapters.errors import CheckpointError

_SHOWN = 3


def made_up_weights(model: Any, folder: Path) -> list[str]:
    """Return the names of a loaded model's weights that are not in its files.

    Transformers tells them only as it loads, so it is asked to load once more, to a device that
    holds no numbers.

    Args:
        model: Any of transformers' models, loaded from the folder.
        folder: The checkpoint's.
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


def made_up_error(
    names: list[str], folder: Path, *, model: Any, config: dict[str, Any], prefix: str
) -> CheckpointError:
    """Return the error for weights that were made up.

    Args:
        names: Of the weights.
        folder: The checkpoint's.
        model: What was loaded from it.
        config: Its `config.json`.
        prefix: What training left before all names in the files.
    """
    shown = ", ".join(names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return CheckpointError(
        f"{folder}: the weights lack {shown}{more} of {type(model).__name__}, which transformers "
        f"would fill with random numbers, other ones at each start; {_way_out(config, prefix)}."
    )


def _way_out(config: dict[str, Any], prefix: str) -> str:
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
