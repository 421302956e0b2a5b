"""The ranker for Haystack, in its own pipelines."""

import asyncio
import copy
import os

import pytest

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"

haystack = pytest.importorskip("haystack")

from haystack import Document, Pipeline  # noqa: E402
from haystack.components.retrievers.in_memory import InMemoryBM25Retriever  # noqa: E402
from haystack.document_stores.in_memory import InMemoryDocumentStore  # noqa: E402
from haystack.utils import Secret  # noqa: E402

from bge_rerank_adapters import Reranker, SettingsError  # noqa: E402
from bge_rerank_adapters.haystack import BGERanker  # noqa: E402
from tests.texts import DOCUMENTS, QUERY  # noqa: E402

TINY = {"model": "tiny", "device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def engine():
    with Reranker(**TINY) as reranker:
        yield reranker


@pytest.fixture
def documents() -> list[Document]:
    return [
        Document(content=text, meta={"place": place, "tags": ["a"]}, score=0.5)
        for place, text in enumerate(DOCUMENTS)
    ]


def pipeline() -> Pipeline:
    store = InMemoryDocumentStore()
    store.write_documents([Document(content=text) for text in DOCUMENTS])
    made = Pipeline()
    made.add_component("retriever", InMemoryBM25Retriever(store, top_k=10))
    made.add_component("ranker", BGERanker(**TINY, top_k=2))
    made.connect("retriever.documents", "ranker.documents")
    return made


def test_a_pipeline_with_bm25_is_reranked(engine):
    inputs = {"retriever": {"query": QUERY}, "ranker": {"query": QUERY}}
    made = pipeline()
    found = made.run(inputs)["ranker"]["documents"]
    wanted = engine.rerank(QUERY, DOCUMENTS, top_k=2)
    assert [each.content for each in found] == [each.text for each in wanted]
    assert [each.score for each in found] == [each.score for each in wanted]
    made.warm_up()
    again = asyncio.run(made.run_async(inputs))["ranker"]["documents"]
    assert again == found
    made.close()
    loaded = Pipeline.loads(made.dumps(), allowed_modules=["bge_rerank_adapters.haystack"])
    assert loaded.get_component("ranker").to_dict() == made.get_component("ranker").to_dict()


def test_documents_are_copies_and_those_given_stay_as_they_were(documents, engine):
    before = copy.deepcopy(documents)
    ranker = BGERanker(**TINY)
    found = ranker.run(query=QUERY, documents=documents)["documents"]
    assert documents == before
    found[0].meta["tags"].append("b")
    assert documents == before
    assert sorted(each.id for each in found) == sorted(each.id for each in documents)
    assert [each.meta["place"] for each in found] == [
        each.index for each in engine.rerank(QUERY, DOCUMENTS)
    ]
    assert {type(each.score) for each in found} == {float}


def test_limits_of_a_run(documents):
    ranker = BGERanker(**TINY, top_k=3)
    assert len(ranker.run(query=QUERY, documents=documents)["documents"]) == 3
    assert len(ranker.run(query=QUERY, documents=documents, top_k=1)["documents"]) == 1
    assert ranker.run(query=QUERY, documents=documents, score_threshold=1.0)["documents"] == []
    assert ranker.run(query=QUERY, documents=[]) == {"documents": []}
    with pytest.raises(SettingsError, match="top_k"):
        ranker.run(query=QUERY, documents=documents, top_k=0)


def test_metadata_goes_before_the_text_and_cuts_are_told(engine):
    document = Document(content="Goethe did.", meta={"title": "Faust", "none": None})
    ranker = BGERanker(**TINY, meta_fields_to_embed=["title", "none", "missing"])
    [found] = ranker.run(query=QUERY, documents=[document])["documents"]
    assert found.score == engine.score(QUERY, ["Faust\nGoethe did."])[0]
    assert found.meta == document.meta
    [cut] = ranker.run(query=QUERY, documents=[Document(content="word " * 2000)])["documents"]
    assert cut.meta == {"relevance_truncated": True}


def test_a_dump_has_settings_and_where_the_token_is(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hf_secret")
    ranker = BGERanker(**TINY, token=Secret.from_env_var("MY_TOKEN"), max_length=64)
    dumped = ranker.to_dict()
    assert "hf_secret" not in str(dumped)
    assert dumped["type"] == "bge_rerank_adapters.haystack.BGERanker"
    assert dumped["init_parameters"]["max_length"] == 64
    other = BGERanker.from_dict(copy.deepcopy(dumped))
    assert other.to_dict() == dumped
    assert other._engine.settings == ranker._engine.settings
    with pytest.raises(ValueError, match="oken"):
        BGERanker(**TINY, token=Secret.from_token("hf_secret")).to_dict()


async def test_the_life_cycle(documents):
    ranker = BGERanker(**TINY)
    await ranker.warm_up_async()
    found = await ranker.run_async(query=QUERY, documents=documents)
    assert found == ranker.run(query=QUERY, documents=documents)
    await ranker.close_async()
    ranker.close()
    assert ranker.run(query=QUERY, documents=documents) == found


def test_a_ready_engine_is_used_and_stays_open(engine, documents):
    ranker = BGERanker(reranker=engine)
    assert ranker.run(query=QUERY, documents=documents)["documents"]
    ranker.close()
    assert not engine.closed
    assert ranker.to_dict()["init_parameters"]["model"] == "tiny"
    with pytest.raises(SettingsError, match="device cannot be set beside"):
        BGERanker(reranker=engine, device="cpu")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: BGERanker(batch_size=3), TypeError, "batch_size"),
        (lambda: BGERanker(token="x"), SettingsError, "Secret"),  # noqa: S106
        (lambda: BGERanker(top_k=0), SettingsError, "top_k"),
        (lambda: BGERanker(**TINY).run(query=1, documents=[]), TypeError, "query"),
        (lambda: BGERanker(**TINY).run(query="q", documents=["a"]), TypeError, r"documents\[0\]"),
        (lambda: BGERanker(**TINY).run(query="q", documents="a"), TypeError, "list of Document"),
        (
            lambda: BGERanker(**TINY).run(query="q", documents=[Document(content=None)]),
            TypeError,
            "has no text",
        ),
    ],
)
def test_what_is_not_allowed_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_mistyped_option_is_told_with_the_class_and_the_right_name():
    with pytest.raises(
        TypeError, match=r"^BGERanker\(\) got .*'topk'; did you mean 'top_k'\? It tak"
    ):
        BGERanker(model="tiny", topk=1)
