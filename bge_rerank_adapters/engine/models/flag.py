"""Any model through FlagEmbedding itself: the reference, behind the engine's own interface.

Its classes are called as they are (FlagEmbedding 1.4, `inference/auto_reranker.py`), but with one
device, no progress bars, and never with an empty list or code of a checkpoint.
"""

import importlib
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bge_rerank_adapters.engine.checkpoints.model_config import read_config
from bge_rerank_adapters.engine.models.base import default_pack_tokens
from bge_rerank_adapters.engine.models.device_faults import is_out_of_memory
from bge_rerank_adapters.engine.models.encoder.config import parse_config
from bge_rerank_adapters.engine.models.encoder.tensors import check_one_label
from bge_rerank_adapters.engine.models.families import Family
from bge_rerank_adapters.engine.models.lora import open_weights
from bge_rerank_adapters.engine.models.made_up import made_up_error, made_up_weights
from bge_rerank_adapters.engine.text.pairs import Lengths, TokenizedPairs, TokenPair
from bge_rerank_adapters.engine.text.tokenizer import PairTokenizer, without_surrogates
from bge_rerank_adapters.errors import DeviceError, SettingsError, UnsupportedCheckpointError
from bge_rerank_adapters.settings import EngineSettings
from bge_rerank_adapters.settings.token_limits import TokenLimits

# The release of transformers on which all of FlagEmbedding 1.4.2's classes run.
_WORKING_TRANSFORMERS = "4.44.2"


@dataclass(frozen=True, slots=True)
class TextPair(TokenPair):
    """A tokenised pair that keeps its texts, which FlagEmbedding tokenises for itself.

    Attributes:
        query: The query.
        document: The document.
    """

    query: str = ""
    document: str = ""


class TextPairTokenizer(PairTokenizer):
    """Counts tokens and tells what is cut, by the same rule, and keeps the texts."""

    def lengths(self, limits: TokenLimits) -> Lengths:
        """Refuse limits of one call that would cut: FlagEmbedding does not read them.

        Raises:
            SettingsError: There is one.
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
        device: Where it runs.
        dtype: Of weights and activations.
        streams: 1: it runs a pack as a whole.
        pack_tokens: Token budget of a pack that suits the device.
    """

    streams = 1

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
            folder: The checkpoint's.
            settings: The engine's.
            family: Chooses the class.
            max_length: Most tokens of a pair.
            query_max_length: Most tokens of the query.
            device: Where to run.

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
        # The lightweight class ends the process where its modelling code cannot be imported.
        with _unsupported_errors(folder, family), _without_loading_bar():
            self._reranker = make(str(folder), **options)
            self._reranker.use_fp16 = self.dtype == torch.float16
            # transformers 5 keeps the dtype in which the weights are stored.
            self._reranker.model.to(self.dtype)
        self._check_nothing_made_up(folder, family, prefix)
        _check_labels(folder, family, self._reranker.model.config)
        with _unsupported_errors(folder, family):
            # Some classes can be made, and fail when they are run.
            self._score([("query", "document")])

    def _check_nothing_made_up(self, folder: Path, family: Family, prefix: str) -> None:
        """Refuse a checkpoint that lacks any of the model's weights, above all its head."""
        model = self._reranker.model
        with _unsupported_errors(folder, family), _without_loading_bar():
            names = made_up_weights(model, folder)
        if names:
            config = read_config(folder)
            raise made_up_error(names, folder, model=model, config=config, prefix=prefix)

    def logits(self, pairs: Sequence[TokenPair]) -> list[float]:
        """Return the logit of each pair of a pack.

        Args:
            pairs: n >= 1 pairs of `TextPairTokenizer`.
        """
        texts = [(pair.query, pair.document) for pair in pairs if isinstance(pair, TextPair)]
        return self._score(texts)

    def _score(self, texts: list[tuple[str, str]]) -> list[float]:
        with _without_bars(sys.modules[type(self._reranker).__module__]):
            # One more than there are: below that its bars are off, where they can be.
            scores = self._reranker.compute_score(texts, batch_size=len(texts) + 1)
        return [float(score) for score in scores]


def _check_weights(folder: Path, family: Family) -> str:
    """Refuse what is no safetensors or quantised; return what training left before all names."""
    config = read_config(folder)
    with open_weights(folder) as weights:
        if family.classifier and config.get("model_type") in family.model_types:
            check_one_label(weights, parse_config(config, folder=folder))
        return weights.prefix


def _check_labels(folder: Path, family: Family, config: Any) -> None:
    """Refuse several labels: FlagEmbedding would give each pair the logit of another one."""
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
    """Return what its constructor is given, by its own names; what is left open stays so."""
    options: dict[str, Any] = {
        # The layerwise and lightweight classes warn where neither half type is asked for; what
        # counts is the attribute, which is set once the model is made.
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
    """Return the dtype; `"auto"` is the half type of FlagEmbedding's own examples on a GPU."""
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.float16 if family.classifier else torch.bfloat16
    dtype: torch.dtype = getattr(torch, name)
    if device.type == "cpu" and dtype == torch.float16:
        raise DeviceError(
            "FlagEmbedding runs float32 on a CPU where it is asked for float16; "
            'use dtype="float32".'
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
            raise  # of another kind of device, or with fewer others, it runs
        import transformers

        raise UnsupportedCheckpointError(
            f"FlagEmbedding's {family.flag_class} cannot run {folder} with transformers "
            f"{transformers.__version__} ({type(error).__name__}: {error}). All of its classes run "
            f"with transformers {_WORKING_TRANSFORMERS}; install that, or use "
            'backend="native", which runs every family.'
        ) from error


class _Bars:
    """Progress bars that are off as long as any call needs it so, however many run at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By what they are of: how many calls need them off, and what puts them back.
        self._off: dict[str, tuple[int, Callable[[], None]]] = {}

    @contextmanager
    def off(self, name: str, turn_off: Callable[[], Callable[[], None]]) -> Iterator[None]:
        """Keep bars off for the time of a call.

        Args:
            name: Of what they belong to.
            turn_off: Turns them off, and returns what puts them back; called by the first alone.
        """
        with self._lock:
            calls, restore = self._off[name] if name in self._off else (0, turn_off())
            self._off[name] = (calls + 1, restore)
        try:
            yield
        finally:
            with self._lock:
                calls, restore = self._off.pop(name)
                if calls > 1:
                    self._off[name] = (calls - 1, restore)
                else:
                    restore()


_bars = _Bars()


def _without_loading_bar() -> AbstractContextManager[None]:
    """Turn off the progress bar that transformers 5 shows while it loads, and on again after."""
    return _bars.off("loading", _stop_loading_bar)


def _stop_loading_bar() -> Callable[[], None]:
    logging: Any = importlib.import_module("transformers.utils.logging")
    # Not to be asked for in every release: where it cannot be, nothing is changed.
    if not getattr(logging, "is_progress_bar_enabled", lambda: False)():
        return lambda: None
    logging.disable_progress_bar()
    enable: Callable[[], None] = logging.enable_progress_bar
    return enable


def _without_bars(module: types.ModuleType) -> AbstractContextManager[None]:
    """Turn off the progress bars that a module shows unasked, for the time of a call."""
    return _bars.off(module.__name__, partial(_stop_bars, module))


def _stop_bars(module: types.ModuleType) -> Callable[[], None]:
    shown = {name: getattr(module, name) for name in ("tqdm", "trange") if hasattr(module, name)}
    for name, bar in shown.items():
        setattr(module, name, partial(bar, disable=True))

    def restore() -> None:
        for name, bar in shown.items():
            setattr(module, name, bar)

    return restore
