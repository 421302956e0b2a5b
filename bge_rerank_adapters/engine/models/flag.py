"""Runs models by FlagEmbedding's own classes, behind the engine's interface.

The classes are those of FlagEmbedding 1.4 (`inference/auto_reranker.py`). They are used with one
device, without progress bars, and never with an empty list or with a checkpoint's own code.
"""

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bge_rerank_adapters.engine.checkpoints.model_config import read_config
from bge_rerank_adapters.engine.models.base import PendingLogits, default_pack_tokens
from bge_rerank_adapters.engine.models.device_faults import is_out_of_memory
from bge_rerank_adapters.engine.models.encoder.config import parse_config
from bge_rerank_adapters.engine.models.encoder.tensors import check_one_label
from bge_rerank_adapters.engine.models.families import Family
from bge_rerank_adapters.engine.models.lora import open_weights
from bge_rerank_adapters.engine.models.missing_weights import missing_weights, missing_weights_error
from bge_rerank_adapters.engine.models.progress_bars import without_bars, without_loading_bar
from bge_rerank_adapters.engine.text.pairs import Lengths, TokenizedPairs, TokenPair
from bge_rerank_adapters.engine.text.tokenizer import PairTokenizer, without_surrogates
from bge_rerank_adapters.errors import DeviceError, SettingsError, UnsupportedCheckpointError
from bge_rerank_adapters.settings import EngineSettings
from bge_rerank_adapters.settings.token_limits import TokenLimits

# The release of transformers on which all of FlagEmbedding 1.4.2's classes run.
_WORKING_TRANSFORMERS = "4.44.2"


@dataclass(frozen=True, slots=True)
class TextPair(TokenPair):
    """A tokenised pair with its texts, which FlagEmbedding tokenises itself.

    Attributes:
        query: The query.
        document: The document.
    """

    query: str = ""
    document: str = ""


class TextPairTokenizer(PairTokenizer):
    """Counts tokens, finds what is cut, and keeps the texts."""

    def lengths(self, limits: TokenLimits) -> Lengths:
        """Refuse limits of one call that would cut a text: FlagEmbedding has no such option.

        Raises:
            SettingsError: A limit would cut a text.
        """
        lengths = super().lengths(limits)
        if lengths.query < self.query_max_length or self.max_length > min(
            lengths.pair, lengths.document
        ):
            given = ", ".join(f"{name}={tokens}" for name, tokens in limits.given().items())
            raise SettingsError(
                f"{given} needs backend='native', got 'flagembedding'; leave it out, or set "
                "max_length and query_max_length where the engine is made."
            )
        return lengths

    def tokenize(
        self, pairs: Sequence[tuple[str, str]], lengths: Lengths | None = None
    ) -> TokenizedPairs:
        """Return the distinct pairs with their texts; see `PairTokenizer.tokenize`."""
        tokenized = super().tokenize(pairs, lengths)
        return TokenizedPairs(
            [_with_texts(pair, *pairs[pair.index]) for pair in tokenized.distinct],
            tokenized.positions,
        )


def _with_texts(pair: TokenPair, query: str, document: str) -> TextPair:
    values = {each.name: getattr(pair, each.name) for each in fields(TokenPair)}
    return TextPair(
        **values, query=without_surrogates(query), document=without_surrogates(document)
    )


class FlagModel:
    """A reranker of FlagEmbedding's on one device.

    Attributes:
        device: The device.
        dtype: The dtype of weights and activations.
        streams: 1, since a pack is run as a whole.
        pack_tokens: Token budget of a pack.
        runs_ahead: False: FlagEmbedding waits for the device.
    """

    streams = 1
    runs_ahead = False

    def __init__(
        self,
        folder: Path,
        settings: EngineSettings,
        *,
        family: Family,
        max_length: int,
        query_max_length: int,
        device: torch.device,
    ) -> None:
        """Load the model.

        Args:
            folder: The checkpoint's folder.
            settings: The engine's settings.
            family: The checkpoint's family, which decides the class.
            max_length: Maximum tokens of a pair.
            query_max_length: Maximum tokens of the query.
            device: The device.

        Raises:
            ImportError: FlagEmbedding is not installed.
            CheckpointError: There are no safetensors, or they lack the head.
            UnsupportedCheckpointError: Its class does not run with this release of transformers,
                or cannot load the checkpoint, or the model gives several labels.
            DeviceError: It cannot run the dtype on the device.
        """
        self.device, self.pack_tokens = device, default_pack_tokens(device)
        self.dtype = _dtype(settings.dtype, family, device)
        make = _flag_class(family)
        prefix = _check_weights(folder, family)
        options = _options(settings, family, self.dtype, device) | {
            "max_length": max_length,
            "query_max_length": query_max_length,
        }
        # The lightweight class raises SystemExit if its modelling code cannot be imported.
        with _unsupported_errors(folder, family), without_loading_bar():
            self._reranker = make(str(folder), **options)
            self._reranker.use_fp16 = self.dtype == torch.float16
            # transformers 5 keeps the dtype in which the weights are stored.
            self._reranker.model.to(self.dtype)
        self._check_no_weights_missing(folder, family, prefix)
        _check_labels(folder, family, self._reranker.model.config)
        with _unsupported_errors(folder, family):
            # Some classes can be constructed but fail when they run.
            self._score([("query", "document")])

    def _check_no_weights_missing(self, folder: Path, family: Family, prefix: str) -> None:
        """Refuse a checkpoint that lacks some of the model's weights, such as its head."""
        model = self._reranker.model
        with _unsupported_errors(folder, family), without_loading_bar():
            names = missing_weights(model, folder)
        if names:
            config = read_config(folder)
            raise missing_weights_error(names, folder, model=model, config=config, prefix=prefix)

    def launch(self, pairs: Sequence[TokenPair]) -> PendingLogits:
        """Return a function that scores a pack."""
        return partial(self.logits, pairs)

    def logits(self, pairs: Sequence[TokenPair]) -> list[float]:
        """Return the logit of each pair of a pack.

        Args:
            pairs: n >= 1 pairs of `TextPairTokenizer`.
        """
        texts = [(pair.query, pair.document) for pair in pairs if isinstance(pair, TextPair)]
        return self._score(texts)

    def _score(self, texts: list[tuple[str, str]]) -> list[float]:
        with without_bars(sys.modules[type(self._reranker).__module__]):
            # A batch larger than the list turns off some of its progress bars.
            scores = self._reranker.compute_score(texts, batch_size=len(texts) + 1)
        return [float(score) for score in scores]


