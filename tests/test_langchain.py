"""The LangChain adapter, driven through LangChain's own retrievers, pipes and tracers."""

import asyncio
import copy
import json
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever, EnsembleRetriever
from langchain_classic.retrievers.document_compressors import DocumentCompressorPipeline
from langchain_community.retrievers import BM25Retriever
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.language_models.chat_models import SimpleChatModel
from langchain_core.messages import AIMessageChunk
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGenerationChunk
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_text_splitters import CharacterTextSplitter

from bge_rerank_adapters.errors import InputTypeError, ScoringError
from bge_rerank_adapters.langchain import BGEDocumentCompressor, RerankingRetriever
from tests.texts import DOCUMENTS, QUERY

RUN_NAME = "BGEDocumentCompressor"


def documents(texts=DOCUMENTS):
    return [
        Document(id=f"d{i}", page_content=text, metadata={"source": f"s{i}", "nested": {"a": [i]}})
        for i, text in enumerate(texts)
    ]


def ids(found):
    return [document.id for document in found]


def texts(found):
    return [document.page_content for document in found]


def without_scores(document):
    added = {"relevance_score", "retrieval_index", "relevance_truncated"}
    return {key: value for key, value in document.metadata.items() if key not in added}


class Echo(SimpleChatModel):
    """A chat model that answers with its prompt, streamed word by word."""

    @property
    def _llm_type(self):
        return "echo"

    def _call(self, messages, stop=None, run_manager=None, **kwargs):
        return messages[-1].content

    def _stream(self, messages, stop=None, run_manager=None, **kwargs):
        for word in messages[-1].content.split(" "):
            yield ChatGenerationChunk(message=AIMessageChunk(content=word + " "))


class Broken:
    """A scorer whose model fails."""

    def rerank(self, query, documents, *, top_k=None, score_threshold=None):
        raise ScoringError("the model failed")

    async def arerank(self, query, documents, *, top_k=None, score_threshold=None):
        raise ScoringError("the model failed")


class Stuck(Broken):
    """A scorer that never answers; its synchronous method would fail."""

    def __init__(self, calls=1):
        """Set `all_asked` once so many calls wait."""
        self.left, self.all_asked = calls, asyncio.Event()

    async def arerank(self, query, documents, *, top_k=None, score_threshold=None):
        self.left -= 1
        if not self.left:
            self.all_asked.set()
        await asyncio.Event().wait()


@pytest.fixture
def compressor(reranker):
    return BGEDocumentCompressor(reranker=reranker, top_k=2)


@pytest.fixture
def best(reranker):
    """The texts of the best two documents, by the engine itself."""
    return [result.text for result in reranker.rerank(QUERY, DOCUMENTS, top_k=2)]


@pytest.fixture
def bm25():
    return BM25Retriever.from_documents(documents(), k=4)


@pytest.fixture
def vectors():
    store = InMemoryVectorStore(DeterministicFakeEmbedding(size=16))
    store.add_documents(documents())
    return store.as_retriever(search_kwargs={"k": 4})


@pytest.fixture(params=["bm25", "vectors", "ensemble"])
def first_stage(request, bm25, vectors):
    ensemble = EnsembleRetriever(retrievers=[bm25, vectors], weights=[0.5, 0.5])
    return {"bm25": bm25, "vectors": vectors, "ensemble": ensemble}[request.param]


@pytest.fixture(params=["ContextualCompressionRetriever", "wrap"])
def reranking(request, compressor):
    """Both ways to put the compressor behind a first stage."""
    if request.param == "wrap":
        return compressor.wrap
    return lambda base: ContextualCompressionRetriever(
        base_compressor=compressor, base_retriever=base
    )


@pytest.fixture
def tracer():
    return RunCollectorCallbackHandler()


def only_run(tracer, name=RUN_NAME):
    """The one run of that name, with its parent, in all that was traced; every run has ended."""
    found = []

    def walk(run, parent):
        assert run.end_time is not None, f"{run.name} was started and never ended"
        if run.name == name:
            found.append((run, parent))
        for child in run.child_runs:
            walk(child, run)

    for root in tracer.traced_runs:
        walk(root, None)
    assert len(found) == 1, [run.name for run, _ in found]
    return found[0]


