"""Reranking inside LangChain: a document compressor, a retriever, a runnable, a cross-encoder.

```python
from langchain_classic.retrievers import ContextualCompressionRetriever

from bge_rerank_adapters.langchain import BGEDocumentCompressor

compressor = BGEDocumentCompressor(model="BAAI/bge-reranker-v2-m3", top_k=3)
retriever = ContextualCompressionRetriever(
    base_compressor=compressor, base_retriever=first_stage
)
retriever = compressor.wrap(first_stage)  # the same, on langchain-core alone
```
"""

from collections.abc import Iterable, Sequence
from typing import Any, Unpack

try:
    from langchain_core.callbacks import (
        AsyncCallbackManagerForRetrieverRun,
        CallbackManagerForRetrieverRun,
        Callbacks,
    )
    from langchain_core.cross_encoders import BaseCrossEncoder
    from langchain_core.documents import BaseDocumentCompressor, Document
    from langchain_core.retrievers import BaseRetriever, RetrieverLike
    from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
    from langchain_core.runnables.config import (
        ensure_config,
        get_async_callback_manager_for_config,
        get_callback_manager_for_config,
    )
except ImportError as error:
    raise ImportError(
        "bge_rerank_adapters.langchain needs langchain-core; "
        'run: pip install "bge-rerank-adapters[langchain]"'
    ) from error

from pydantic import ConfigDict, Field, field_validator

from bge_rerank_adapters.calls.checks import check_query
from bge_rerank_adapters.calls.limits import check_top_k
from bge_rerank_adapters.calls.metadata import ADDED_METADATA, added_metadata
from bge_rerank_adapters.calls.ranked_document import RankedDocument
from bge_rerank_adapters.calls.runner import map_in_turns
from bge_rerank_adapters.engine.hosted.copies import copied
from bge_rerank_adapters.engine.hosted.fields import AdapterSettings
from bge_rerank_adapters.engine.hosted.lazy import LazyEngine
from bge_rerank_adapters.errors import InputTypeError
from bge_rerank_adapters.settings import EngineOptions, EngineSettings
from bge_rerank_adapters.settings.options import check_options, shows_options


