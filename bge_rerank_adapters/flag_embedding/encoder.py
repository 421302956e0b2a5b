"""FlagEmbedding's class for encoders."""

from typing import Unpack

from bge_rerank_adapters.engine.hosted.flag_arguments import Devices
from bge_rerank_adapters.flag_embedding.base import (
    FlagBase,
    FlagOptions,
    Pairs,
    Scores,
    shared_arguments,
)
from bge_rerank_adapters.settings.options import shows_options


class FlagReranker(FlagBase):
    """Encoders: bge-reranker-base, -large and -v2-m3, and models fine-tuned from them."""

    family = "encoder"
    instructions = (None, None)

    @shows_options(FlagOptions)
    def __init__(
        self,
        model_name_or_path: str,
        use_fp16: bool = False,
        query_instruction_for_rerank: str | None = None,
        query_instruction_format: str = "{}{}",
        passage_instruction_for_rerank: str | None = None,
        passage_instruction_format: str = "{}{}",
        trust_remote_code: bool = False,
        cache_dir: str | None = None,
        devices: Devices = None,
        batch_size: int = 128,
        query_max_length: int | None = None,
        max_length: int = 512,
        normalize: bool = False,
        **options: Unpack[FlagOptions],
    ) -> None:
        """Load the model, or share the one that is loaded with equal settings.

        Args:
            model_name_or_path: A folder, a name on the hub, or `"tiny"` for the bundled checkpoint.
            use_fp16: The fastest half or full precision that the device runs natively; `False` is
                float32.
            query_instruction_for_rerank: Text before the query, in `query_instruction_format`.
            query_instruction_format: Format string with two fields: the instruction and the query.
            passage_instruction_for_rerank: The same for documents.
            passage_instruction_format: The same for documents.
            trust_remote_code: No code of a checkpoint is run, whatever this says.
            cache_dir: Folder of the hub's cache.
            devices: One device or a list; a number is a CUDA device; `None` chooses one.
            batch_size: Accepted and not needed: packs are built by tokens.
            query_max_length: Maximum tokens of the query; `None` is three quarters of `max_length`.
            max_length: Maximum tokens of a pair.
            normalize: Whether scores are in [0, 1]; else they are logits.
            **options: The engine's other settings.

        Raises:
            TypeError: There is no argument of that name.
            SettingsError: An argument has a value that is not allowed.
            CheckpointError: The checkpoint cannot be found or used.
            DeviceError: The device does not exist.
        """
        super().__init__(**shared_arguments(locals()))

    def compute_score(
        self,
        sentence_pairs: Pairs,
        *,
        batch_size: int | None = None,
        query_max_length: int | None = None,
        max_length: int | None = None,
        normalize: bool | None = None,
    ) -> Scores:
        """Return the pairs' logits, or scores in [0, 1] with `normalize`, in input order.

        Args:
            sentence_pairs: (query, document) pairs, or a single one; may be empty.
            batch_size: Accepted and not needed: packs are built by tokens.
            query_max_length: Maximum tokens of the query for this call; `None` is as constructed.
            max_length: Maximum tokens of a pair, likewise.
            normalize: Whether scores are in [0, 1], likewise.

        Raises:
            InputTypeError: A pair is not two `str`; the message names which.
            SettingsError: The lengths leave no room for a document.
            RerankError: The model failed.
        """
        scores: Scores = self._compute(
            sentence_pairs,
            batch_size=batch_size,
            normalize=normalize,
            query_max_length=query_max_length,
            max_length=max_length,
        )
        return scores