# --- what comes back


def test_best_documents_first_with_scores_in_metadata(compressor, reranker):
    assert isinstance(compressor, BaseDocumentCompressor)
    found = compressor.compress_documents(documents(), QUERY)
    expected = reranker.rerank(QUERY, DOCUMENTS, top_k=2)
    assert found[0].id == "d1"
    assert [d.metadata["retrieval_index"] for d in found] == [r.index for r in expected]
    for document, result in zip(found, expected, strict=True):
        index = result.index
        assert document.id == f"d{index}"
        assert document.page_content == DOCUMENTS[index]
        assert without_scores(document) == {"source": f"s{index}", "nested": {"a": [index]}}
        assert type(document.metadata["relevance_score"]) is float
        assert type(document.metadata["retrieval_index"]) is int
        assert document.metadata["relevance_score"] == pytest.approx(result.score, abs=1e-6)
        assert "relevance_truncated" not in document.metadata
        assert json.loads(json.dumps(document.metadata)) == document.metadata


async def test_async_gives_the_same(compressor):
    found = await compressor.acompress_documents(documents(), QUERY)
    again = compressor.compress_documents(documents(), QUERY)
    assert ids(found) == ids(again)
    for one, other in zip(found, again, strict=True):
        assert without_scores(one) == without_scores(other)
        assert one.metadata["relevance_score"] == pytest.approx(
            other.metadata["relevance_score"], abs=1e-6
        )


def test_inputs_stay_untouched_even_when_the_result_is_changed(compressor):
    given = documents()
    before = copy.deepcopy(given)
    found = compressor.compress_documents(given, QUERY)
    assert given == before
    found[0].metadata["nested"]["a"].append("changed")
    found[0].metadata["more"] = True
    assert given == before


@pytest.mark.parametrize("form", ["ContextualCompressionRetriever", "wrap"])
def test_first_stage_keeps_its_documents_as_they_were(form, compressor, bm25):
    before = copy.deepcopy(bm25.docs)
    retriever = (
        compressor.wrap(bm25)
        if form == "wrap"
        else ContextualCompressionRetriever(base_compressor=compressor, base_retriever=bm25)
    )
    retriever.invoke(QUERY)
    assert bm25.docs == before


async def test_no_documents_need_no_model():
    compressor = BGEDocumentCompressor(model="no-such-owner/no-such-model")
    assert compressor.compress_documents([], QUERY) == []
    assert await compressor.acompress_documents([], QUERY) == []


def test_duplicates_keep_their_own_index_and_order(reranker):
    repeated = [DOCUMENTS[0], DOCUMENTS[1], DOCUMENTS[1], DOCUMENTS[0]]
    compressor = BGEDocumentCompressor(reranker=reranker, top_k=None)
    found = compressor.compress_documents(documents(repeated), QUERY)
    assert ids(found) == ["d1", "d2", "d0", "d3"]
    assert [d.metadata["retrieval_index"] for d in found] == [1, 2, 0, 3]


def test_threshold_is_inclusive_and_goes_before_top_k(reranker):
    everything = BGEDocumentCompressor(reranker=reranker, top_k=None)
    ranked = everything.compress_documents(documents(), QUERY)
    scores = [d.metadata["relevance_score"] for d in ranked]
    assert len(ranked) == 4
    assert scores == sorted(scores, reverse=True)

    def kept(**limits):
        compressor = BGEDocumentCompressor(reranker=reranker, **limits)
        return ids(compressor.compress_documents(documents(), QUERY))

    assert kept(top_k=None, score_threshold=scores[2]) == ids(ranked)[:3]
    assert kept(top_k=2, score_threshold=scores[2]) == ids(ranked)[:2]
    assert kept(top_k=4, score_threshold=scores[1]) == ids(ranked)[:2]
    assert kept(top_k=99) == ids(ranked)


def test_cut_documents_and_only_they_are_marked(reranker):
    compressor = BGEDocumentCompressor(reranker=reranker, top_k=None)
    given = documents([DOCUMENTS[1], "a long story " * 2000])
    given[0].metadata["relevance_truncated"] = True  # left by an earlier stage
    marks = {
        d.id: d.metadata.get("relevance_truncated", "absent")
        for d in compressor.compress_documents(given, QUERY)
    }
    assert marks == {"d0": "absent", "d1": True}
    assert given[0].metadata["relevance_truncated"] is True


