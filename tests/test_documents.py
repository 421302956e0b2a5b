"""Documents as people have them: texts, mappings, and objects of hosts."""

from collections import UserDict
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
from langchain_core.documents import Document
from llama_index.core.schema import Document as LlamaDocument
from llama_index.core.schema import ImageNode, MetadataMode, NodeWithScore, TextNode

from bge_rerank_adapters import RankedDocument, Reranker
from bge_rerank_adapters.errors import InputTypeError
from bge_rerank_adapters.milvus import BGERerankFunction

QUERY = "Who wrote Faust?"
TEXTS = ["It rains in Weimar.", "Goethe wrote Faust.", "Cats sleep a lot."]


@pytest.fixture(scope="module")
def reranker():
    with Reranker("tiny", device="cpu", dtype="float32") as engine:
        yield engine


def hit(text):
    return {"id": 7, "distance": 0.1, "entity": {"text": text, "vector": [0.5]}}


@pytest.mark.parametrize(
    "make",
    [
        str,
        np.str_,
        lambda text: {"text": text, "id": 1, "content": None},
        lambda text: {"content": text},
        lambda text: UserDict(page_content=text),
        lambda text: MappingProxyType({"text": text}),
        hit,
        Document,
        lambda text: TextNode(text=text),
        lambda text: NodeWithScore(node=TextNode(text=text), score=0.5),
        lambda text: LlamaDocument(text=text),
        lambda text: SimpleNamespace(page_content=text),
    ],
)
def test_every_kind_scores_as_its_text_and_comes_back_itself(reranker, make):
    documents = [make(text) for text in TEXTS]
    wanted = reranker.rerank(QUERY, TEXTS)
    results = reranker.rerank(QUERY, documents)
    assert [(each.index, each.text) for each in results] == [
        (each.index, each.text) for each in wanted
    ]
    assert [each.logit for each in results] == pytest.approx([e.logit for e in wanted], abs=1e-5)
    assert all(each.document is documents[each.index] for each in results)
    assert {type(each.text) for each in results} == {str}
    logits = reranker.logits(QUERY, TEXTS)
    assert reranker.logits(QUERY, documents) == pytest.approx(logits, abs=1e-5)
    pairs = reranker.score_pairs([(QUERY, each) for each in documents])
    assert pairs == pytest.approx(reranker.score(QUERY, documents), abs=1e-5)
    ((best, *_),) = reranker.rerank_many([(QUERY, tuple(documents))], top_k=1)
    assert best.document is documents[1]


async def test_asynchronous_calls_give_the_very_object_too(reranker):
    documents = [Document(text) for text in TEXTS]
    (best,) = await reranker.arerank(QUERY, iter(documents), top_k=1)
    assert best.document is documents[1]


def test_nodes_are_read_as_for_an_embedding(reranker):
    node = TextNode(
        text="He wrote it.",
        metadata={"author": "Goethe", "secret": "x"},
        excluded_embed_metadata_keys=["secret"],
    )
    (result,) = reranker.rerank(QUERY, [node])
    assert result.text == node.get_content(MetadataMode.EMBED) == "author: Goethe\n\nHe wrote it."


def test_the_milvus_function_takes_them_as_well():
    function = BGERerankFunction("tiny", device="cpu", use_fp16=False)
    (best,) = function(QUERY, [hit(text) for text in TEXTS], top_k=1)
    assert (best.index, best.text) == (1, TEXTS[1])


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"text": "a", "content": "b"}, r"exactly one of .* has text and content; give the text"),
        ({"title": "a"}, "exactly one of text, content, page_content, .* has none of them"),
        ({}, "has none of them"),
        ({"text": 5}, r"The text of documents\[1\] must be a str, got int \(5\)"),
        ({"entity": {"text": "a", "content": "b"}}, "has text and content"),
        ({"entity": {"title": "a"}}, "has none of them"),
        ({"entity": "a"}, "has none of them"),
        (5, r"documents\[1\] must be a str, got int \(5\); give its text, or an object with one"),
        (None, "must be a str, got NoneType"),
        (["a"], "must be a str, got list"),
        (b"a", "must be a str, got bytes"),
        (SimpleNamespace(page_content=5), "must be a str"),
        (SimpleNamespace(text="a"), "must be a str"),
        (Document, "must be a str"),
        (SimpleNamespace(get_content=lambda: "of another library"), "must be a str"),
    ],
)
def test_what_is_not_plain_is_refused_with_its_place(reranker, document, message):
    with pytest.raises(InputTypeError, match=message):
        reranker.rerank(QUERY, ["a", document])
    with pytest.raises(InputTypeError, match=r"pairs\[0\]"):
        reranker.score_pairs([(QUERY, document)])


@pytest.mark.parametrize(
    "document", [Document("a"), TextNode(text="a"), {"text": "a"}, hit("a"), ImageNode(text="a")]
)
def test_one_document_in_place_of_a_list_is_refused(reranker, document):
    with pytest.raises(InputTypeError, match="wrap a single document in a list"):
        reranker.rerank(QUERY, document)


def test_inputs_are_not_touched(reranker):
    documents = [hit(text) for text in TEXTS]
    reranker.rerank(QUERY, documents)
    assert documents == [hit(text) for text in TEXTS]


def test_results_are_compared_without_their_documents():
    array = np.zeros(3)
    one, other = (RankedDocument(0, 0.5, "a", 0.0, document=each) for each in (array, None))
    assert one == other
    assert "array" not in repr(one)
