"""FlagEmbedding's classes for decoders."""

from collections.abc import Sequence
from typing import Any, Unpack

from bge_rerank_adapters.engine.hosted.flag_arguments import Devices
from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.flag_embedding.base import (
    FlagBase,
    FlagOptions,
    Pairs,
    Scores,
    shared_arguments,
)
from bge_rerank_adapters.settings import checks
from bge_rerank_adapters.settings.options import shows_options

Layers = int | Sequence[int] | None

# FlagEmbedding's default, which is ignored by models with fewer layers.
_COMPRESS_LAYERS = (8,)


class FlagLLMReranker(FlagBase):
    """Decoders that answer Yes or No, such as bge-reranker-v2-gemma."""

    family = "decoder"

    @shows_options(FlagOptions)
    def __init__(
        self,
        model_name_or_path: str,
        peft_path: str | None = None,
        use_fp16: bool = False,
        use_bf16: bool = False,
        query_instruction_for_rerank: str | None = "A: ",
        query_instruction_format: str = "{}{}",
        passage_instruction_for_rerank: str | None = "B: ",
        passage_instruction_format: str = "{}{}",
        cache_dir: str | None = None,
        trust_remote_code: bool = False,
        devices: Devices = None,
        prompt: str | None = None,
        batch_size: int = 128,
        query_max_length: int | None = None,
        max_length: int = 512,
        normalize: bool = False,
        **options: Unpack[FlagOptions],
    ) -> None:
        """Load the model, or share the one that is loaded with equal settings.

        Arguments and errors as for `FlagReranker`, and: `use_bf16` means the same as `use_fp16`,
        `prompt` is the text after the document, and `peft_path` is refused, since the folder of an
        adapter is given as the model here.
        """
        super().__init__(**shared_arguments(locals()))

    def compute_score(
        self,
        sentence_pairs: Pairs,
        *,
        batch_size: int | None = None,
        query_max_length: int | None = None,
        max_length: int | None = None,
        prompt: str | None = None,
        normalize: bool | None = None,
        use_dataloader: bool = False,  # noqa: ARG002 - accepted, not needed
        num_workers: int | None = None,  # noqa: ARG002
    ) -> Scores:
        """Return the pairs' logits or scores, as `FlagReranker.compute_score`.

        Its arguments too, and: `prompt` is the text after the document, which comes on top of
        `max_length`; `use_dataloader` and `num_workers` are not needed.
        """
        scores: Scores = self._compute(
            sentence_pairs,
            batch_size=batch_size,
            normalize=normalize,
            query_max_length=query_max_length,
            max_length=max_length,
            prompt=prompt,
        )
        return scores


class LayerWiseFlagLLMReranker(FlagBase):
    """bge-reranker-v2-minicpm-layerwise, with all its layers loaded."""

    family = "layerwise"

    @shows_options(FlagOptions)
    def __init__(
        self,
        model_name_or_path: str,
        peft_path: str | None = None,
        use_fp16: bool = False,
        use_bf16: bool = False,
        query_instruction_for_rerank: str | None = "A: ",
        query_instruction_format: str = "{}{}",
        passage_instruction_for_rerank: str | None = "B: ",
        passage_instruction_format: str = "{}{}",
        cache_dir: str | None = None,
        trust_remote_code: bool = False,
        devices: Devices = None,
        cutoff_layers: Layers = None,
        prompt: str | None = None,
        batch_size: int = 128,
        query_max_length: int | None = None,
        max_length: int = 512,
        normalize: bool = False,
        **options: Unpack[FlagOptions],
    ) -> None:
        """Load the model; arguments and errors as for `FlagLLMReranker`, and `cutoff_layers`.

        These are the layers whose scores are read, ascending; `None` is the last. All layers are
        loaded, since each call may read others.
        """
        self.cutoff_layers = cutoff_layers
        super().__init__(**shared_arguments(locals()))

    def compute_score(
        self,
        sentence_pairs: Pairs,
        *,
        batch_size: int | None = None,
        query_max_length: int | None = None,
        max_length: int | None = None,
        cutoff_layers: Layers = None,
        prompt: str | None = None,
        normalize: bool | None = None,
        use_dataloader: bool = False,  # noqa: ARG002 - accepted, not needed
        num_workers: int | None = None,  # noqa: ARG002
    ) -> Scores | list[Scores]:
        """Return the pairs' logits or scores; for several layers a list of them for each layer.

        Arguments as for `FlagLLMReranker.compute_score`, and: `cutoff_layers` are the layers whose
        scores are read, ascending, all from one forward pass.

        Raises:
            SettingsError: The model has no score for one of the layers.
        """
        scores: Scores | list[Scores] = self._compute(
            sentence_pairs,
            batch_size=batch_size,
            normalize=normalize,
            layers=_layers(self.cutoff_layers if cutoff_layers is None else cutoff_layers),
            query_max_length=query_max_length,
            max_length=max_length,
            prompt=prompt,
        )
        return scores