def test_metadata_fields_are_scored_and_not_returned(reranker):
    compressor = BGEDocumentCompressor(
        reranker=reranker, top_k=None, metadata_fields=["title", "year", "absent", "nothing"]
    )
    given = [
        Document(page_content="See there.", metadata={"title": "An Index"}),
        Document(
            page_content="It happened then.",
            metadata={"year": 1956, "title": DOCUMENTS[1], "nothing": None},
        ),
    ]
    found = compressor.compress_documents(given, QUERY)
    assert texts(found) == ["It happened then.", "See there."]
    read = ["An Index\nSee there.", f"{DOCUMENTS[1]}\n1956\nIt happened then."]
    scores = reranker.score(QUERY, read)
    assert [d.metadata["relevance_score"] for d in found] == pytest.approx(
        [scores[1], scores[0]], abs=1e-5
    )


# --- through LangChain's retrievers and pipes


async def test_retrievers_sync_async_and_batched(reranking, first_stage, best):
    retriever = reranking(first_stage)
    assert isinstance(retriever, BaseRetriever)
    assert texts(retriever.invoke(QUERY)) == best
    assert texts(await retriever.ainvoke(QUERY)) == best
    assert [texts(found) for found in retriever.batch([QUERY] * 5)] == [best] * 5
    assert [texts(found) for found in await retriever.abatch([QUERY] * 5)] == [best] * 5
    assert [texts(found) for found in retriever.stream(QUERY)] == [best]


async def test_chain_with_a_chat_model(reranking, first_stage, best):
    chain = (
        {
            "context": reranking(first_stage) | (lambda found: " / ".join(texts(found))),
            "question": RunnablePassthrough(),
        }
        | ChatPromptTemplate.from_template("Use {context} to answer {question}")
        | Echo()
        | StrOutputParser()
    )
    answer = f"Use {' / '.join(best)} to answer {QUERY}"
    assert chain.invoke(QUERY).strip() == answer
    assert (await chain.ainvoke(QUERY)).strip() == answer
    assert [each.strip() for each in chain.batch([QUERY] * 3)] == [answer] * 3
    streamed = list(chain.stream(QUERY))
    assert len(streamed) > 10
    assert "".join(streamed).strip() == answer
    assert "".join([piece async for piece in chain.astream(QUERY)]).strip() == answer


async def test_compressor_pipeline(reranker, bm25):
    pipeline = DocumentCompressorPipeline(
        transformers=[
            CharacterTextSplitter(separator=". ", chunk_size=120, chunk_overlap=0),
            BGEDocumentCompressor(reranker=reranker, top_k=3),
            BGEDocumentCompressor(reranker=reranker, top_k=1),
        ]
    )
    retriever = ContextualCompressionRetriever(base_compressor=pipeline, base_retriever=bm25)
    for found in (retriever.invoke(QUERY), await retriever.ainvoke(QUERY)):
        assert [d.metadata["source"] for d in found] == ["s1"]
        # The second compressor got the first one's three, best first.
        assert found[0].metadata["retrieval_index"] == 0


def test_wrapped_retriever_passes_keywords_to_its_base(compressor, vectors):
    found = compressor.wrap(vectors).invoke(QUERY, k=1)
    assert len(found) == 1


async def test_as_runnable_in_a_pipe(compressor, best):
    pipe = (
        RunnableLambda(lambda query: {"query": query, "documents": documents()})
        | compressor.as_runnable()
        | texts
    )
    assert pipe.invoke(QUERY) == best
    assert await pipe.ainvoke(QUERY) == best
    assert pipe.batch([QUERY] * 3) == [best] * 3
    assert await pipe.abatch([QUERY] * 3) == [best] * 3


