"""From a checkpoint's folder to models that are ready to run."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer

from bge_rerank_adapters.engine.models.causal.config import parse_gemma, parse_gemma2, parse_minicpm
from bge_rerank_adapters.engine.models.causal.decoder import DecoderModel
from bge_rerank_adapters.engine.models.causal.layerwise import LayerwiseModel
from bge_rerank_adapters.engine.models.causal.lightweight import LightweightModel
from bge_rerank_adapters.engine.models.cpu.streams import StreamedModel, stream_count
from bge_rerank_adapters.engine.models.devices import resolve_dtype
from bge_rerank_adapters.engine.models.encoder.config import ENCODER_TYPES, parse_config
from bge_rerank_adapters.engine.models.encoder.model import EncoderModel
from bge_rerank_adapters.engine.models.flag import FlagModel, TextPairTokenizer
from bge_rerank_adapters.engine.models.weights import read_config
from bge_rerank_adapters.engine.text.prompts import YES, decoder_template
from bge_rerank_adapters.engine.text.tokenizer import (
    PairTemplate,
    PairTokenizer,
    TokenPair,
    load_tokenizer,
    read_template,
)
from bge_rerank_adapters.engine.text.windows import tokenizer_maker
from bge_rerank_adapters.errors import CheckpointError, UnsupportedCheckpointError
from bge_rerank_adapters.settings import EngineSettings
from bge_rerank_adapters.settings.families import check_family_settings

_SAMPLE_PAIRS = Path(__file__).parent / "cpu/onednn/sample-pairs.json"
# The kinds of models that each family can run, by their `model_type`.
_TYPES: dict[str, tuple[str, ...]] = {
    "encoder": ENCODER_TYPES,
    "decoder": ("gemma",),
    "layerwise": ("minicpm",),
    "lightweight": ("cost_wise_gemma",),
}


class Model(Protocol):
    """What the engine needs of a model.

    Attributes:
        device: Where it runs.
        dtype: Of weights and activations.
        streams: How many threads run pairs of a pack side by side; 1 runs the pack as a whole.
        pack_tokens: Token budget of a pack that suits it on this device.
    """

    device: torch.device
    dtype: torch.dtype
    streams: int
    pack_tokens: int

    def logits(self, pairs: Sequence[TokenPair]) -> list[float]:
        """Return the logit of each pair of a pack."""
        ...


class _Sizes(Protocol):
    """What tokenizing needs of a model's config."""

    @property
    def max_tokens(self) -> int: ...

    @property
    def vocabulary(self) -> int: ...


@dataclass(frozen=True, slots=True)
class LocalCheckpoint:
    """A checkpoint's folder, read as far as its config.

    Attributes:
        folder: Holds config, tokenizer and weights.
        config: Its `config.json`.
        family: How it is run.
    """

    folder: Path
    config: dict[str, Any]
    family: str


def read_checkpoint(folder: Path, settings: EngineSettings) -> LocalCheckpoint:
    """Return what a folder holds, and check that the settings fit it.

    Raises:
        CheckpointError: The config is missing or damaged.
        UnsupportedCheckpointError: It is one of another kind of model.
        SettingsError: A setting does not belong to its family.
    """
    config = read_config(folder)
    family = settings.family or _family(config)
    if settings.backend == "flagembedding":
        # It has encoders of many more kinds.
        family = family or "encoder"
    elif family is None or config.get("model_type") not in _TYPES[family]:
        raise UnsupportedCheckpointError(_not_supported(folder, config, settings.family))
    check_family_settings(
        family, {each.name: getattr(settings, each.name) for each in fields(settings)}
    )
    return LocalCheckpoint(folder, config, family)


