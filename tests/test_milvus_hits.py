"""Hits of a search in Milvus, reranked as they are."""

import copy
import pickle
import threading

import pytest

from bge_rerank_adapters.errors import InputTypeError, SettingsError
from bge_rerank_adapters.milvus import BGERerankFunction

QUERY = "Who wrote Faust?"
TEXTS = ["It rains in Weimar.", "Goethe wrote Faust.", "Cats sleep a lot."]


@pytest.fixture(scope="module")
def function():
    return BGERerankFunction("tiny", device="cpu", use_fp16=False)


@pytest.fixture
def hits():
    return [
        {"id": n, "distance": 0.9 - n / 10, "entity": {"text": text, "tags": ["x"]}}
        for n, text in enumerate(TEXTS)
    ]


def test_copies_of_the_best_come_back_with_their_score(function, hits):
    before = copy.deepcopy(hits)
    best = function.rerank_hits(QUERY, hits, text_field="text", top_k=2)
    scores = {each.index: each.score for each in function(QUERY, TEXTS)}
    assert [each["id"] for each in best] == sorted(scores, key=scores.get, reverse=True)[:2]
    for each in best:
        assert each == before[each["id"]] | {
            "relevance_score": pytest.approx(scores[each["id"]], abs=1e-6),
            "retrieval_index": each["id"],
        }
        each["entity"]["tags"].append("changed")
    assert hits == before


def test_logits_do_not_get_into_relevance_scores(hits):
    function = BGERerankFunction("tiny", device="cpu", normalize=False)
    assert all(0 <= hit["relevance_score"] <= 1 for hit in function.rerank_hits(QUERY, hits))


def test_what_is_cut_is_told(function, hits):
    hits[0]["entity"]["text"] *= 500
    best = function.rerank_hits("The weather was fine. " * 200 + QUERY, hits, top_k=None)
    assert {each["id"]: each.get("relevance_truncated") for each in best} == {
        0: True,
        1: None,
        2: None,
    }
    assert {each["relevance_query_truncated"] for each in best} == {True}


def test_windows_are_told_in_the_fields_text(hits):
    function = BGERerankFunction(
        "tiny",
        device="cpu",
        long_documents="window",
        window_tokens=16,
        passage_instruction_for_rerank="Note: ",
    )
    hits[1]["entity"]["text"] = text = "The sun shines. " * 40 + TEXTS[1]
    (best,) = function.rerank_hits(QUERY, hits[1:2])
    assert "Goethe" in text[best["relevance_span_start"] : best["relevance_span_end"]]


def test_flat_rows_and_other_fields(function):
    rows = [{"id": n, "body": text} for n, text in enumerate(TEXTS)]
    (best,) = function.rerank_hits(QUERY, rows, text_field="body", top_k=1)
    assert best["id"] == 1


@pytest.mark.parametrize("none", [[], [[]], ()])
def test_no_hits_are_none(function, none):
    assert function.rerank_hits(QUERY, none) == []


def test_the_result_of_one_query_is_taken_and_of_several_refused(function, hits):
    assert function.rerank_hits(QUERY, [hits]) == function.rerank_hits(QUERY, hits)
    with pytest.raises(InputTypeError, match="got those of 2 queries; rerank one by one"):
        function.rerank_hits(QUERY, [hits, hits])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("text", "hits of one query, such as result"),
        ({"id": 1}, "hits of one query"),
        (None, "got NoneType"),
        (["a"], r"hits\[0\] is no hit but str"),
        ([{"id": 1, "entity": {}}], r"hits\[0\] has no text in its field 'text'.*output_fields"),
        ([{"id": 1, "entity": {"text": None}}], "has no text in its field"),
        ([{"text": "a", "lock": threading.Lock()}], r"hits\[0\] cannot be copied.*'lock'"),
    ],
)
def test_what_are_no_hits_is_refused_by_name(function, bad, message):
    with pytest.raises(InputTypeError, match=message):
        function.rerank_hits(QUERY, bad)


def test_other_bad_input_is_refused(function, hits):
    with pytest.raises(InputTypeError, match="query must be a str"):
        function.rerank_hits(None, hits)
    with pytest.raises(SettingsError, match="top_k"):
        function.rerank_hits(QUERY, hits, top_k=-1)


def test_repr_names_model_and_once_loaded_device_and_dtype(function):
    assert repr(function) == "BGERerankFunction('tiny', device=cpu, dtype=float32)"
    assert repr(pickle.loads(pickle.dumps(function))) == "BGERerankFunction('tiny')"  # noqa: S301


def test_hits_of_milvus_lite(function, tmp_path):
    pymilvus = pytest.importorskip("pymilvus")
    pytest.importorskip("milvus_lite")
    client = pymilvus.MilvusClient(str(tmp_path / "milvus.db"))
    try:
        schema = client.create_schema(auto_id=False)
        schema.add_field("number", pymilvus.DataType.INT64, is_primary=True)
        schema.add_field("vector", pymilvus.DataType.FLOAT_VECTOR, dim=2)
        schema.add_field("text", pymilvus.DataType.VARCHAR, max_length=200)
        schema.add_field("more", pymilvus.DataType.JSON)
        index = client.prepare_index_params()
        index.add_index("vector", index_type="FLAT", metric_type="COSINE")
        client.create_collection("texts", schema=schema, index_params=index)
        client.insert(
            "texts",
            [
                {"number": n, "vector": [1.0, n], "text": text, "more": {"list": [n]}}
                for n, text in enumerate(TEXTS)
            ],
        )
        search = {"limit": 3, "output_fields": ["text", "more", "vector"]}
        result = client.search("texts", [[1.0, 0.0]], **search)
        for given in (result, result[0]):
            best = function.rerank_hits(QUERY, given, top_k=2)
            assert best[0]["number"] == 1
            assert best[0]["distance"] == result[0][1]["distance"]
            assert best[0]["entity"] == result[0][1]["entity"]
            assert type(best[0]) is type(result[0][0])
        assert all("relevance_score" not in hit for hit in result[0])
        assert function.reranker.rerank(QUERY, result[0])[0].document is result[0][1]
        two = client.search("texts", [[1.0, 0.0], [0.0, 1.0]], **search)
        with pytest.raises(InputTypeError, match="2 queries"):
            function.rerank_hits(QUERY, two)
    finally:
        client.close()
