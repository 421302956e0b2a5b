"""The cross-encoder for LangChain, in what takes one."""

import pytest
from langchain_classic.retrievers.document_compressors import CrossEncoderReranker
from langchain_core.cross_encoders import BaseCrossEncoder
from langchain_core.documents import Document

from bge_rerank_adapters import Reranker
from bge_rerank_adapters.langchain import BGECrossEncoder


def test_the_cross_encoder_scores_pairs_and_serves_langchains_own_compressor():
    encoder = BGECrossEncoder("tiny", device="cpu", dtype="float32")
    assert isinstance(encoder, BaseCrossEncoder)
    texts = ["It rains in Weimar.", "Goethe wrote Faust.", "Cats sleep a lot."]
    pairs = [("Who wrote Faust?", text) for text in texts]
    with Reranker("tiny", device="cpu", dtype="float32") as engine:
        assert encoder.score(pairs) == engine.score_pairs(pairs)
        given = BGECrossEncoder(reranker=engine)
        assert given.score(pairs) == encoder.score(pairs)
        given.close()
        assert engine.score_pairs(pairs)
    assert encoder.score([]) == []
    compressor = CrossEncoderReranker(model=encoder, top_n=1)
    documents = [Document(text) for text in texts]
    [best] = compressor.compress_documents(documents, pairs[0][0])
    assert best is documents[1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model_name": "tiny"}, TypeError, "here it is called model"),
        ({"dtype": "int3"}, ValueError, "int3"),
        ({"reranker": object()}, ValueError, "rerank"),
    ],
)
def test_bad_arguments_of_the_cross_encoder_are_named(options, error, message):
    with pytest.raises(error, match=message):
        BGECrossEncoder(**options)


def test_a_cross_encoder_names_the_pair_that_is_none():
    with pytest.raises(TypeError, match=r"pairs\[0\]"):
        BGECrossEncoder("tiny", device="cpu").score([("one", 2)])