class BGEDocumentCompressor(AdapterSettings, BaseDocumentCompressor):
    """Keeps the documents that answer the query best, as LangChain's document compressor.

    Takes the settings of `AdapterSettings`; the model is loaded on first use. A call is traced as
    a run of the class's name, with the query, the number of documents and the scores.

    Attributes:
        metadata_fields: Names of metadata whose values go before the text that is scored, each on
            a line of its own, in this order; those a document lacks (or has as `None`) are left
            out. What is returned keeps its text as it was.
    """

    metadata_fields: list[str] = Field(default_factory=list)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Return copies of the best documents, best first, with their scores in the metadata.

        Args:
            documents: What the first stage found; neither they nor their metadata are changed.
            query: What they should answer.
            callbacks: What follows the run; `None` is those of the run that this happens in.

        Returns:
            At most `top_k` documents with ids and metadata kept, to which are added
            `relevance_score` (float, in [0, 1]), `retrieval_index` (int, the place in `documents`)
            and, where its end was cut off, `relevance_truncated` (True), or where the query was
            cut, `relevance_query_truncated` (True). With `long_documents="window"` also
            `relevance_span_start` and `relevance_span_end` (int): where in `page_content` the best
            window is, in characters. `[]` for no documents.

        Raises:
            InputTypeError: The query is no `str`, or one of the documents no `Document` with text,
                or one of the best has metadata that cannot be copied.
            RerankError: The model could not be loaded, or failed.
        """
        query, found = check_query(query), _checked_documents(documents)
        texts = [self._text(document) for document in found]
        manager = get_callback_manager_for_config(_config(callbacks))
        run = manager.on_chain_start(None, _inputs(query, found), name=type(self).__name__)
        try:
            ranked = self.scorer.rerank(query, texts, **self._limits()) if texts else []
            best = [_with_score(found[each.index], each) for each in ranked]
        except BaseException as error:
            run.on_chain_error(error)
            raise
        run.on_chain_end(_outputs(ranked))
        return best

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Return what `compress_documents` returns, without blocking the event loop."""
        query, found = check_query(query), _checked_documents(documents)
        texts = await map_in_turns(self._text, found)
        manager = get_async_callback_manager_for_config(_config(callbacks))
        run = await manager.on_chain_start(None, _inputs(query, found), name=type(self).__name__)
        try:
            ranked = (
                await (await self.ascorer()).arerank(query, texts, **self._limits())
                if texts
                else []
            )
            best = await map_in_turns(lambda each: _with_score(found[each.index], each), ranked)
        except BaseException as error:
            await run.on_chain_error(error)
            raise
        await run.on_chain_end(_outputs(ranked))
        return best

    def wrap(self, retriever: RetrieverLike) -> "RerankingRetriever":
        """Return a retriever that fetches with `retriever` and keeps the best of what it found."""
        return RerankingRetriever(base_retriever=retriever, compressor=self)

    def as_runnable(self) -> Runnable[dict[str, Any], list[Document]]:
        """Return a runnable from `{"query": str, "documents": [Document, ...]}` to the best.

        Raises:
            InputTypeError: On use, where the input lacks one of the two keys.
        """

        def rerank(inputs: dict[str, Any]) -> list[Document]:
            return self.compress_documents(*_documents_and_query(inputs))

        async def arerank(inputs: dict[str, Any]) -> list[Document]:
            return await self.acompress_documents(*_documents_and_query(inputs))

        return RunnableLambda(rerank, arerank, name=f"{type(self).__name__}.as_runnable")

    def _text(self, document: Document) -> str:
        values = (document.metadata.get(name) for name in self.metadata_fields)
        lines = [str(value) for value in values if value is not None]
        return "\n".join([*lines, document.page_content])


