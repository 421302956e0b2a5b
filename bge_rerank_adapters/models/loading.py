"""From a checkpoint's folder to models that are ready to run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from bge_rerank_adapters.errors import CheckpointError, UnsupportedCheckpointError
from bge_rerank_adapters.models.encoder import EncoderModel, is_encoder, parse_config
from bge_rerank_adapters.models.weights import read_config
from bge_rerank_adapters.tokenization import PairTokenizer, TokenPair, load_tokenizer


class Model(Protocol):
    """What the engine needs of a model."""

    device: torch.device
    dtype: torch.dtype

    def logits(self, pairs: Sequence[TokenPair]) -> list[float]:
        """Return the logit of each pair of a pack."""
        ...


def read_encoder_config(folder: Path) -> dict[str, Any]:
    """Return the `config.json` of an encoder.

    Raises:
        CheckpointError: It is missing or damaged.
        UnsupportedCheckpointError: It is one of another kind of model.
    """
    config = read_config(folder)
    if not is_encoder(config):
        raise UnsupportedCheckpointError(
            f"{folder} is a {config.get('model_type', 'model of unknown type')!r} model "
            f"({', '.join(config.get('architectures') or ['no architecture named'])}), which is "
            "not supported yet; supported are one-label XLM-RoBERTa, RoBERTa and BERT "
            "cross-encoders, such as BAAI/bge-reranker-v2-m3."
        )
    return config


def load_pair_tokenizer(
    folder: Path,
    config: dict[str, Any],
    *,
    max_length: int,
    query_max_length: int | None,
    make: Callable[..., PairTokenizer] = PairTokenizer,
) -> PairTokenizer:
    """Return the checkpoint's tokenizer, its lengths clamped to the model's positions.

    Raises:
        CheckpointError: The tokenizer is missing, damaged or of another model.
        SettingsError: The lengths leave no room for a document.
    """
    parsed = parse_config(config, folder=folder)
    tokenizer = load_tokenizer(
        folder,
        max_length=min(max_length, parsed.max_tokens),
        query_max_length=query_max_length,
        make=make,
    )
    if tokenizer.vocabulary > parsed.vocabulary:
        raise CheckpointError(
            f"{folder}: the tokenizer has ids up to {tokenizer.vocabulary - 1}, but the model has "
            f"embeddings for {parsed.vocabulary}; tokenizer and weights are not of one checkpoint."
        )
    return tokenizer


def load_model(
    folder: Path, config: dict[str, Any], *, device: torch.device, dtype: torch.dtype
) -> Model:
    """Return the model on a device.

    Raises:
        CheckpointError: Its weights are missing, damaged or do not fit the config.
        UnsupportedCheckpointError: It is no one-label reranker.
    """
    return EncoderModel(config, folder, device=device, dtype=dtype)