class LightWeightFlagLLMReranker(FlagBase):
    """bge-reranker-v2.5-gemma2-lightweight, with all its layers loaded."""

    family = "lightweight"

    @shows_options(FlagOptions)
    def __init__(
        self,
        model_name_or_path: str,
        peft_path: str | None = None,
        use_fp16: bool = False,
        use_bf16: bool = False,
        query_instruction_for_rerank: str | None = "A: ",
        query_instruction_format: str = "{}{}",
        passage_instruction_for_rerank: str | None = "B: ",
        passage_instruction_format: str = "{}{}",
        cache_dir: str | None = None,
        trust_remote_code: bool = False,
        devices: Devices = None,
        cutoff_layers: Layers = None,
        compress_layers: Layers = _COMPRESS_LAYERS,
        compress_ratio: int = 1,
        prompt: str | None = None,
        batch_size: int = 128,
        query_max_length: int | None = None,
        max_length: int = 512,
        normalize: bool = False,
        **options: Unpack[FlagOptions],
    ) -> None:
        """Load the model; arguments and errors as for `LayerWiseFlagLLMReranker`, and compression.

        `compress_ratio` tokens of a document (1, 2, 4 or 8) are merged into one before each of
        `compress_layers`, counted from 0.
        """
        self.cutoff_layers, self.compress_layers = cutoff_layers, compress_layers
        self.compress_ratio = compress_ratio
        super().__init__(**shared_arguments(locals()))

    def compute_score(
        self,
        sentence_pairs: Pairs,
        *,
        batch_size: int | None = None,
        query_max_length: int | None = None,
        max_length: int | None = None,
        cutoff_layers: Layers = None,
        compress_layer: Layers = None,
        compress_layers: Layers = None,
        compress_ratio: int | None = None,
        prompt: str | None = None,
        normalize: bool | None = None,
    ) -> Scores | list[Scores]:
        """Return the pairs' logits or scores; for several layers a list of them for each layer.

        Arguments as for `LayerWiseFlagLLMReranker.compute_score`, and those of the constructor for
        compression; `compress_layer` is an old name of `compress_layers`.

        Raises:
            SettingsError: The model has no score for one of the layers.
        """
        scores: Scores | list[Scores] = self._compute(
            sentence_pairs,
            batch_size=batch_size,
            normalize=normalize,
            layers=_layers(self.cutoff_layers if cutoff_layers is None else cutoff_layers),
            query_max_length=query_max_length,
            max_length=max_length,
            prompt=prompt,
            compress_layers=compress_layers if compress_layer is None else compress_layer,
            compress_ratio=compress_ratio,
        )
        return scores

    def _text_settings(self, **changes: Any) -> dict[str, Any]:
        """Return the settings for reading texts, with those of compression."""
        own = {"compress_ratio": self.compress_ratio, "compress_layers": self.compress_layers}
        settings = own | super()._text_settings(**changes)
        if settings["compress_layers"] in (_COMPRESS_LAYERS, list(_COMPRESS_LAYERS)):
            settings["compress_layers"] = None
        return settings


def _layers(given: Layers) -> tuple[int, ...]:
    if given is None:
        return ()
    layers = tuple(given) if isinstance(given, Sequence) else (given,)
    if not layers:
        raise SettingsError("cutoff_layers must name at least one layer, got []; None is the last.")
    return tuple(checks.count("cutoff_layers", layer) for layer in layers)
