"""Reranking in Milvus code: a drop-in for `pymilvus.model.reranker.BGERerankFunction`.

```python
from bge_rerank_adapters.milvus import BGERerankFunction

bge_rf = BGERerankFunction(model_name="BAAI/bge-reranker-v2-m3", device="cpu")
results = bge_rf(query="Who wrote Faust?", documents=["Goethe did.", "It rains."], top_k=3)
```

Constructor, call and results follow milvus-model 0.2.12 (`reranker/bgereranker.py`). Neither it nor
pymilvus is imported, and nothing is installed at run time.
"""

import numbers
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from bge_rerank_adapters.calls.checks import check_documents, check_query
from bge_rerank_adapters.calls.limits import Limits
from bge_rerank_adapters.calls.ranking import RankedDocument, Scorer
from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.settings import EngineSettings, setting_names

_QUERY_MAX_LENGTH = 256
# FlagEmbedding's names of the families (`inference/reranker/model_mapping.py`).
_FAMILIES = {
    None: None,
    "encoder-only-base": "encoder",
    "decoder-only-base": "decoder",
    "decoder-only-layerwise": "layerwise",
    "decoder-only-lightweight": "lightweight",
}


@dataclass(slots=True, repr=False)
class RerankResult:
    """One document of a ranking, as pymilvus gives it.

    Attributes:
        text: The document as it was given.
        score: Its score in [0, 1]; with `normalize=False` its logit.
        index: Its position in the input list, counted from 0.
    """

    text: str
    score: float
    index: int

    def to_dict(self) -> dict[str, Any]:
        """Return text, score and index, ready for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        """Return the form in which pymilvus prints it."""
        return f"RerankResult(text={self.text!r}, score={self.score}, index={self.index})"


class BGERerankFunction:
    """Ranks documents with a BGE reranker, called as pymilvus' function of the same name.

    Pickling carries the settings, never weights or the token; the copy loads on first use.

    Attributes:
        model_name: As it was given, like the next two.
        batch_size: Not needed.
        normalize: Whether `.score` is in [0, 1].
        device: Where the model runs; `None` where a ready engine does not tell.
    """

    def __init__(
        self,
        model_name: str = EngineSettings.model,
        use_fp16: bool = True,
        batch_size: int = 32,
        normalize: bool = True,
        device: str | int | Sequence[str | int] | None = None,
        query_max_length: int | None = _QUERY_MAX_LENGTH,
        max_length: int = EngineSettings.max_length,
        devices: str | int | Sequence[str | int] | None = None,
        *,
        cache_dir: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        dtype: str | None = None,
        long_documents: str = EngineSettings.long_documents,
        window_tokens: int | None = EngineSettings.window_tokens,
        window_overlap_tokens: int | None = EngineSettings.window_overlap_tokens,
        trust_remote_code: bool = False,
        model_class: str | None = None,
        query_instruction_for_rerank: str | None = None,
        query_instruction_format: str = "{}{}",
        passage_instruction_for_rerank: str | None = None,
        passage_instruction_format: str = "{}{}",
        use_bf16: bool = False,
        prompt: str | None = None,
        cutoff_layers: int | Sequence[int] | None = None,
        compress_ratio: int | None = None,
        compress_layers: int | Sequence[int] | None = None,
        backend: str = EngineSettings.backend,
        reranker: Scorer | None = None,
    ) -> None:
        """Load the model, or share the one that is loaded with equal settings.

        Args:
            model_name: A folder, a name on the hub, or `"tiny"` for the bundled checkpoint.
            use_fp16: The fastest half or full precision that the device runs natively; `False` is
                float32.
            batch_size: Accepted and not needed: packs are built by tokens.
            normalize: Whether `.score` is in [0, 1]; `False` gives the logit.
            device: One device or a list; a number is a CUDA device; `None` chooses one.
            query_max_length: Most tokens of the query.
            max_length: Most tokens of a pair.
            devices: Overrides `device`.
            cache_dir: Folder of the hub's cache.
            revision: Branch, tag or commit on the hub.
            token: Secret for the hub.
            local_files_only: Never ask the hub.
            dtype: Overrides `use_fp16`.
            long_documents: `"truncate"`, or `"window"` for the best of overlapping windows.
            window_tokens: Most document tokens of a window; `None` is all that fit.
            window_overlap_tokens: Tokens that neighbouring windows share; `None` is a quarter.
            trust_remote_code: Must be False.
            model_class: FlagEmbedding's name of the family, such as `"decoder-only-layerwise"`;
                `None` is found from the checkpoint.
            query_instruction_for_rerank: Put before the query, in `query_instruction_format`;
                `None` is `"A: "` for decoders.
            query_instruction_format: With two places: the instruction's and the query's.
            passage_instruction_for_rerank: The same for documents.
            passage_instruction_format: The same for documents.
            use_bf16: bfloat16, whatever `use_fp16` says.
            prompt: What a decoder is asked after the document; `None` is the family's own.
            cutoff_layers: The layer whose logit is read, or a list of one.
            compress_ratio: How many of a document's tokens are made one.
            compress_layers: Before which layers that is done.
            backend: `"native"`, or `"flagembedding"` to run FlagEmbedding's own classes.
            reranker: A ready engine, such as a `RemoteReranker`, to use instead of loading one;
                not together with what is about the model.

        Raises:
            SettingsError: A setting has a value that is not allowed, or is about the model beside
                a ready engine.
            CheckpointError: The checkpoint cannot be found or used.
            DeviceError: The device is not there.
        """
        if not _is_whole(batch_size) or batch_size < 1:
            raise SettingsError(f"batch_size must be at least 1, got {batch_size!r}.")
        if trust_remote_code:
            raise SettingsError("trust_remote_code must be False: no code of a checkpoint is run.")
        if not isinstance(model_class, str | None) or model_class not in _FAMILIES:
            raise SettingsError(
                f"model_class {model_class!r} is not known; "
                f"use one of {', '.join(map(repr, _FAMILIES))}."
            )
        short = _is_whole(max_length) and max_length <= _QUERY_MAX_LENGTH
        if short and query_max_length == _QUERY_MAX_LENGTH:
            # The default was made for a max_length of 512; one who asks for less means the pair.
            query_max_length = None
        self.model_name, self.batch_size, self.normalize = model_name, batch_size, normalize
        self._query_format = _Instruction(query_instruction_for_rerank, query_instruction_format)
        self._passage_format = _Instruction(
            passage_instruction_for_rerank, passage_instruction_format
        )
        self._settings = EngineSettings(
            model=model_name,
            device=_devices(device if devices is None else devices),
            dtype=dtype or ("bfloat16" if use_bf16 else "auto" if use_fp16 else "float32"),
            max_length=max_length,
            query_max_length=query_max_length,
            long_documents=long_documents,
            window_tokens=window_tokens,
            window_overlap_tokens=window_overlap_tokens,
            cache_dir=cache_dir,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
            backend=backend,
            family=_FAMILIES[model_class],
            prompt=prompt,
            # Where there is one it goes into the text here, in its format.
            query_instruction=None if query_instruction_for_rerank is None else "",
            passage_instruction=None if passage_instruction_for_rerank is None else "",
            cutoff_layers=cutoff_layers,
            compress_ratio=compress_ratio,
            compress_layers=compress_layers,
        )
        self._given, self._was_given = reranker, reranker is not None
        if self._was_given:
            _check_ready(reranker, self._settings)
        self._engine: Any = None
        self.device: str | None = getattr(self.reranker, "device", None)

    @property
    def reranker(self) -> Any:
        """The engine that scores: the one given, or one shared by all with equal settings.

        It is loaded again where it was let go of, or closed by another who used it.

        Raises:
            SettingsError: A ready engine was given, and left out where this was pickled.
            RerankError: The model cannot be loaded.
        """
        if self._given is not None:
            return self._given
        if self._was_given:
            raise SettingsError(
                "This was made with reranker=, which its pickle does not carry; "
                "make another one with reranker=, or with model_name=."
            )
        engine = self._engine
        if engine is None or engine.closed:
            # Imported here, so that a wrong setting is told before torch is loaded.
            from bge_rerank_adapters.engine.shared import shared_reranker

            engine = self._engine = shared_reranker(self._settings)
        return engine

    def close(self) -> None:
        """Let go of the shared engine, which is freed with its last user; a later use loads again.

        The same as the other adapters' `close`; it may be repeated. An engine that was given as
        `reranker=` stays: it is its owner's to close.
        """
        self._engine = None

    def __call__(
        self, query: str, documents: Sequence[str], top_k: int | None = 5
    ) -> list[RerankResult]:
        """Return the best documents, best first.

        Args:
            query: The question.
            documents: n texts; may be empty.
            top_k: Most results; a falsy one (0 or `None`) gives all.

        Returns:
            At most `top_k` results; `[]` for no documents.

        Raises:
            InputTypeError: The query or a document is not a `str`.
            SettingsError: `top_k` is negative or not a whole number, or `normalize` is False and
                the ready engine tells no logits.
            RerankError: The model failed.
        """
        texts = check_documents(documents)
        ranked = self.reranker.rerank(
            self._query_format.apply(check_query(query)),
            [self._passage_format.apply(text) for text in texts],
            top_k=_top_k(top_k),
        )
        return [RerankResult(texts[each.index], self._score(each), each.index) for each in ranked]

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle carries: the engine is found or loaded anew, or given again."""
        return {**vars(self), "_engine": None, "_given": None}

    def __copy__(self) -> Self:
        """Return another one that shares the engine."""
        copied = type(self).__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return another one that shares the engine: threads and weights are not copied."""
        return self.__copy__()

    def _score(self, ranked: RankedDocument) -> float:
        if self.normalize:
            return ranked.score
        if ranked.logit is None:
            raise SettingsError(
                "normalize=False gives logits, which this engine does not tell; leave it at True."
            )
        return ranked.logit


@dataclass(frozen=True, slots=True)
class _Instruction:
    """An instruction before a text, in FlagEmbedding's way (`abc/inference/AbsReranker.py`)."""

    instruction: str | None
    template: str

    def __post_init__(self) -> None:
        places = ("\ue000instruction", "\ue000text")
        try:
            # One that has a single place would drop the text without a word.
            filled = self.template.format(*places)
            cause = None
        except (IndexError, KeyError, ValueError, AttributeError) as error:
            filled, cause = "", error
        if not all(place in filled for place in places):
            raise SettingsError(
                f"An instruction format needs two places, like '{{}}{{}}', got {self.template!r}."
            ) from cause

    def apply(self, text: str) -> str:
        if self.instruction is None:
            return text
        return self.template.format(self.instruction, text)


