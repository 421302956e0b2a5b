"""Inspects a checkpoint's folder before anything is loaded."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bge_rerank_adapters.engine.checkpoints.adapter import Adapter, read_adapter
from bge_rerank_adapters.engine.checkpoints.hub import SLOW_VOCABULARIES, find_folder
from bge_rerank_adapters.engine.checkpoints.model_config import read_config
from bge_rerank_adapters.engine.checkpoints.sentence_transformers import (
    AuthorSettings,
    read_author_settings,
)
from bge_rerank_adapters.errors import CheckpointError, CheckpointNotFoundError
from bge_rerank_adapters.settings import EngineSettings

_TOKENIZER_FILES = ("tokenizer.json", *SLOW_VOCABULARIES)


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """Where the files of a checkpoint are, and its author's settings.

    Attributes:
        folder: Holds `config.json` and the weights; for an adapter, the folder of its base.
        tokenizer_folder: Holds the tokenizer; an adapter may have its own.
        config: The content of `config.json`.
        author: The author's settings.
        adapter: The adapter to merge with the weights, if any.
    """

    folder: Path
    tokenizer_folder: Path
    config: dict[str, Any]
    author: AuthorSettings
    adapter: Adapter | None = None

    def apply_author(self, settings: EngineSettings) -> EngineSettings:
        """Return the settings with the author's prompt, if the user gave none, and length limit."""
        prompt, limit = self.author.query_prompt, self.author.max_tokens
        if prompt and settings.query_instruction is None:
            settings = replace(settings, query_instruction=prompt)
        if limit is not None and limit < settings.max_length:
            settings = replace(settings, max_length=limit)
        return settings


def inspect_checkpoint(folder: Path, settings: EngineSettings) -> CheckpointFiles:
    """Return what a folder holds; the base of an adapter is downloaded if need be.

    Args:
        folder: The folder of a checkpoint or an adapter.
        settings: Where to look for a base.

    Raises:
        CheckpointError: A file is missing or damaged.
        UnsupportedCheckpointError: It is quantised, or needs something that is not supported.
    """
    adapter = read_adapter(folder)
    base = folder if adapter is None else _base_folder(adapter, settings)
    config = read_config(base)
    has_tokenizer = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    return CheckpointFiles(
        folder=base,
        tokenizer_folder=folder if has_tokenizer else base,
        config=config,
        author=read_author_settings(folder, config),
        adapter=adapter,
    )


def _base_folder(adapter: Adapter, settings: EngineSettings) -> Path:
    """Return the folder of an adapter's base."""
    wanted = replace(settings, model=adapter.base, revision=adapter.revision)
    try:
        folder = find_folder(wanted)
    except CheckpointNotFoundError as error:
        raise CheckpointNotFoundError(
            f"{adapter.folder} is a LoRA adapter, whose base {adapter.base!r} is not there: "
            f"{error} Or write the base's folder as base_model_name_or_path into its "
            "adapter_config.json.",
            error.cause,
        ) from None
    if read_adapter(folder) is not None:
        raise CheckpointError(
            f"{adapter.folder} is a LoRA adapter of {folder}, which is an adapter itself; merge "
            "that one with peft's merge_and_unload() first, and save_pretrained() it."
        )
    return folder