async def test_async_leaves_the_event_loop_free():
    stuck = Stuck(calls=3)
    compressor = BGEDocumentCompressor(reranker=stuck)
    waiting = asyncio.create_task(compressor.acompress_documents(documents(), QUERY))
    piped = asyncio.create_task(
        compressor.as_runnable().ainvoke({"query": QUERY, "documents": documents()})
    )
    wrapped = asyncio.create_task(
        compressor.wrap(RunnableLambda(lambda _: documents())).ainvoke(QUERY)
    )
    # Each of them waits while the loop lets the others go on.
    await asyncio.wait_for(stuck.all_asked.wait(), 60)
    tasks = [waiting, piped, wrapped]
    assert not any(task.done() for task in tasks)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


# --- tracing


@pytest.mark.parametrize("door", ["invoke", "ainvoke"])
async def test_tracer_in_config_sees_query_number_and_scores(door, reranking, bm25, tracer):
    retriever = reranking(bm25)
    config = {"callbacks": [tracer]}
    if door == "invoke":
        found = retriever.invoke(QUERY, config=config)
    else:
        found = await retriever.ainvoke(QUERY, config=config)
    run, parent = only_run(tracer)
    assert parent.name == type(retriever).__name__
    assert run.run_type == "chain"
    assert run.inputs == {"query": QUERY, "document_count": 4}
    assert run.outputs == {
        "scores": [d.metadata["relevance_score"] for d in found],
        "indexes": [d.metadata["retrieval_index"] for d in found],
    }
    assert run.error is None
    assert only_run(tracer, "BM25Retriever")[1].id == parent.id


def test_tracer_sees_each_run_of_a_batch(reranking, bm25, tracer):
    reranking(bm25).batch([QUERY] * 5, config={"callbacks": [tracer]})
    assert len(tracer.traced_runs) == 5
    for root in tracer.traced_runs:
        assert [child.name for child in root.child_runs] == ["BM25Retriever", RUN_NAME]
        assert root.child_runs[1].end_time is not None


@pytest.mark.parametrize("door", ["sync", "async"])
async def test_callbacks_of_the_run_around_it_are_found(door, compressor, tracer):
    def rerank(query):
        return compressor.compress_documents(documents(), query)

    async def arerank(query):
        return await compressor.acompress_documents(documents(), query)

    around = RunnableLambda(rerank, arerank, name="around")
    config = {"callbacks": [tracer], "tags": ["mine"], "metadata": {"user": "u"}}
    if door == "sync":
        around.invoke(QUERY, config)
    else:
        await around.ainvoke(QUERY, config)
    run, parent = only_run(tracer)
    assert parent.name == "around"
    assert "mine" in run.tags
    assert run.metadata["user"] == "u"


@pytest.mark.parametrize("door", ["sync", "async"])
async def test_callbacks_given_go_before_those_around(door, compressor, tracer):
    around_tracer = RunCollectorCallbackHandler()

    def rerank(query):
        return compressor.compress_documents(documents(), query, callbacks=[tracer])

    async def arerank(query):
        return await compressor.acompress_documents(documents(), query, callbacks=[tracer])

    around = RunnableLambda(rerank, arerank, name="around")
    if door == "sync":
        around.invoke(QUERY, {"callbacks": [around_tracer]})
    else:
        await around.ainvoke(QUERY, {"callbacks": [around_tracer]})
    assert only_run(tracer)[1] is None
    assert only_run(around_tracer, "around")[0].child_runs == []


async def test_as_runnable_is_traced(compressor, tracer):
    inputs = {"query": QUERY, "documents": documents()}
    compressor.as_runnable().invoke(inputs, {"callbacks": [tracer]})
    assert only_run(tracer)[1].name == "BGEDocumentCompressor.as_runnable"
    other = RunCollectorCallbackHandler()
    await compressor.as_runnable().ainvoke(inputs, {"callbacks": [other]})
    assert only_run(other)[1].name == "BGEDocumentCompressor.as_runnable"


def test_run_has_the_name_of_the_class(reranker, tracer):
    class Mine(BGEDocumentCompressor):
        pass

    Mine(reranker=reranker).compress_documents(documents(), QUERY, [tracer])
    assert only_run(tracer, "Mine")[0].outputs["indexes"][0] == 1


def test_empty_input_is_a_run_too(compressor, tracer):
    compressor.wrap(RunnableLambda(lambda _: [])).invoke(QUERY, {"callbacks": [tracer]})
    run, _ = only_run(tracer)
    assert run.inputs["document_count"] == 0
    assert run.outputs == {"scores": [], "indexes": []}


