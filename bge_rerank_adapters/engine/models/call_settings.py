"""Calls that override the engine's settings for tokenising and reading logits.

FlagEmbedding takes lengths, prompts, layers and compression at every call. None of them changes the
weights: such a call needs at most another tokenizer, and shares packs with all others.
"""

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from bge_rerank_adapters.engine.checkpoints.sentence_transformers import (
    AuthorSettings,
    tokenizer_limit,
)
from bge_rerank_adapters.engine.models.causal.lightweight import check_compress_layers
from bge_rerank_adapters.engine.models.causal.readout import Readout, ReadPair
from bge_rerank_adapters.engine.models.loading import (
    LocalCheckpoint,
    load_pair_tokenizer,
    max_tokens,
)
from bge_rerank_adapters.engine.text.pairs import TokenizedPairs, TokenPair
from bge_rerank_adapters.engine.text.tokenizer import PairTokenizer
from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.settings import EngineSettings

Tokenize = Callable[[Sequence[tuple[str, str]]], TokenizedPairs]
"""Tokenises (query, document) pairs."""

# For calls that differ in their settings; each tokenizer takes some megabytes.
_TOKENIZERS_KEPT = 4


@dataclass(frozen=True, slots=True)
class CallSettings:
    """The settings of one call.

    Attributes:
        settings: The engine's settings, with the call's lengths, prompt, instructions and
            compression.
        cutoff_layers: The layers whose logits are read, ascending; `()` is as in `settings`.
    """

    settings: EngineSettings
    cutoff_layers: tuple[int, ...] = ()


class CallTokenizers:
    """Makes and caches the tokenizers of an engine's calls with own settings; thread-safe."""

    def __init__(
        self, checkpoint: LocalCheckpoint, settings: EngineSettings, tokenizer: PairTokenizer
    ) -> None:
        """Take the engine's checkpoint, settings and tokenizer."""
        self._checkpoint, self._settings = checkpoint, settings
        self._lock = threading.Lock()
        self._own = (_of_texts(settings), tokenizer)
        self._others: OrderedDict[EngineSettings, PairTokenizer] = OrderedDict()

    def tokenize(self, call: CallSettings) -> Tokenize:
        """Return the function that tokenises a call's pairs.

        Raises:
            SettingsError: The lengths leave no room for a document, or the model does not have one
                of the layers.
        """
        readout = self._readout(call)
        tokenizer = self._tokenizer(_of_texts(call.settings))

        def tokenize(pairs: Sequence[tuple[str, str]]) -> TokenizedPairs:
            tokenized = tokenizer.tokenize(pairs)
            if readout is None:
                return tokenized
            distinct: list[TokenPair] = [ReadPair.of(each, readout) for each in tokenized.distinct]
            return replace(tokenized, distinct=distinct)

        return tokenize

    @property
    def author(self) -> AuthorSettings:
        """The settings of the checkpoint's author."""
        return self._checkpoint.files.author

    @property
    def longest(self) -> int:
        """Maximum tokens of a pair, by the author's files and the model's positions."""
        files = self._checkpoint.files
        limits = (files.author.max_tokens, tokenizer_limit(files.tokenizer_folder))
        given = next((limit for limit in limits if limit is not None), sys.maxsize)
        return min(given, max_tokens(self._checkpoint))

    def of_whole_pairs(self, *, max_length: int, prompt: str) -> CallSettings:
        """Return settings without a limit for queries: only pairs that are too long are cut.

        Args:
            max_length: Maximum tokens of a pair; a longer one loses the end of its document.
            prompt: Text before each query.

        Raises:
            SettingsError: The length leaves no room for a query and a document.
        """
        max_length = min(max_length, self.longest)
        room = max_length - self._own[1].special_tokens - 1
        if room < 1:
            raise SettingsError(
                f"max_length {max_length} leaves no room for a query and a document; make it "
                "larger."
            )
        return CallSettings(
            replace(
                self._settings,
                max_length=max_length,
                query_max_length=room,
                query_instruction=prompt,
            )
        )

    def _tokenizer(self, settings: EngineSettings) -> PairTokenizer:
        if settings == self._own[0]:
            return self._own[1]
        with self._lock:
            made = self._others.pop(settings, None)
            made = made or load_pair_tokenizer(self._checkpoint, settings)
            self._others[settings] = made
            while len(self._others) > _TOKENIZERS_KEPT:
                self._others.popitem(last=False)
            return made

    def _readout(self, call: CallSettings) -> Readout | None:
        files, family = self._checkpoint.files, self._checkpoint.family
        if family.heads is None:
            return None
        heads, settings = family.heads(files.config, folder=files.folder), call.settings
        layers_read = call.cutoff_layers or (heads.check(settings.cutoff_layers),)
        for layer in layers_read:
            heads.check(layer)
        _check_ascending(layers_read)
        self._check_loaded(layers_read[-1])
        layers = check_compress_layers(settings.compress_layers, heads.last)
        return Readout(layers_read, settings.compress_ratio or 1, layers)

    def _check_loaded(self, layer: int) -> None:
        loaded = self._settings.cutoff_layers
        if loaded is not None and layer > loaded:
            raise SettingsError(
                f"cutoff_layers {layer} is beyond the {loaded} layers that are loaded, as the "
                "engine's own cutoff_layers says; make the engine without it."
            )


def _of_texts(settings: EngineSettings) -> EngineSettings:
    """Return the settings without those of layers, which do not affect tokenising."""
    return replace(
        settings.without_token(), cutoff_layers=None, compress_ratio=None, compress_layers=None
    )


def _check_ascending(layers: Sequence[int]) -> None:
    """Refuse other orders, in which FlagEmbedding reads a layer with another layer's head."""
    if list(layers) != sorted(set(layers)):
        raise SettingsError(
            f"cutoff_layers must be in ascending order, each layer once, got {list(layers)}; "
            "logits come in that order."
        )
