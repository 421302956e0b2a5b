"""Loads tokenizers and models from a checkpoint's folder."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer

from bge_rerank_adapters.engine.checkpoints.inspection import CheckpointFiles, inspect_checkpoint
from bge_rerank_adapters.engine.models.base import Model
from bge_rerank_adapters.engine.models.causal.config import check_language_model
from bge_rerank_adapters.engine.models.device_faults import as_device_errors
from bge_rerank_adapters.engine.models.devices import resolve_dtype
from bge_rerank_adapters.engine.models.encoder.plain import check_plain_attention
from bge_rerank_adapters.engine.models.families import FAMILIES, Family, Sizes, family_of
from bge_rerank_adapters.engine.models.flag import FlagModel, TextPairTokenizer
from bge_rerank_adapters.engine.models.precision import warn_of_matmul_precision
from bge_rerank_adapters.engine.models.source import ModelSource
from bge_rerank_adapters.engine.models.unsupported import unsupported_message
from bge_rerank_adapters.engine.text.decoder_classes import apply_decoder_config
from bge_rerank_adapters.engine.text.tokenizer import PairTokenizer
from bge_rerank_adapters.engine.text.tokenizer_config import apply_config, check_truncation_side
from bge_rerank_adapters.engine.text.tokenizer_files import load_tokenizer
from bge_rerank_adapters.engine.text.windows import tokenizer_maker
from bge_rerank_adapters.errors import CheckpointError, UnsupportedCheckpointError
from bge_rerank_adapters.settings import EngineSettings
from bge_rerank_adapters.settings.families import check_family_settings


@dataclass(frozen=True, slots=True)
class LocalCheckpoint:
    """A checkpoint's folder, read as far as its config.

    Attributes:
        files: The files in it.
        family: The family that runs it.
        native: Whether it runs in the native backend.
    """

    files: CheckpointFiles
    family: Family
    native: bool = True


def read_checkpoint(folder: Path, settings: EngineSettings) -> LocalCheckpoint:
    """Return the checkpoint in a folder, and check that the settings fit it.

    Raises:
        CheckpointError: The config is missing or damaged.
        UnsupportedCheckpointError: The model is not supported.
        SettingsError: Its family does not allow a setting.
    """
    files = inspect_checkpoint(folder, settings)
    folder, config = files.folder, files.config
    family = FAMILIES[settings.family] if settings.family else family_of(config)
    if settings.backend == "flagembedding":
        # FlagEmbedding supports more types of encoders.
        family = family or FAMILIES["encoder"]
    elif family is None or not family.runs(config):
        types = {name: (*each.model_types, *each.asked_types) for name, each in FAMILIES.items()}
        raise UnsupportedCheckpointError(
            unsupported_message(folder, config, families=types, asked=settings.family)
        )
    check_family_settings(
        family.name, {each.name: getattr(settings, each.name) for each in fields(settings)}
    )
    if not family.classifier:
        check_language_model(config, folder=folder)
    native = settings.backend == "native"
    if not native:
        _check_flag_runs(files)
    return LocalCheckpoint(files, family, native)


def _check_flag_runs(files: CheckpointFiles) -> None:
    """Refuse checkpoints that FlagEmbedding's classes would read differently."""
    if files.adapter is not None:
        raise UnsupportedCheckpointError(
            f"{files.adapter.folder} is a LoRA adapter, which is merged with its base only in "
            'backend="native"; use that, or merge it with merge_and_unload() of peft and '
            "give the folder of the whole model."
        )
    if files.author.lowercase:
        raise UnsupportedCheckpointError(
            f"{files.folder}: its sentence-transformers config has do_lower_case, which "
            'FlagEmbedding does not read; use backend="native".'
        )


def load_pair_tokenizer(checkpoint: LocalCheckpoint, settings: EngineSettings) -> PairTokenizer:
    """Return the checkpoint's tokenizer, with lengths clamped to the model's positions.

    Raises:
        CheckpointError: The tokenizer is missing, damaged or of another model.
        SettingsError: The lengths leave no room for a document.
    """
    folder, sizes = checkpoint.files.tokenizer_folder, _sizes(checkpoint)
    settings = checkpoint.files.apply_author(settings)
    native, family = settings.backend == "native", checkpoint.family
    if native:
        check_truncation_side(folder)
    tokenizer = load_tokenizer(
        folder,
        max_length=min(settings.max_length, sizes.max_tokens),
        query_max_length=settings.query_max_length,
        template=partial(family.template, settings, folder, checkpoint.files.config),
        lowercase=checkpoint.files.author.lowercase,
        apply=_apply_files(checkpoint) if native else None,
        make=tokenizer_maker(settings) if native else TextPairTokenizer,
    )
    try:
        tokenizer.limit_ids(sizes.vocabulary)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    return tokenizer


def _apply_files(checkpoint: LocalCheckpoint) -> Callable[[Tokenizer, Path], None]:
    """Return what sets a tokenizer as the files beside `tokenizer.json` say."""
    config = checkpoint.files.config
    if checkpoint.family.classifier:
        return partial(apply_config, model_type=config["model_type"])
    return partial(apply_decoder_config, model_config=config)


def load_models(
    checkpoint: LocalCheckpoint,
    settings: EngineSettings,
    *,
    tokenizer: PairTokenizer,
    devices: Sequence[torch.device],
) -> list[Model]:
    """Return a copy of the model on each device; raises what `load_model` raises."""
    models = []
    for device in devices:
        with as_device_errors(device):
            models.append(load_model(checkpoint, settings, tokenizer=tokenizer, device=device))
    return models


def load_model(
    checkpoint: LocalCheckpoint,
    settings: EngineSettings,
    *,
    tokenizer: PairTokenizer,
    device: torch.device,
) -> Model:
    """Return the model on a device.

    Raises:
        CheckpointError: Its weights are missing, damaged or do not fit the config.
        UnsupportedCheckpointError: It is not a reranker with one label.
        SettingsError: A layer in the settings does not exist in the model.
        DeviceError: The device cannot run the dtype, or has too little memory.
    """
    family, files = checkpoint.family, checkpoint.files
    settings = files.apply_author(settings)
    if settings.backend == "flagembedding":
        model = FlagModel(
            files.folder,
            settings,
            family=family,
            max_length=tokenizer.max_length,
            query_max_length=tokenizer.query_max_length,
            device=device,
        )
        check_plain_attention(device, model.dtype)
        warn_of_matmul_precision(device, model.dtype)
        return model
    dtype = resolve_dtype(settings.dtype, device, wide_range=family.wide_range)
    warn_of_matmul_precision(device, dtype)
    return family.load(
        ModelSource(files.config, files.folder, files.adapter, settings, tokenizer, device, dtype)
    )


@dataclass(frozen=True, slots=True)
class _UnknownSizes:
    """The sizes of a model that only FlagEmbedding can run."""

    max_tokens: int = sys.maxsize
    vocabulary: int = sys.maxsize


def max_tokens(checkpoint: LocalCheckpoint) -> int:
    """Return the maximum tokens of a pair, by the model's positions."""
    return _sizes(checkpoint).max_tokens


def _sizes(checkpoint: LocalCheckpoint) -> Sizes:
    family, config = checkpoint.family, checkpoint.files.config
    if not family.runs(config):
        return _UnknownSizes()
    try:
        return family.read_sizes(config, folder=checkpoint.files.folder)
    except UnsupportedCheckpointError:
        if checkpoint.native or family.classifier:
            raise
        # FlagEmbedding may run it, by transformers' own class.
        return _UnknownSizes()