def _check_weights(folder: Path, family: Family) -> str:
    """Refuse weights that are not plain safetensors; return the prefix of all tensor names."""
    config = read_config(folder)
    with open_weights(folder) as weights:
        if family.classifier and config.get("model_type") in family.model_types:
            check_one_label(weights, parse_config(config, folder=folder))
        return weights.prefix


def _check_labels(folder: Path, family: Family, config: Any) -> None:
    """Refuse several labels, with which FlagEmbedding would mix up the logits of pairs."""
    labels = getattr(config, "num_labels", 1)
    if family.classifier and labels != 1:
        raise UnsupportedCheckpointError(
            f"{folder} is a classifier of {labels} labels; a reranker has one, whose logit says "
            "how relevant a document is."
        )


def _flag_class(family: Family) -> Callable[..., Any]:
    try:
        module = importlib.import_module("FlagEmbedding")
    except ImportError as error:
        raise ImportError(
            'backend="flagembedding" needs FlagEmbedding; '
            'run: pip install "bge-rerank-adapters[flagembedding]"'
        ) from error
    found: Callable[..., Any] = getattr(module, family.flag_class)
    return found


def _options(
    settings: EngineSettings, family: Family, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Return the arguments of its constructor; settings that are `None` are left out."""
    options: dict[str, Any] = {
        # The layerwise and lightweight classes warn if neither half type is chosen. The attribute
        # that takes effect is set after loading.
        "use_fp16": dtype != torch.bfloat16,
        "devices": str(device),
        "trust_remote_code": False,
    }
    if not family.classifier:
        options["use_bf16"] = dtype == torch.bfloat16
    cutoff = settings.cutoff_layers
    given = {
        "query_instruction_for_rerank": settings.query_instruction,
        "passage_instruction_for_rerank": settings.passage_instruction,
        "prompt": settings.prompt,
        "cutoff_layers": None if cutoff is None else [cutoff],
        "compress_ratio": settings.compress_ratio,
        "compress_layers": settings.compress_layers and list(settings.compress_layers),
    }
    return options | {name: value for name, value in given.items() if value is not None}


def _dtype(name: str, family: Family, device: torch.device) -> torch.dtype:
    """Return the dtype; on a GPU `"auto"` is the half type of FlagEmbedding's own examples."""
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.float16 if family.classifier else torch.bfloat16
    dtype: torch.dtype = getattr(torch, name)
    if device.type == "cpu" and dtype == torch.float16:
        raise DeviceError(
            'FlagEmbedding runs float32 on a CPU even if float16 is given; use dtype="float32".'
        )
    if family.classifier and dtype == torch.bfloat16:
        raise DeviceError(
            "FlagEmbedding's encoder class has no bfloat16; "
            'use dtype="float32", or "float16" on a GPU.'
        )
    return dtype


@contextmanager
def _unsupported_errors(folder: Path, family: Family) -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, Exception) and is_out_of_memory(error):
            raise  # the model itself is supported
        import transformers

        raise UnsupportedCheckpointError(
            f"FlagEmbedding's {family.flag_class} cannot run {folder} with transformers "
            f"{transformers.__version__} ({type(error).__name__}: {error}). All of its classes run "
            f"with transformers {_WORKING_TRANSFORMERS}; install that, or use "
            'backend="native", which runs every family.'
        ) from error
