"""The LlamaIndex part of the demo: a query engine over the demo's collection."""

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from bge_rerank_adapters.calls.ranking import Scorer
from bge_rerank_adapters.cli.demo.first_stage import collection, search
from bge_rerank_adapters.llama_index import BGENodePostprocessor


class FirstStage(BaseRetriever):
    """Searches the demo's collection with BM25."""

    def __init__(self, top_k: int) -> None:
        """Find `top_k` nodes for each query."""
        self._top_k = top_k
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [
            NodeWithScore(node=TextNode(id_=name, text=collection()[name]), score=score)
            for name, score in search(query_bundle.query_str, top_k=self._top_k)
        ]


def query(reranker: Scorer, question: str, *, fetch: int, top_k: int) -> list[NodeWithScore]:
    """Return the nodes that reached the answer of a query engine."""
    engine = RetrieverQueryEngine.from_args(
        retriever=FirstStage(fetch),
        llm=MockLLM(),
        response_mode=ResponseMode.COMPACT,
        node_postprocessors=[BGENodePostprocessor(reranker=reranker, top_k=top_k)],
    )
    return list(engine.query(question).source_nodes)
