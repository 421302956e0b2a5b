"""What is told of a query that is cut: in results, numbers, logs, and hosts."""

import logging

import pytest
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode

from bge_rerank_adapters import RankedDocument, Reranker
from bge_rerank_adapters.calls.items import parse_item
from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.langchain import BGEDocumentCompressor
from bge_rerank_adapters.llama_index import BGENodePostprocessor
from bge_rerank_adapters.milvus import BGERerankFunction
from bge_rerank_adapters.settings import EngineSettings
from tests.logs import own_records

HISTORY = "The weather was fine and we talked of it for long. " * 60
QUESTION = "Who wrote Faust?"
DOCUMENTS = ["It rains in Weimar.", "Goethe wrote Faust.", "Cats sleep a lot."]
MARK = "relevance_query_truncated"


@pytest.fixture(scope="module")
def reranker():
    with Reranker("tiny", device="cpu", dtype="float32") as engine:
        yield engine


@pytest.fixture(scope="module")
def keeping_ends():
    with Reranker(
        "tiny", device="cpu", dtype="float32", query_truncation_side="left", max_length=64
    ) as engine:
        yield engine


def test_results_tell_that_the_query_was_cut(reranker):
    cut, whole = (reranker.rerank(query, DOCUMENTS) for query in (HISTORY + QUESTION, QUESTION))
    assert [each.query_truncated for each in cut] == [True] * 3
    assert [each.query_truncated for each in whole] == [False] * 3
    assert not any(each.truncated for each in (*cut, *whole))
    assert {row["query_truncated"] for row in cut.to_records()} == {True}


def test_the_numbers_count_pairs_whose_query_was_cut(reranker):
    before = reranker.stats().query_truncated_pairs
    reranker.rerank_many([(HISTORY, DOCUMENTS), (QUESTION, DOCUMENTS), (HISTORY, ["another"])])
    assert reranker.stats().query_truncated_pairs - before == 4


def test_each_engine_warns_once(caplog):
    for _ in range(2):
        caplog.clear()
        with Reranker("tiny", device="cpu") as engine, caplog.at_level(logging.WARNING):
            engine.warm_up()
            engine.rerank(QUESTION, DOCUMENTS)
            assert not own_records(caplog)
            engine.score_pairs([(QUESTION, "a"), (HISTORY, "b")])
            engine.rerank(HISTORY, DOCUMENTS)
        (warning,) = own_records(caplog)
        assert "query_max_length (384 tokens)" in warning.getMessage()
        assert "weather" not in warning.getMessage()


def test_the_end_of_a_query_can_be_kept(keeping_ends):
    ours, theirs = (
        keeping_ends.logits(HISTORY + query, DOCUMENTS) for query in (QUESTION, "Do cats sleep?")
    )
    assert ours.index(max(ours)) == 1
    assert theirs.index(max(theirs)) == 2
    assert all(each.query_truncated for each in keeping_ends.rerank(HISTORY + QUESTION, DOCUMENTS))


def test_what_fits_scores_the_same_whichever_side_would_be_cut(keeping_ends):
    with Reranker("tiny", device="cpu", dtype="float32", max_length=64) as engine:
        documents = [*DOCUMENTS, "long " * 200]
        assert keeping_ends.logits(QUESTION, documents) == pytest.approx(
            engine.logits(QUESTION, documents), abs=1e-5
        )


def test_the_milvus_function_keeps_its_instruction():
    def scores(query, instruction, **more):
        function = BGERerankFunction(
            "tiny",
            device="cpu",
            use_fp16=False,
            max_length=64,
            normalize=False,
            query_truncation_side="left",
            query_instruction_for_rerank=instruction,
            **more,
        )
        return [each.score for each in function(query, DOCUMENTS, top_k=0)]

    with_instruction = scores(HISTORY + QUESTION, "Cats:", query_instruction_format="{} {}")
    assert with_instruction != pytest.approx(scores(HISTORY + QUESTION, None), abs=1e-3)
    with Reranker(
        "tiny",
        device="cpu",
        dtype="float32",
        max_length=64,
        query_truncation_side="left",
        query_instruction="Cats: ",
    ) as engine:
        wanted = sorted(engine.logits(HISTORY + QUESTION, DOCUMENTS), reverse=True)
        assert with_instruction == pytest.approx(wanted, abs=1e-5)
    with pytest.raises(SettingsError, match="must end query_instruction_format"):
        scores(QUESTION, "Cats:", query_instruction_format="{1} {0}")


def test_flagembedding_cuts_the_end_alone():
    with pytest.raises(SettingsError, match="query_truncation_side='left' needs backend='native'"):
        EngineSettings(model="m", backend="flagembedding", query_truncation_side="left")


def test_langchain_documents_tell_it_only_then(reranker):
    compressor = BGEDocumentCompressor(reranker=reranker)
    documents = [Document(text, metadata={MARK: True}) for text in DOCUMENTS]
    for query, told in ((HISTORY, True), (QUESTION, None)):
        kept = compressor.compress_documents(documents, query)
        assert [each.metadata.get(MARK) for each in kept] == [told] * 3


def test_llama_index_nodes_tell_it_only_then(reranker):
    postprocessor = BGENodePostprocessor(reranker=reranker)
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in DOCUMENTS]
    for query, told in ((HISTORY, True), (QUESTION, None)):
        best = postprocessor.postprocess_nodes(nodes, query_str=query)
        assert [each.node.metadata.get(MARK) for each in best] == [told] * 3
        assert all(MARK in each.node.excluded_llm_metadata_keys for each in best)


def test_lines_of_bulk_runs_tell_it_only_then():
    item = parse_item(1, {"query": "q", "documents": ["a", "b"]})
    line = item.to_json(
        [RankedDocument(0, 0.5, "a", 0.0, query_truncated=True), RankedDocument(1, 0.5, "b", 0.0)]
    )
    assert line.count(b"query_truncated") == 1
