"""LangChain's own standard tests of retrievers, on what `wrap` returns."""

import pytest
from langchain_community.retrievers import BM25Retriever
from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda

from bge_rerank_adapters.langchain import BGEDocumentCompressor, RerankingRetriever
from tests.texts import DOCUMENTS, QUERY

standard = pytest.importorskip("langchain_tests.integration_tests.retrievers")

TINY = {"model": "tiny", "device": "cpu", "dtype": "float32"}


class TestRerankingRetriever(standard.RetrieversIntegrationTests):
    @property
    def retriever_constructor(self):
        return RerankingRetriever

    @property
    def retriever_constructor_params(self):
        first_stage = BM25Retriever.from_texts(DOCUMENTS, k=len(DOCUMENTS))
        wrapped = BGEDocumentCompressor(**TINY).wrap(first_stage)
        return {"base_retriever": wrapped.base_retriever, "compressor": wrapped.compressor}

    @property
    def retriever_query_example(self):
        return QUERY

    @property
    def num_results_arg_name(self):
        return "top_k"


async def test_the_number_of_one_call_leaves_that_of_others_and_the_engine():
    documents = [Document(text) for text in DOCUMENTS]
    compressor = BGEDocumentCompressor(**TINY, top_k=2)
    retriever = compressor.wrap(RunnableLambda(lambda query: documents))
    engine = compressor.scorer
    assert len(retriever.invoke(QUERY, top_k=1)) == 1
    assert len(await retriever.ainvoke(QUERY, top_k=3)) == 3
    assert len(retriever.invoke(QUERY)) == 2
    assert compressor.scorer is engine
    for wrong in (0, 1.5):
        with pytest.raises(ValueError, match="top_k"):
            retriever.invoke(QUERY, top_k=wrong)
        with pytest.raises(ValueError, match="top_k"):
            RerankingRetriever(base_retriever=retriever, compressor=compressor, top_k=wrong)