class RerankingRetriever(BaseRetriever):
    """A retriever whose documents are those of another one, reranked and cut to the best.

    Attributes:
        base_retriever: The first stage, which should find more than `compressor.top_k`.
        compressor: What reranks and cuts.
        top_k: How many documents to return; `None` is as the compressor says. `invoke` takes it as
            well, for one call.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    base_retriever: RetrieverLike
    compressor: BGEDocumentCompressor
    top_k: int | None = None

    @field_validator("top_k", mode="before")
    @classmethod
    def _checked_top_k(cls, value: Any) -> Any:
        return check_top_k(value)

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        top_k: int | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        config = RunnableConfig(callbacks=run_manager.get_child())
        found = self.base_retriever.invoke(query, config, **kwargs)
        compressor = self.compressor
        if (most := self._most(top_k)) is not None and found:
            # Loaded first, so that the copy shares an engine which is there for the next call too.
            compressor.scorer  # noqa: B018
            compressor = compressor.model_copy(update={"top_k": most})
        return compressor.compress_documents(found, query, run_manager.get_child())

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        top_k: int | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        config = RunnableConfig(callbacks=run_manager.get_child())
        found = await self.base_retriever.ainvoke(query, config, **kwargs)
        compressor = self.compressor
        if (most := self._most(top_k)) is not None and found:
            await compressor.ascorer()
            compressor = compressor.model_copy(update={"top_k": most})
        return await compressor.acompress_documents(found, query, run_manager.get_child())

    def _most(self, top_k: int | None) -> int | None:
        return self.top_k if top_k is None else check_top_k(top_k)


class BGECrossEncoder(BaseCrossEncoder):
    """Scores pairs of texts, as LangChain's interface of cross-encoders.

    For what takes such a model, langchain-classic's `CrossEncoderReranker` for one, in place of
    `HuggingFaceCrossEncoder`. `BGEDocumentCompressor` does more: it keeps scores, traces its runs
    and does not block event loops. The model is loaded on first use.
    """

    @shows_options(EngineOptions)
    def __init__(
        self,
        model: str = EngineSettings.model,
        *,
        reranker: Any = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        """Check the settings.

        Args:
            model: A folder, a name on the hub, or `"tiny"` for the bundled checkpoint.
            reranker: A ready engine, such as a `RemoteReranker`, to use instead of loading one; not
                together with engine settings.
            **options: The engine's settings by their names, as `EngineSettings` describes them.

        Raises:
            TypeError: There is no setting of that name.
            SettingsError: A setting has a value that is not allowed, or stands beside an engine.
        """
        check_options(BGECrossEncoder, options)
        beside = [*options, *(["model"] if model != EngineSettings.model else [])]
        settings = EngineSettings(model=model, **options)
        self._engine = LazyEngine(settings, reranker=reranker, beside=beside)

    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """Return the scores of (query, document) pairs in input order: in [0, 1], `[]` for none.

        Raises:
            InputTypeError: A pair is not two `str`; the message names which.
            RerankError: The model could not be loaded, or failed.
        """
        engine: Any = self._engine.get()
        return [float(score) for score in engine.score_pairs(text_pairs)]

    def warm_up(self) -> None:
        """Load the model now and run it once, so that the first query does not wait for it."""
        self._engine.warm_up()

    def close(self) -> None:
        """Let go of the shared engine, which is freed with its last user; a later use loads again.

        An engine that was given as `reranker=` stays open: it is its owner's to close.
        """
        self._engine.close()


def _config(callbacks: Callbacks | None) -> RunnableConfig:
    """Return the config of the run that this happens in, with `callbacks` instead if given."""
    return ensure_config(None if callbacks is None else RunnableConfig(callbacks=callbacks))


def _checked_documents(documents: object) -> list[Document]:
    # A Document is itself iterable, over its fields.
    if isinstance(documents, str | bytes | Document) or not isinstance(documents, Iterable):
        raise InputTypeError(
            f"documents must be a list of Document, got {type(documents).__name__}; "
            "wrap a single document in a list."
        )
    found = list(documents)
    for index, document in enumerate(found):
        if not isinstance(document, Document):
            raise InputTypeError(
                f"documents[{index}] must be a langchain_core Document, "
                f"got {type(document).__name__}; make it one with Document(page_content=...)."
            )
        # The metadata of such a document would hide it from the engine's own check.
        if not isinstance(document.page_content, str):
            raise InputTypeError(
                f"documents[{index}].page_content must be a str, "
                f"got {type(document.page_content).__name__}."
            )
    return found


def _documents_and_query(inputs: object) -> tuple[Any, Any]:
    if not isinstance(inputs, dict) or not {"query", "documents"} <= inputs.keys():
        got = sorted(map(str, inputs)) if isinstance(inputs, dict) else type(inputs).__name__
        raise InputTypeError(
            'The input must be a dict with the keys "query" and "documents", '
            f"got {got}; put a step in front that makes it one."
        )
    return inputs["documents"], inputs["query"]


def _inputs(query: str, found: Sequence[Document]) -> dict[str, Any]:
    return {"query": query, "document_count": len(found)}


def _outputs(ranked: Sequence[RankedDocument]) -> dict[str, Any]:
    return {
        "scores": [float(each.score) for each in ranked],
        "indexes": [int(each.index) for each in ranked],
    }


def _with_score(document: Document, ranked: RankedDocument) -> Document:
    scored = copied(
        lambda: document.model_copy(deep=True),
        name=f"documents[{ranked.index}]",
        metadata=document.metadata,
    )
    for left in ADDED_METADATA:
        scored.metadata.pop(left, None)
    length = len(document.page_content)
    scored.metadata |= added_metadata(ranked, start=len(ranked.text) - length, length=length)
    return scored
