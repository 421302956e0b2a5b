"""Reads and checks a checkpoint's `config.json`."""

from pathlib import Path
from typing import Any

from bge_rerank_adapters.engine.checkpoints.formats import describe_folder
from bge_rerank_adapters.engine.checkpoints.quantised import check_config_plain
from bge_rerank_adapters.engine.json_files import read_json
from bge_rerank_adapters.errors import CheckpointError, UnsupportedCheckpointError


def read_config(folder: Path) -> dict[str, Any]:
    """Return the checkpoint's `config.json`.

    Raises:
        CheckpointError: It is not there, or not JSON.
        UnsupportedCheckpointError: It says that the weights are quantised.
    """
    path = folder / "config.json"
    if not path.is_file():
        found = describe_folder(folder)
        raise CheckpointError(
            f"{folder} has no config.json, so it is not a checkpoint's folder; give the folder "
            "that holds config.json, tokenizer.json and model.safetensors."
            + (f" It {found}." if found else "")
        )
    config: dict[str, Any] = read_json(path)
    _check_kind(config, path)
    check_config_plain(config, path)
    _check_complete(config, path)
    return config


def _check_kind(config: dict[str, Any], path: Path) -> None:
    """Check that model_type or architectures are given, as text."""
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    if not isinstance(model_type, str | None):
        raise CheckpointError(f"{path}: model_type must be a string, got {model_type!r}.")
    if not isinstance(architectures, list) or not all(isinstance(n, str) for n in architectures):
        raise CheckpointError(
            f"{path}: architectures must be a list of strings, got {architectures!r}."
        )
    if model_type is None and not architectures:
        raise CheckpointError(
            f"{path} names neither a model_type nor architectures, so it is no model's config; "
            "copy or download it again."
        )


# Entries by which transformers reads other files.
_OTHER_FILES = {"configuration_files": [], "transformers_weights": "model.safetensors"}


def _check_complete(config: dict[str, Any], path: Path) -> None:
    """Refuse a config that hands over to other files."""
    for name, harmless in _OTHER_FILES.items():
        if config.get(name) not in (None, harmless):
            raise UnsupportedCheckpointError(
                f"{path}: {name} {config[name]!r} has transformers read other files than the "
                "config.json and model.safetensors that are read here; copy those files over "
                f"these, and take {name} out."
            )