@pytest.mark.parametrize("door", ["invoke", "ainvoke"])
@pytest.mark.parametrize("form", ["ContextualCompressionRetriever", "wrap"])
async def test_tracer_sees_a_failure_and_the_caller_too(door, form, bm25, tracer):
    broken = BGEDocumentCompressor(reranker=Broken())
    retriever = (
        broken.wrap(bm25)
        if form == "wrap"
        else ContextualCompressionRetriever(base_compressor=broken, base_retriever=bm25)
    )

    async def fail():
        config = {"callbacks": [tracer]}
        return (
            retriever.invoke(QUERY, config)
            if door == "invoke"
            else await retriever.ainvoke(QUERY, config)
        )

    with pytest.raises(ScoringError, match="the model failed"):
        await fail()
    run, _ = only_run(tracer)
    assert "the model failed" in run.error
    assert not run.outputs


@pytest.mark.parametrize("door", ["compress", "acompress"])
async def test_metadata_that_cannot_be_copied_is_named_and_traced(door, reranker, tracer):
    found = documents()
    found[2].metadata["connection"] = threading.Lock()
    compressor = BGEDocumentCompressor(reranker=reranker, top_k=None)

    async def fail():
        if door == "compress":
            return compressor.compress_documents(found, QUERY, [tracer])
        return await compressor.acompress_documents(found, QUERY, [tracer])

    with pytest.raises(InputTypeError, match=r"documents\[2\] .*'connection'.*lock") as info:
        await fail()
    assert isinstance(info.value.__cause__, TypeError)
    run, _ = only_run(tracer)
    assert "'connection'" in run.error
    assert not run.outputs


def test_tracer_sees_that_the_model_could_not_be_loaded(tmp_path, tracer):
    compressor = BGEDocumentCompressor(model=tmp_path)
    with pytest.raises(Exception, match=r"config"):
        compressor.compress_documents(documents(), QUERY, [tracer])
    assert "config" in only_run(tracer)[0].error


async def test_tracer_sees_a_cancelled_call_end(tracer):
    stuck = Stuck()
    compressor = BGEDocumentCompressor(reranker=stuck)
    call = asyncio.create_task(compressor.acompress_documents(documents(), QUERY, [tracer]))
    await asyncio.wait_for(stuck.all_asked.wait(), 60)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert "Cancelled" in only_run(tracer)[0].error


# --- bad input


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "documents must be a list of Document, got NoneType"),
        ("text", "documents must be a list of Document, got str"),
        (Document(page_content="a"), "documents must be a list of Document, got Document"),
        ([Document(page_content="a"), "b"], r"documents\[1\] .* got str"),
        ([{"page_content": "a"}], r"documents\[0\] .* got dict"),
    ],
)
async def test_wrong_documents_are_named(given, message, compressor):
    with pytest.raises(InputTypeError, match=message):
        compressor.compress_documents(given, QUERY)
    with pytest.raises(InputTypeError, match=message):
        await compressor.acompress_documents(given, QUERY)


def test_document_that_lost_its_text_is_named(compressor):
    given = documents()
    given[2].page_content = None
    with pytest.raises(InputTypeError, match=r"documents\[2\].*NoneType"):
        compressor.compress_documents(given, QUERY)


async def test_query_must_be_text(compressor):
    with pytest.raises(InputTypeError, match="query"):
        compressor.compress_documents(documents(), None)
    with pytest.raises(InputTypeError, match="query"):
        await compressor.acompress_documents([], 3)


@pytest.mark.parametrize(
    ("given", "got"),
    [({"query": QUERY}, r"\['query'\]"), ({"question": 1}, r"\['question'\]"), (QUERY, "str")],
)
async def test_as_runnable_names_missing_keys(given, got, compressor):
    with pytest.raises(InputTypeError, match=f'"query" and "documents".*{got}'):
        compressor.as_runnable().invoke(given)
    with pytest.raises(InputTypeError, match=f'"query" and "documents".*{got}'):
        await compressor.as_runnable().ainvoke(given)