def _check_ready(reranker: object, settings: EngineSettings) -> None:
    if not isinstance(reranker, Scorer) or isinstance(reranker, type):
        raise SettingsError(
            "reranker must be an engine with the methods rerank and arerank, got "
            f"{type(reranker).__name__}; give one that is made, such as RemoteReranker(...)."
        )
    usual = EngineSettings(query_max_length=_QUERY_MAX_LENGTH)
    # Instructions go into the texts here, whoever scores them.
    about_the_model = set(setting_names()) - {"query_instruction", "passage_instruction"}
    given = sorted(
        name for name in about_the_model if getattr(settings, name) != getattr(usual, name)
    )
    if given:
        raise SettingsError(
            f"reranker= is a ready engine, so what sets its {', '.join(given)} cannot stand "
            "beside it; give one or the other."
        )


def _devices(value: str | int | Sequence[str | int] | None) -> str | tuple[str, ...]:
    if value is None:
        return "auto"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_one_device(each) for each in value)
    return _one_device(value)


def _top_k(value: Any) -> int | None:
    # Of several numbers numpy does not say whether they are falsy; they are refused.
    one = getattr(value, "shape", ()) == ()
    return None if one and not value else Limits(value).top_k


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _one_device(value: object) -> str:
    text = str(value)
    return f"cuda:{text}" if text.isdecimal() else text
