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

from collections.abc import Sequence
from typing import Any

try:
    from langchain_core.callbacks import (
        AsyncCallbackManagerForRetrieverRun,
        CallbackManagerForRetrieverRun,
        Callbacks,
    )
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

from bge_rerank_adapters.calls.checks import check_host_documents, check_query
from bge_rerank_adapters.calls.limits import check_top_k
from bge_rerank_adapters.calls.metadata import ADDED_METADATA, added_metadata, with_metadata
from bge_rerank_adapters.calls.ranked_document import RankedDocument
from bge_rerank_adapters.calls.runner import map_in_turns
from bge_rerank_adapters.engine.hosted.copies import copied
from bge_rerank_adapters.engine.hosted.fields import AdapterSettings
from bge_rerank_adapters.errors import InputTypeError
from bge_rerank_adapters.langchain.cross_encoder import BGECrossEncoder

__all__ = ["BGECrossEncoder", "BGEDocumentCompressor", "RerankingRetriever"]


class BGEDocumentCompressor(AdapterSettings, BaseDocumentCompressor):
    """A LangChain document compressor that keeps the documents that best answer the query.

    Takes the settings of `AdapterSettings`; the model is loaded on first use. A call is traced as
    a run of the class's name, with the query, the number of documents and the scores.

    Attributes:
        metadata_fields: Names of metadata whose values are put before the scored text, each on a
            line, in this order; those missing or `None` are left out. Returned documents keep their
            own text.
    """

    metadata_fields: list[str] = Field(default_factory=list)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Return copies of the best documents, best first, with their scores in the metadata.

        Args:
            documents: The documents of the first stage; neither they nor their metadata are
                changed.
            query: The query.
            callbacks: Callbacks of the run; `None` is those of the surrounding run.

        Returns:
            At most `top_k` documents with their ids and metadata, and in the metadata also
            `relevance_score` (float, in [0, 1]); `retrieval_index` (int, the index in `documents`);
            `relevance_truncated` (True), if the end of the document was cut off;
            `relevance_query_truncated` (True), if the query was cut; and with
            `long_documents="window"` `relevance_span_start` and `relevance_span_end` (int), the
            characters of the best window in `page_content`. `[]` for no documents.

        Raises:
            InputTypeError: The query is not a `str`, a document is not a `Document` with text, or
                the metadata of a result cannot be copied.
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
        """Return a retriever that reranks the documents of `retriever` and keeps the best."""
        return RerankingRetriever(base_retriever=retriever, compressor=self)

    def as_runnable(self) -> Runnable[dict[str, Any], list[Document]]:
        """Return a runnable from `{"query": str, "documents": [Document, ...]}` to documents.

        Raises:
            InputTypeError: When it runs on an input without these keys.
        """

        def rerank(inputs: dict[str, Any]) -> list[Document]:
            return self.compress_documents(*_documents_and_query(inputs))

        async def arerank(inputs: dict[str, Any]) -> list[Document]:
            return await self.acompress_documents(*_documents_and_query(inputs))

        return RunnableLambda(rerank, arerank, name=f"{type(self).__name__}.as_runnable")

    def _text(self, document: Document) -> str:
        return with_metadata(document.page_content, document.metadata, names=self.metadata_fields)


class RerankingRetriever(BaseRetriever):
    """A retriever that reranks the documents of another one and keeps the best.

    Attributes:
        base_retriever: The first stage, which should find more than `compressor.top_k`.
        compressor: Reranks its documents.
        top_k: Maximum number of documents; `None` is the compressor's. `invoke` also takes it, for
            one call.
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
        if (limit := self._limit(top_k)) is not None and found:
            # Load the engine first: a copy that loaded it would not share it with later calls.
            compressor.scorer  # noqa: B018
            compressor = compressor.model_copy(update={"top_k": limit})
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
        if (limit := self._limit(top_k)) is not None and found:
            await compressor.ascorer()
            compressor = compressor.model_copy(update={"top_k": limit})
        return await compressor.acompress_documents(found, query, run_manager.get_child())

    def _limit(self, top_k: int | None) -> int | None:
        return self.top_k if top_k is None else check_top_k(top_k)


def _config(callbacks: Callbacks | None) -> RunnableConfig:
    """Return the config of the surrounding run, with `callbacks` in place of its own if given."""
    return ensure_config(None if callbacks is None else RunnableConfig(callbacks=callbacks))


def _checked_documents(documents: object) -> list[Document]:
    found = check_host_documents(
        documents,
        Document,
        host="langchain_core",
        advice="make it one with Document(page_content=...)",
    )
    for index, document in enumerate(found):
        # `_text` would hide it from the engine's own check.
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