def test_wrap_takes_a_retriever_only(compressor, bm25):
    with pytest.raises(ValueError, match="base_retriever"):
        compressor.wrap("bm25")
    with pytest.raises(ValueError, match="base_retreiver"):
        RerankingRetriever(base_retriever=bm25, compressor=compressor, base_retreiver=bm25)


# --- settings


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_n": -1}, "must be at least 1, got -1"),
        ({"top_k": 1.5}, "top_k must be a whole number"),
        ({"top_k": 1, "top_n": 2}, r"top_k \(1\) and top_n \(2\).*give one of top_k, top_n"),
        ({"max_length": True}, "max_length must be a whole number of at least 1, got True"),
        ({"max_length": "256"}, "max_length must be a whole number of at least 1, got '256'"),
        ({"pack_tokens": True}, "pack_tokens must be .*whole number of at least 1, got True"),
        ({"query_max_length": 64.0}, "query_max_length must be a whole number"),
        ({"local_files_only": "yes"}, "local_files_only must be True or False, got 'yes'"),
        ({"revision": b"main"}, "revision must be"),
        ({"cutoff_layers": True}, "cutoff_layers must be"),
        ({"score_threshold": 3}, "score_threshold must be from 0 to 1"),
        ({"tpo_k": 3}, "tpo_k"),
        ({"device": "toaster"}, "toaster"),
        ({"metadata_fields": "title"}, "metadata_fields"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, word):
    with pytest.raises(ValueError, match=word):
        BGEDocumentCompressor(model="tiny", **settings)


def test_ready_engine_goes_without_engine_settings(reranker):
    with pytest.raises(ValueError, match="device, max_length"):
        BGEDocumentCompressor(reranker=reranker, device="cpu", max_length=256)
    with pytest.raises(ValueError, match="rerank"):
        BGEDocumentCompressor(reranker="tiny")
    with pytest.raises(ValueError, match=r"got the class Reranker; .*reranker=Reranker\(\.\.\.\)"):
        BGEDocumentCompressor(reranker=type(reranker))


def test_settings_that_the_engine_takes_are_taken_and_kept_plain():
    compressor = BGEDocumentCompressor(
        model=Path("tiny"), cache_dir=Path("there"), max_length=np.int64(256), cutoff_layers=None
    )
    assert (compressor.model, compressor.cache_dir) == ("tiny", "there")
    assert type(compressor.max_length) is int
    with pytest.raises(ValueError, match="give one of top_k, top_n"):
        compressor.model_copy(update={"top_k": 1, "top_n": 2})


def test_top_n_is_top_k():
    compressor = BGEDocumentCompressor(model="tiny", top_n=2)
    assert (compressor.top_k, compressor.top_n) == (2, 2)
    compressor.top_n = 5
    assert compressor.top_k == 5
    compressor.top_k = None
    assert compressor.top_n is None


@pytest.mark.parametrize("name", ["top_k", "top_n", "score_threshold"])
def test_assignment_is_checked_like_the_constructor(name):
    compressor = BGEDocumentCompressor(model="tiny", top_k=2)
    with pytest.raises(ValueError, match="got -1"):
        setattr(compressor, name, -1)
    assert (compressor.top_k, compressor.score_threshold) == (2, None)
    for fixed in ("device", "reranker"):
        with pytest.raises(ValueError, match=f"{fixed} is fixed"):
            setattr(compressor, fixed, "cpu")


def test_assigned_top_k_is_used(reranker):
    compressor = BGEDocumentCompressor(reranker=reranker)
    compressor.top_n = 1
    assert ids(compressor.compress_documents(documents(), QUERY)) == ["d1"]
    compressor.score_threshold = 1.0
    assert compressor.compress_documents(documents(), QUERY) == []
    assert compressor.reranker is reranker


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 2},
        {"top_k": None, "score_threshold": 0.25, "metadata_fields": ["title"]},
        {"device": ["cpu", "cpu"], "dtype": "float32", "max_length": 128},
    ],
)
def test_dump_and_pickle_build_an_equal_compressor(settings):
    compressor = BGEDocumentCompressor(model="tiny", **settings)
    dumped = compressor.model_dump()
    assert {name: dumped[name] for name in settings} == settings
    assert json.loads(json.dumps(dumped)) == dumped
    assert BGEDocumentCompressor(**dumped) == compressor
    assert BGEDocumentCompressor.model_validate_json(compressor.model_dump_json()) == compressor
    assert pickle.loads(pickle.dumps(compressor)) == compressor  # noqa: S301 - its own
    assert compressor != BGEDocumentCompressor(model="tiny", top_k=7)


