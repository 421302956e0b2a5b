"""Reranking inside LlamaIndex: a node postprocessor for query engines, chat engines and workflows.

```python
from bge_rerank_adapters.llama_index import BGENodePostprocessor

postprocessor = BGENodePostprocessor(model="BAAI/bge-reranker-v2-m3", top_k=3)
engine = index.as_query_engine(similarity_top_k=20, node_postprocessors=[postprocessor])
```
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

try:
    from llama_index.core.callbacks import CBEventType, EventPayload
    from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]
    from llama_index.core.instrumentation.events.exception import ExceptionEvent
    from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import (
        BaseNode,
        IndexNode,
        MetadataMode,
        NodeWithScore,
        QueryBundle,
    )
except ImportError as error:
    raise ImportError(
        "bge_rerank_adapters.llama_index needs llama-index-core; "
        'run: pip install "bge-rerank-adapters[llama-index]"'
    ) from error

from pydantic import PlainSerializer, model_validator

from bge_rerank_adapters.calls.checks import check_host_documents, check_query
from bge_rerank_adapters.calls.metadata import ADDED_METADATA, added_metadata
from bge_rerank_adapters.calls.ranked_document import RankedDocument
from bge_rerank_adapters.calls.runner import map_in_turns
from bge_rerank_adapters.engine.hosted.copies import copied
from bge_rerank_adapters.engine.hosted.fields import AdapterSettings
from bge_rerank_adapters.errors import InputTypeError, SettingsError

ADDED_KEYS = (*ADDED_METADATA, "retrieval_score")
"""The metadata that reranking adds to a node; hidden from embeddings and prompts."""

_dispatcher = get_dispatcher(__name__)


class BGENodePostprocessor(AdapterSettings, BaseNodePostprocessor):
    """A LlamaIndex node postprocessor that keeps the nodes that best answer the query.

    Takes the settings of `AdapterSettings`, and `callback_manager`; the model is loaded on first
    use. It returns copies with their ids and relationships. `score` is the relevance score, in
    [0, 1]. The metadata has also `relevance_score` (the same); `retrieval_index` (int, the index
    among the given nodes); `retrieval_score` (float, the node's score before, if any);
    `relevance_truncated` (True), if the end of its text was cut off; `relevance_query_truncated`
    (True), if the query was cut; and with `long_documents="window"` `relevance_span_start` and
    `relevance_span_end` (int), the characters of the best window in the node's text. None of these
    is part of an embedding, a prompt or the scored text.

    Every reranking, also of no nodes, dispatches `ReRankStartEvent` and `ReRankEndEvent` and runs
    the `RERANKING` callback. If it fails, the callback still ends, and an `ExceptionEvent` replaces
    the end event.

    Attributes:
        metadata_mode: Which metadata is put before a node's text when it is scored; by default
            that for embeddings.
    """

    metadata_mode: Annotated[
        MetadataMode, PlainSerializer(lambda mode: mode.value, return_type=str)
    ] = MetadataMode.EMBED

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex writes into dumps."""
        return "BGENodePostprocessor"

    @model_validator(mode="before")
    @classmethod
    def _without_class_name(cls, data: Any) -> Any:
        # LlamaIndex writes it into every dump, which must build an equal adapter.
        if isinstance(data, dict) and data.get("class_name") == cls.class_name():
            return {name: value for name, value in data.items() if name != "class_name"}
        return data

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        """Return copies of the best nodes, best first; the base class makes each call a span.

        Raises:
            SettingsError: There is no query.
            InputTypeError: The query is not a `str`, a node is not a `NodeWithScore`, or the
                metadata of a result cannot be copied.
            RerankError: The model could not be loaded, or failed.
        """
        query, found = _checked_query(query_bundle), _checked_nodes(nodes)
        with self._reported(query, found) as best:
            if found:
                texts = [self._text(each) for each in found]
                ranked = self.scorer.rerank(query.query_str, texts, **self._limits())
                best.extend(_with_score(found[each.index], each) for each in ranked)
        return best

    # The base class makes only the sync method a span.
    @_dispatcher.span
    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        """Return what `_postprocess_nodes` returns, without blocking the event loop."""
        query, found = _checked_query(query_bundle), _checked_nodes(nodes)
        with self._reported(query, found) as best:
            if found:
                scorer, texts = await self.ascorer(), await map_in_turns(self._text, found)
                ranked = await scorer.arerank(query.query_str, texts, **self._limits())
                best += await map_in_turns(
                    lambda each: _with_score(found[each.index], each), ranked
                )
        return best

    def _text(self, found: NodeWithScore) -> str:
        return _without_added_keys(found.node).get_content(self.metadata_mode)

    @contextmanager
    def _reported(
        self, query: QueryBundle, found: list[NodeWithScore]
    ) -> Iterator[list[NodeWithScore]]:
        """Report a reranking to LlamaIndex; its results go into the list that is yielded."""
        best: list[NodeWithScore] = []
        name = self.model or type(self.reranker).__name__
        top_n = len(found) if self.top_k is None else self.top_k
        payload: dict[str, Any] = {
            EventPayload.NODES: found,
            EventPayload.MODEL_NAME: name,
            EventPayload.QUERY_STR: query.query_str,
            EventPayload.TOP_K: top_n,
        }
        _dispatcher.event(ReRankStartEvent(query=query, nodes=found, top_n=top_n, model_name=name))
        try:
            with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as run:
                yield best
                run.on_end(payload={EventPayload.NODES: best})
        except BaseException as failure:
            _dispatcher.event(ExceptionEvent(exception=failure))
            raise
        _dispatcher.event(ReRankEndEvent(nodes=best))


def _checked_query(query_bundle: object) -> QueryBundle:
    if query_bundle is None:
        raise SettingsError(
            "A reranking needs a query, got None; give query_str= or query_bundle=."
        )
    if not isinstance(query_bundle, QueryBundle):
        raise InputTypeError(
            f"query_bundle must be a llama_index QueryBundle, got {type(query_bundle).__name__}; "
            "give a text as query_str=."
        )
    check_query(query_bundle.query_str)
    return query_bundle


def _checked_nodes(nodes: object) -> list[NodeWithScore]:
    return check_host_documents(
        nodes,
        NodeWithScore,
        host="llama_index",
        advice="wrap a node with NodeWithScore(node=...)",
        name="nodes",
        single=(BaseNode,),
    )


def _without_added_keys(node: BaseNode) -> BaseNode:
    """Return the node without the metadata of an earlier reranking, for reading its text."""
    if node.metadata.keys().isdisjoint(ADDED_KEYS):
        return node
    kept = {key: value for key, value in node.metadata.items() if key not in ADDED_KEYS}
    return node.model_copy(update={"metadata": kept})


def _with_score(found: NodeWithScore, ranked: RankedDocument) -> NodeWithScore:
    scored = copied(
        lambda: _deep_copy(found), name=f"nodes[{ranked.index}]", metadata=found.node.metadata
    )
    # The best window's span refers to the node's own text, without its metadata.
    text = found.node.get_content(MetadataMode.NONE)
    added = added_metadata(ranked, start=max(ranked.text.rfind(text), 0), length=len(text))
    if found.score is not None:
        added["retrieval_score"] = float(found.score)
    scored.node.metadata = _without_added_keys(scored.node).metadata | added
    for hidden in (
        scored.node.excluded_embed_metadata_keys,
        scored.node.excluded_llm_metadata_keys,
    ):
        hidden.extend(key for key in ADDED_KEYS if key not in hidden)
    scored.score = float(ranked.score)
    return scored


def _deep_copy(found: NodeWithScore) -> NodeWithScore:
    # An IndexNode may point at a whole retriever or query engine: a reference, not to be copied.
    shared = found.node.obj if isinstance(found.node, IndexNode) else None
    return copy.deepcopy(found, {id(shared): shared})