def load_pair_tokenizer(checkpoint: LocalCheckpoint, settings: EngineSettings) -> PairTokenizer:
    """Return the checkpoint's tokenizer, its lengths clamped to the model's positions.

    Raises:
        CheckpointError: The tokenizer is missing, damaged or of another model.
        SettingsError: The lengths leave no room for a document.
    """
    folder, sizes = checkpoint.folder, _sizes(checkpoint)
    tokenizer = load_tokenizer(
        folder,
        max_length=min(settings.max_length, sizes.max_tokens),
        query_max_length=settings.query_max_length,
        template=_template(checkpoint, settings),
        make=(
            TextPairTokenizer if settings.backend == "flagembedding" else tokenizer_maker(settings)
        ),
    )
    if tokenizer.vocabulary > sizes.vocabulary:
        raise CheckpointError(
            f"{folder}: the tokenizer has ids up to {tokenizer.vocabulary - 1}, but the model has "
            f"embeddings for {sizes.vocabulary}; tokenizer and weights are not of one checkpoint."
        )
    return tokenizer


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
        UnsupportedCheckpointError: It is no one-label reranker.
        SettingsError: A layer is asked for that the model has not.
        DeviceError: The device cannot run the dtype.
    """
    family = checkpoint.family
    if settings.backend == "flagembedding":
        return FlagModel(
            checkpoint.folder,
            settings,
            family=family,
            max_length=tokenizer.max_length,
            query_max_length=tokenizer.query_max_length,
            device=device,
        )
    dtype = resolve_dtype(settings.dtype, device, wide_range=family != "encoder")
    make = _makers(settings)[family]
    if family == "encoder":
        make = partial(make, sample=lambda: tokenizer.tokenize(_sample_pairs()).distinct)
    if family == "decoder":
        make = partial(make, yes_id=tokenizer.first_id(YES))
    model = make(checkpoint.config, checkpoint.folder, device=device, dtype=dtype)
    streams = stream_count(
        device,
        getattr(model, "layer_dtype", dtype),
        own_kernels=getattr(model, "own_kernels", False),
    )
    return StreamedModel(model, streams) if streams > 1 else model


def _sample_pairs() -> list[tuple[str, str]]:
    """Return questions and passages of several kinds and languages."""
    samples = json.loads(_SAMPLE_PAIRS.read_text(encoding="utf-8"))
    return [(each["query"], each["document"]) for each in samples]


def _makers(settings: EngineSettings) -> dict[str, Callable[..., Model]]:
    """Return for each family what makes its model, with the settings that are its own."""
    return {
        "encoder": EncoderModel,
        "decoder": DecoderModel,
        "layerwise": partial(LayerwiseModel, cutoff_layer=settings.cutoff_layers),
        "lightweight": partial(
            LightweightModel,
            cutoff_layer=settings.cutoff_layers,
            compress_ratio=settings.compress_ratio or 1,
            compress_layers=settings.compress_layers,
        ),
    }


def _family(config: dict[str, Any]) -> str | None:
    """Return the family that a config tells of, if any."""
    for family, types in _TYPES.items():
        if config.get("model_type") in types:
            return family
    return None


@dataclass(frozen=True, slots=True)
class _UnknownSizes:
    """Of a kind of model that FlagEmbedding runs and this package does not."""

    max_tokens: int = sys.maxsize
    vocabulary: int = sys.maxsize


def _sizes(checkpoint: LocalCheckpoint) -> _Sizes:
    if checkpoint.config.get("model_type") not in _TYPES[checkpoint.family]:
        return _UnknownSizes()
    parse: dict[str, Callable[..., _Sizes]] = {
        "encoder": parse_config,
        "decoder": parse_gemma,
        "layerwise": parse_minicpm,
        "lightweight": parse_gemma2,
    }
    return parse[checkpoint.family](checkpoint.config, folder=checkpoint.folder)


def _template(
    checkpoint: LocalCheckpoint, settings: EngineSettings
) -> Callable[[Tokenizer], PairTemplate]:
    if checkpoint.family == "encoder":
        return partial(
            _with_instructions, settings.query_instruction or "", settings.passage_instruction or ""
        )
    return partial(
        decoder_template,
        folder=checkpoint.folder,
        family=checkpoint.family,
        prompt=settings.prompt,
        query_instruction=settings.query_instruction,
        passage_instruction=settings.passage_instruction,
    )


def _with_instructions(query: str, passage: str, tokenizer: Tokenizer) -> PairTemplate:
    template = read_template(tokenizer)
    return replace(template, query_instruction=query, passage_instruction=passage)


def _not_supported(folder: Path, config: dict[str, Any], asked: str | None) -> str:
    kind = config.get("model_type", "model of unknown type")
    named = ", ".join(config.get("architectures") or ["no architecture named"])
    types = "; ".join(f"{family}: {', '.join(each)}" for family, each in _TYPES.items())
    wanted = "" if asked is None else f" as one of the {asked} family, which family= asks for"
    return (
        f"{folder} is a {kind!r} model ({named}), which is not supported{wanted}; supported are "
        f"these model types of each family: {types}."
    )