@pytest.mark.parametrize("how", ["dump", "pickle"])
def test_settings_of_a_ready_engine_are_carried_and_not_its_weights(how, reranker):
    compressor = BGEDocumentCompressor(reranker=reranker, top_k=2)
    pickled = pickle.dumps(compressor)
    assert len(pickled) < 10_000
    again = (
        BGEDocumentCompressor(**compressor.model_dump()) if how == "dump" else pickle.loads(pickled)  # noqa: S301 - its own
    )
    assert again == compressor
    assert (again.reranker, again.device, again.dtype) == (None, "cpu", "float32")
    expected = compressor.compress_documents(documents(), QUERY)
    assert ids(again.compress_documents(documents(), QUERY)) == ids(expected)
    # Now that it has loaded its own engine, that is not carried either.
    assert len(pickle.dumps(again)) < 10_000


def test_token_is_told_to_nobody():
    compressor = BGEDocumentCompressor(model="tiny", token="hub-secret")  # noqa: S106
    assert compressor.token.get_secret_value() == "hub-secret"
    told = [repr(compressor), str(compressor), str(compressor.model_dump())]
    told += [compressor.model_dump_json(), repr(pickle.dumps(compressor))]
    told += [repr(compressor.wrap(RunnableLambda(documents)))]
    for wrong in ({"top_k": 0}, {"max_length": 0}, {"token": ["hub-secret"]}):
        with pytest.raises(ValueError, match=next(iter(wrong))) as error:
            BGEDocumentCompressor(**{"model": "tiny", "token": "hub-secret", **wrong})
        told.append(str(error.value))
    with pytest.raises(ValueError, match="token") as error:
        compressor.token = "hub-secret"  # noqa: S105
    told.append(str(error.value))
    assert [text for text in told if "hub-secret" in text] == []


def test_model_copy_is_checked_like_the_constructor(reranker):
    compressor = BGEDocumentCompressor(reranker=reranker, top_k=2, metadata_fields=["title"])
    assert compressor.model_copy() == compressor
    one = compressor.model_copy(update={"top_n": 1})
    assert (one.top_k, compressor.top_k) == (1, 2)
    assert one.reranker is reranker
    assert ids(one.compress_documents(documents(), QUERY)) == ["d1"]
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        compressor.model_copy(update={"top_k": 0})
    with pytest.raises(ValueError, match="tpo_k"):
        compressor.model_copy(update={"tpo_k": 1})


def test_deep_copies_share_the_engine_and_nothing_else(reranker):
    compressor = BGEDocumentCompressor(reranker=reranker, metadata_fields=["title"])
    for copied in (copy.deepcopy(compressor), compressor.model_copy(deep=True)):
        assert copied == compressor
        assert copied.reranker is reranker
        copied.metadata_fields.append("more")
    assert compressor.metadata_fields == ["title"]


def test_wrapped_retriever_pickles_by_its_settings(compressor, bm25, best):
    retriever = compressor.wrap(bm25)
    assert retriever.model_dump()["compressor"] == compressor.model_dump()
    again = pickle.loads(pickle.dumps(retriever))  # noqa: S301 - its own
    assert again.compressor == compressor
    assert texts(again.invoke(QUERY)) == best


# --- what an import brings and needs


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


def test_import_brings_no_torch():
    run = run_python(
        "import sys, bge_rerank_adapters.langchain as adapter\n"
        "adapter.BGEDocumentCompressor(model='tiny')\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    assert (run.returncode, run.stdout.strip()) == (0, "[]"), run.stderr


def test_missing_langchain_names_the_extra():
    run = run_python(
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'langchain_core':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
        "try:\n"
        "    import bge_rerank_adapters.langchain\n"
        "except ImportError as error:\n"
        "    print(error, '|', type(error.__cause__).__name__)\n"
    )
    assert 'pip install "bge-rerank-adapters[langchain]"' in run.stdout, run.stderr
    assert run.stdout.strip().endswith("| ModuleNotFoundError")
