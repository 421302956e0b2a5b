"""FlagEmbedding's classes for decoders."""

from collections.abc import Sequence
from typing import Any, Unpack

from bge_rerank_adapters.engine.hosted.flag_arguments import Devices
from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.flag_embedding.base import FlagBase, FlagOptions, Pairs, Scores
from bge_rerank_adapters.settings import checks
from bge_rerank_adapters.settings.options import shows_options

Layers = int | Sequence[int] | None

# FlagEmbedding's default, which counts for nothing in a model with fewer layers.
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
        trust_remote_code: bool = False,  # noqa: ARG002 - accepted, see the module
        devices: Devices = None,
        prompt: str | None = None,
        batch_size: int = 128,
        query_max_length: int | None = None,
        max_length: int = 512,
        normalize: bool = False,
        **options: Unpack[FlagOptions],
    ) -> None:
        """Load the model, or share the one that is loaded with equal settings.

        Arguments and errors as of `FlagReranker`. `use_bf16` is what `use_fp16` is, `prompt` what
        the model is asked after the document, and `peft_path` is refused: the folder of an adapter
        is a checkpoint by itself here.
        """
        self.use_fp16 = use_fp16
        super().__init__(
            model_name_or_path,
            half=use_fp16 or use_bf16,
            query_instruction=(query_instruction_for_rerank, query_instruction_format),
            passage_instruction=(passage_instruction_for_rerank, passage_instruction_format),
            cache_dir=cache_dir,
            devices=devices,
            batch_size=batch_size,
            query_max_length=query_max_length,
            max_length=max_length,
            normalize=normalize,
            options=options,
            peft_path=peft_path,
            prompt=prompt,
        )

    def compute_score(
        self,
        sentence_pairs: Pairs,
        *,
        batch_size: int | None = None,
        query_max_length: int | None = None,
        max_length: int | None = None,
        prompt: str | None = None,
        normalize: bool | None = None,
        use_dataloader: bool = False,  # noqa: ARG002 - how it is done there
        num_workers: int | None = None,  # noqa: ARG002
    ) -> Scores:
        """Return the pairs' logits or scores, as `FlagReranker.compute_score`.

        Args:
            sentence_pairs: (query, document) pairs, or a single one; may be empty.
            batch_size: Accepted and not needed, like the last two.
            query_max_length: For this call, like the next three; `None` is as constructed.
            max_length: Most tokens of a pair, to which separator and prompt are added.
            prompt: What the model is asked after the document.
            normalize: Whether scores are in [0, 1].
            use_dataloader: Not needed.
            num_workers: Not needed.
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
    """bge-reranker-v2-minicpm-layerwise, all of whose layers are loaded."""

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
        trust_remote_code: bool = False,  # noqa: ARG002 - accepted, see the module
        devices: Devices = None,
        cutoff_layers: Layers = None,
        prompt: str | None = None,
        batch_size: int = 128,
        query_max_length: int | None = None,
        max_length: int = 512,
        normalize: bool = False,
        **options: Unpack[FlagOptions],
    ) -> None:
        """Load the model; arguments and errors as of `FlagLLMReranker`.

        `cutoff_layers` says after which layers a score is read, ascending; `None` is the last. All
        layers are loaded, so that each call may read others.
        """
        self.cutoff_layers = cutoff_layers
        self.use_fp16 = use_fp16
        super().__init__(
            model_name_or_path,
            half=use_fp16 or use_bf16,
            query_instruction=(query_instruction_for_rerank, query_instruction_format),
            passage_instruction=(passage_instruction_for_rerank, passage_instruction_format),
            cache_dir=cache_dir,
            devices=devices,
            batch_size=batch_size,
            query_max_length=query_max_length,
            max_length=max_length,
            normalize=normalize,
            options=options,
            peft_path=peft_path,
            prompt=prompt,
        )

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
        use_dataloader: bool = False,  # noqa: ARG002 - how it is done there
        num_workers: int | None = None,  # noqa: ARG002
    ) -> Scores | list[Scores]:
        """Return the pairs' logits or scores; for several layers a list of them for each layer.

        Arguments as of `FlagLLMReranker.compute_score`, and:

        Args:
            sentence_pairs: (query, document) pairs, or a single one; may be empty.
            batch_size: Not needed.
            query_max_length: For this call, like the next four; `None` is as constructed.
            max_length: Most tokens of a pair, to which separator and prompt are added.
            cutoff_layers: After which layers a score is read, ascending; all come from one pass.
            prompt: What the model is asked after the document.
            normalize: Whether scores are in [0, 1].
            use_dataloader: Not needed.
            num_workers: Not needed.

        Raises:
            SettingsError: The model gives no score after one of the layers.
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
    """bge-reranker-v2.5-gemma2-lightweight, all of whose layers are loaded."""

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
        trust_remote_code: bool = False,  # noqa: ARG002 - accepted, see the module
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
        """Load the model; arguments and errors as of `LayerWiseFlagLLMReranker`.

        `compress_ratio` says how many of a document's tokens become one, 1, 2, 4 or 8, and
        `compress_layers` before which layers, counted from 0.
        """
        self.cutoff_layers, self.compress_layers = cutoff_layers, compress_layers
        self.compress_ratio = compress_ratio
        self.use_fp16 = use_fp16
        super().__init__(
            model_name_or_path,
            half=use_fp16 or use_bf16,
            query_instruction=(query_instruction_for_rerank, query_instruction_format),
            passage_instruction=(passage_instruction_for_rerank, passage_instruction_format),
            cache_dir=cache_dir,
            devices=devices,
            batch_size=batch_size,
            query_max_length=query_max_length,
            max_length=max_length,
            normalize=normalize,
            options=options,
            peft_path=peft_path,
            prompt=prompt,
        )

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

        Args:
            sentence_pairs: (query, document) pairs, or a single one; may be empty.
            batch_size: Not needed.
            query_max_length: For this call, like all that follow; `None` is as constructed.
            max_length: Most tokens of a pair, to which separator and prompt are added.
            cutoff_layers: After which layers a score is read, ascending; all come from one pass.
            compress_layer: The old name of `compress_layers`.
            compress_layers: Before which layers documents are compressed.
            compress_ratio: How many of a document's tokens become one: 1, 2, 4 or 8.
            prompt: What the model is asked after the document.
            normalize: Whether scores are in [0, 1].

        Raises:
            SettingsError: The model gives no score after one of the layers.
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
        """Return how texts are read, compression included."""
        own = {"compress_ratio": self.compress_ratio, "compress_layers": self.compress_layers}
        settings = own | super()._text_settings(**changes)
        if settings["compress_layers"] in (_COMPRESS_LAYERS, list(_COMPRESS_LAYERS)):
            settings["compress_layers"] = None
        return settings


def _layers(asked: Layers) -> tuple[int, ...]:
    if asked is None:
        return ()
    layers = tuple(asked) if isinstance(asked, Sequence) else (asked,)
    if not layers:
        raise SettingsError("cutoff_layers must name at least one layer, got []; None is the last.")
    return tuple(checks.count("cutoff_layers", layer) for layer in layers)
