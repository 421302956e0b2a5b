"""Reranking in Milvus code: a drop-in for `pymilvus.model.reranker.BGERerankFunction`.

```python
from bge_rerank_adapters.milvus import BGERerankFunction

bge_rf = BGERerankFunction(model_name="BAAI/bge-reranker-v2-m3", device="cpu")
results = bge_rf(query="Who wrote Faust?", documents=["Goethe did.", "It rains."], top_k=3)
```

Constructor, call and results follow milvus-model 0.2.12 (`reranker/bgereranker.py`). Neither it nor
pymilvus is imported, and nothing is installed at run time.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Self, Unpack

from bge_rerank_adapters.calls.checks import check_documents, check_query
from bge_rerank_adapters.calls.hits import hits_of_one_query, text_of_hit
from bge_rerank_adapters.calls.limits import Limits
from bge_rerank_adapters.calls.metadata import added_metadata
from bge_rerank_adapters.calls.ranked_document import RankedDocument
from bge_rerank_adapters.calls.ranking import Scorer
from bge_rerank_adapters.engine.hosted.copies import copied
from bge_rerank_adapters.engine.hosted.flag_arguments import (
    Devices,
    Instruction,
    check_batch_size,
    engine_devices,
    is_whole,
)
from bge_rerank_adapters.engine.hosted.lazy import LazyEngine, UsesEngine
from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.settings import EngineSettings, setting_names
from bge_rerank_adapters.settings.engine import FurtherOptions
from bge_rerank_adapters.settings.families import FAMILY_SETTINGS
from bge_rerank_adapters.settings.options import check_options, shows_options

_QUERY_MAX_LENGTH = 256
# Families by FlagEmbedding's names.
_FAMILIES = {None: None} | {row.flag_name: row.name for row in FAMILY_SETTINGS.values()}


@dataclass(slots=True, repr=False)
class RerankResult:
    """One document of a ranking, as in pymilvus.

    Attributes:
        text: The document as it was given.
        score: Its score in [0, 1]; with `normalize=False` its logit.
        index: Its position in the input list, counted from 0.
    """

    text: str
    score: float
    index: int

    def to_dict(self) -> dict[str, Any]:
        """Return text, score and index as JSON values."""
        return asdict(self)

    def __repr__(self) -> str:
        """Return the same text as pymilvus."""
        return f"RerankResult(text={self.text!r}, score={self.score}, index={self.index})"


class BGERerankFunction(UsesEngine):
    """Ranks documents with a BGE reranker; a drop-in for pymilvus' class of the same name.

    A pickle has the settings, but neither weights nor the token; the copy loads on first use.

    Attributes:
        model_name: As given.
        batch_size: As given; not needed.
        normalize: Whether `.score` is in [0, 1].
        device: The model's device; `None` if a ready engine has no such attribute.
    """

    @shows_options(FurtherOptions)
    def __init__(
        self,
        model_name: str = EngineSettings.model,
        use_fp16: bool = True,
        batch_size: int = 32,
        normalize: bool = True,
        device: Devices = None,
        query_max_length: int | None = _QUERY_MAX_LENGTH,
        max_length: int = EngineSettings.max_length,
        devices: Devices = None,
        *,
        dtype: str | None = None,
        trust_remote_code: bool = False,
        model_class: str | None = None,
        query_instruction_for_rerank: str | None = None,
        query_instruction_format: str = "{}{}",
        passage_instruction_for_rerank: str | None = None,
        passage_instruction_format: str = "{}{}",
        use_bf16: bool = False,
        reranker: Scorer | None = None,
        **options: Unpack[FurtherOptions],
    ) -> None:
        """Load the model, or share the one that is loaded with equal settings.

        Args:
            model_name: A folder, a name on the hub, or `"tiny"` for the bundled checkpoint.
            use_fp16: The fastest half or full precision that the device runs natively; `False` is
                float32.
            batch_size: Accepted and not needed: packs are built by tokens.
            normalize: Whether `.score` is in [0, 1]; `False` gives the logit.
            device: One device or a list; a number is a CUDA device; `None` chooses one.
            query_max_length: Maximum tokens of the query.
            max_length: Maximum tokens of a pair.
            devices: Overrides `device`.
            dtype: Overrides `use_fp16`.
            trust_remote_code: Must be False.
            model_class: FlagEmbedding's name of the family, such as `"decoder-only-layerwise"`;
                `None` is found from the checkpoint.
            query_instruction_for_rerank: Text before the query, in `query_instruction_format`;
                `None` is `"A: "` for decoders.
            query_instruction_format: Format string with two fields: the instruction and the query.
            passage_instruction_for_rerank: The same for documents.
            passage_instruction_format: The same for documents.
            use_bf16: bfloat16; overrides `use_fp16`.
            reranker: A ready engine, such as a `RemoteReranker`, to use instead of loading one;
                not together with settings of the model.
            **options: The engine's other settings.

        Raises:
            TypeError: There is no option of that name.
            SettingsError: A setting has a value that is not allowed, or is one of the model given
                together with a ready engine.
            CheckpointError: The checkpoint cannot be found or used.
            DeviceError: The device does not exist.
        """
        check_options(BGERerankFunction, options)
        check_batch_size(batch_size)
        if trust_remote_code:
            raise SettingsError("trust_remote_code must be False: no code of a checkpoint is run.")
        self.model_name, self.batch_size, self.normalize = model_name, batch_size, normalize
        self._query = Instruction(
            query_instruction_for_rerank,
            query_instruction_format,
            # Only the engine can keep it while cutting off the query's beginning.
            in_engine=options.get("query_truncation_side") == "left" and reranker is None,
        )
        self._passage = Instruction(passage_instruction_for_rerank, passage_instruction_format)
        settings = EngineSettings(
            model=model_name,
            device=engine_devices(device if devices is None else devices),
            dtype=dtype or ("bfloat16" if use_bf16 else "auto" if use_fp16 else "float32"),
            max_length=max_length,
            query_max_length=_query_max_length(query_max_length, max_length),
            family=_family(model_class),
            query_instruction=self._query.setting,
            passage_instruction=self._passage.setting,
            **options,
        )
        self._engine = LazyEngine(settings, reranker=reranker, given=_about_the_model(settings))
        self.device: str | None = getattr(self.reranker, "device", None)

    def __call__(
        self, query: str, documents: Sequence[str], top_k: int | None = 5
    ) -> list[RerankResult]:
        """Return the best documents, best first.

        Args:
            query: The question.
            documents: n texts, or objects with one, as `Reranker.rerank` takes them; may be empty.
            top_k: Maximum number of results; a falsy value (0 or `None`) is all.

        Returns:
            At most `top_k` results; `[]` for no documents.

        Raises:
            InputTypeError: The query is not a `str`, or a document has no text.
            SettingsError: `top_k` is negative or not a whole number, or `normalize` is False and
                the ready engine gives no logits.
            RerankError: The model failed.
        """
        texts = check_documents(documents)
        return [
            RerankResult(texts[each.index], self._score(each), each.index)
            for each in self._ranked(query, texts, top_k)
        ]

    def rerank_hits(
        self, query: str, hits: Sequence[Any], text_field: str = "text", top_k: int | None = 5
    ) -> list[Any]:
        """Return copies of the best hits of a search, best first, each with its score.

        Args:
            query: The question.
            hits: One query's hits, as `MilvusClient.search` and `hybrid_search` give them:
                `result[0]`, or the result itself if it is of a single query.
            text_field: The field with the text; a search returns it if `output_fields` names it.
            top_k: Maximum number of hits; a falsy value (0 or `None`) is all.

        Returns:
            At most `top_k` copies. In addition to `distance` they have `relevance_score` (float, in
            [0, 1]) and the other keys of `calls.metadata.added_metadata`.

        Raises:
            InputTypeError: The query is not a `str`; the hits are not hits, or those of several
                queries; or a hit lacks the field, or cannot be copied.
            SettingsError: `top_k` is negative or not a whole number.
            RerankError: The model failed.
        """
        found = hits_of_one_query(hits)
        texts = [text_of_hit(hit, text_field, index) for index, hit in enumerate(found)]
        best: list[Any] = []
        for each in self._ranked(query, texts, top_k):
            hit, text = found[each.index], texts[each.index]
            best.append(
                copied(partial(copy.deepcopy, hit), name=f"hits[{each.index}]", metadata=hit)
            )
            start = max(each.text.rfind(text), 0)
            best[-1].update(added_metadata(each, start=start, length=len(text)))
        return best

    def _ranked(self, query: str, texts: list[str], top_k: int | None) -> list[RankedDocument]:
        ranked: list[RankedDocument] = self.reranker.rerank(
            self._query.apply(check_query(query)),
            [self._passage.apply(text) for text in texts],
            top_k=_top_k(top_k),
        )
        return ranked

    def __repr__(self) -> str:
        """Name the model and, once it is loaded, device and dtype."""
        engine = self._engine.loaded
        model = getattr(self._engine.settings, "model", None) or type(engine).__name__
        known = {name: getattr(engine, name, None) for name in ("device", "dtype")}
        more = "".join(f", {name}={value}" for name, value in known.items() if value is not None)
        return f"BGERerankFunction({model!r}{more})"

    def __copy__(self) -> Self:
        """Return a copy that shares the engine."""
        return copy.deepcopy(self)

    def _score(self, ranked: RankedDocument) -> float:
        if self.normalize:
            return ranked.score
        if ranked.logit is None:
            raise SettingsError(
                "normalize=False needs logits, which this engine does not give; leave it at True."
            )
        return ranked.logit


def _about_the_model(settings: EngineSettings) -> list[str]:
    """Return the given settings that have no effect on a ready engine."""
    usual = EngineSettings(query_max_length=_QUERY_MAX_LENGTH)
    # Instructions are added to the texts before any engine gets them.
    names = set(setting_names()) - {"query_instruction", "passage_instruction"}
    return sorted(name for name in names if getattr(settings, name) != getattr(usual, name))


def _family(model_class: object) -> str | None:
    if not isinstance(model_class, str | None) or model_class not in _FAMILIES:
        raise SettingsError(
            f"model_class {model_class!r} is not known; "
            f"use one of {', '.join(map(repr, _FAMILIES))}."
        )
    return _FAMILIES[model_class]


def _query_max_length(given: int | None, max_length: object) -> int | None:
    # The default is meant for max_length=512; a shorter max_length leaves no room for it.
    short = is_whole(max_length) and max_length <= _QUERY_MAX_LENGTH  # type: ignore[operator]
    return None if short and given == _QUERY_MAX_LENGTH else given


def _top_k(value: Any) -> int | None:
    # An array of several numbers has no truth value, and is refused by `Limits`.
    one = getattr(value, "shape", ()) == ()
    return None if one and not value else Limits(value).top_k
