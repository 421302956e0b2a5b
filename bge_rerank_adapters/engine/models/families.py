"""The families of rerankers and how their models are run, one row each."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer

from bge_rerank_adapters.engine.models.base import Model, NativeModel
from bge_rerank_adapters.engine.models.causal.config import parse_causal
from bge_rerank_adapters.engine.models.causal.cutoff import HeadLayers
from bge_rerank_adapters.engine.models.causal.decoder import DecoderModel
from bge_rerank_adapters.engine.models.causal.layerwise import LayerwiseModel, layerwise_heads
from bge_rerank_adapters.engine.models.causal.lightweight import LightweightModel, lightweight_heads
from bge_rerank_adapters.engine.models.cpu.streams import stream_count, with_streams
from bge_rerank_adapters.engine.models.encoder.config import ENCODER_TYPES, parse_config
from bge_rerank_adapters.engine.models.encoder.model import EncoderModel
from bge_rerank_adapters.engine.models.source import ModelSource
from bge_rerank_adapters.engine.text.beginning import Beginning
from bge_rerank_adapters.engine.text.pairs import PairTemplate
from bge_rerank_adapters.engine.text.prompts import (
    CONTAINS_ANSWER,
    YES_OR_NO,
    PromptStyle,
    decoder_template,
)
from bge_rerank_adapters.engine.text.tokenizer import read_template
from bge_rerank_adapters.settings import EngineSettings


class Sizes(Protocol):
    """The sizes of a model that its tokenizer depends on."""

    @property
    def max_tokens(self) -> int:
        """Maximum tokens of a pair."""
        ...

    @property
    def vocabulary(self) -> int:
        """Number of embeddings."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family.

    Attributes:
        name: The name in the settings.
        model_types: Values of `model_type` in `config.json` that identify the family.
        asked_types: Further values that it runs if the settings name the family. Most models of
            these types are not rerankers, or need another prompt.
        read_sizes: Returns the sizes of a config, given also `folder=`; checks the config.
        template: Returns the template around a pair, from the settings, the tokenizer's folder, the
            model's config and the tokenizer.
        load: Loads the model.
        wide_range: Whether activations may be too large for float16.
        classifier: Whether the logit comes from a classification head.
        heads: Returns the layers with heads of a config, given also `folder=`, if calls may choose
            among several.
        flag_class: The name of FlagEmbedding's class.
    """

    name: str
    model_types: tuple[str, ...]
    read_sizes: Callable[..., Sizes]
    template: Callable[[EngineSettings, Path, dict[str, Any], Tokenizer], PairTemplate]
    load: Callable[[ModelSource], Model]
    wide_range: bool = True
    classifier: bool = False
    heads: Callable[..., HeadLayers] | None = None
    flag_class: str
    asked_types: tuple[str, ...] = ()

    def runs(self, config: dict[str, Any]) -> bool:
        """Return whether this package can run a config's model type as one of the family."""
        return config.get("model_type") in (*self.model_types, *self.asked_types)


def family_of(config: dict[str, Any]) -> Family | None:
    """Return the family that a config's model type identifies, if any."""
    kind = config.get("model_type")
    return next((family for family in FAMILIES.values() if kind in family.model_types), None)


def _encoder_template(
    settings: EngineSettings, folder: Path, config: dict[str, Any], tokenizer: Tokenizer
) -> PairTemplate:
    del folder, config
    return replace(
        read_template(tokenizer),
        query_instruction=settings.query_instruction or "",
        passage_instruction=settings.passage_instruction or "",
    )


def _prompted(
    style: PromptStyle,
    settings: EngineSettings,
    folder: Path,
    config: dict[str, Any],
    tokenizer: Tokenizer,
) -> PairTemplate:
    return decoder_template(
        tokenizer,
        Beginning(folder, config),
        style=style,
        prompt=settings.prompt,
        query_instruction=settings.query_instruction,
        passage_instruction=settings.passage_instruction,
    )


def _load_encoder(source: ModelSource) -> Model:
    model = EncoderModel(source)
    streams = model.kit.stream_count()
    return with_streams(model, streams, small=model.kit.small_pack(streams))


def _load_decoder(make: Callable[[ModelSource], NativeModel], source: ModelSource) -> Model:
    return with_streams(make(source), stream_count(source.device, source.dtype))


_ROWS = (
    Family(
        name="encoder",
        model_types=ENCODER_TYPES,
        read_sizes=parse_config,
        template=_encoder_template,
        load=_load_encoder,
        wide_range=False,
        classifier=True,
        flag_class="FlagReranker",
    ),
    Family(
        name="decoder",
        model_types=("gemma",),
        asked_types=("llama", "mistral", "qwen2", "qwen3"),
        read_sizes=parse_causal,
        template=partial(_prompted, PromptStyle(YES_OR_NO)),
        load=partial(_load_decoder, DecoderModel),
        flag_class="FlagLLMReranker",
    ),
    Family(
        name="layerwise",
        model_types=("minicpm",),
        read_sizes=parse_causal,
        template=partial(_prompted, PromptStyle(YES_OR_NO, needs_bos=True)),
        load=partial(_load_decoder, LayerwiseModel),
        heads=layerwise_heads,
        flag_class="LayerWiseFlagLLMReranker",
    ),
    Family(
        name="lightweight",
        model_types=("cost_wise_gemma",),
        read_sizes=parse_causal,
        template=partial(_prompted, PromptStyle(CONTAINS_ANSWER, needs_bos=True)),
        load=partial(_load_decoder, LightweightModel),
        heads=lightweight_heads,
        flag_class="LightWeightFlagLLMReranker",
    ),
)
FAMILIES = {family.name: family for family in _ROWS}
