"""The LlamaIndex adapter, driven through LlamaIndex's own query and chat engines and events."""

import asyncio
import copy
import json
import math
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.exception import ExceptionEvent
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.llms import MockLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import (
    Document,
    IndexNode,
    MetadataMode,
    NodeRelationship,
    NodeWithScore,
    QueryBundle,
    RelatedNodeInfo,
    TextNode,
)

from bge_rerank_adapters.calls.ranking import Scorer
from bge_rerank_adapters.engine import shared as sharing
from bge_rerank_adapters.errors import (
    CheckpointNotFoundError,
    InputTypeError,
    ScoringError,
    SettingsError,
)
from bge_rerank_adapters.llama_index import BGENodePostprocessor
from tests.texts import DOCUMENTS, QUERY

ADDED = {"relevance_score", "retrieval_index", "retrieval_score", "relevance_truncated"}
DOORS = ["query", "aquery"]


def nodes(texts=DOCUMENTS, *, scored=True):
    return [
        NodeWithScore(
            node=TextNode(
                id_=f"n{i}",
                text=text,
                metadata={"source": f"s{i}", "nested": {"a": [i]}},
                excluded_embed_metadata_keys=["nested"],
                relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=f"doc{i}")},
            ),
            score=0.1 * i if scored else None,
        )
        for i, text in enumerate(texts)
    ]


def ids(found):
    return [each.node.node_id for each in found]


def scores(found):
    return {each.node.node_id: each.score for each in found}


def indexes(found):
    return [each.node.metadata["retrieval_index"] for each in found]


class Found(BaseRetriever):
    """A first stage that finds what it was made with."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def _retrieve(self, query_bundle):
        return self.found


class Broken:
    """A scorer whose model fails."""

    def rerank(self, query, documents, *, top_k=None, score_threshold=None):
        raise ScoringError("the model failed")

    async def arerank(self, query, documents, *, top_k=None, score_threshold=None):
        raise ScoringError("the model failed")


class Stuck(Broken):
    """A scorer that never answers; its synchronous method would fail."""

    def __init__(self):
        self.asked = asyncio.Event()

    async def arerank(self, query, documents, *, top_k=None, score_threshold=None):
        self.asked.set()
        await asyncio.Event().wait()


class Events(BaseEventHandler):
    """Keeps the events of reranking and failure."""

    seen: list = []  # noqa: RUF012 - a pydantic field, copied for each instance

    @classmethod
    def class_name(cls):
        return "Events"

    def handle(self, event, **kwargs):
        if isinstance(event, ReRankStartEvent | ReRankEndEvent | ExceptionEvent):
            self.seen.append(event)

    @property
    def names(self):
        return [type(event).__name__ for event in self.seen]


class Callbacks(BaseCallbackHandler):
    """Keeps what LlamaIndex's older callbacks tell of reranking."""

    def __init__(self):
        super().__init__([], [])
        self.starts, self.ends = [], []

    def start_trace(self, trace_id=None):
        pass

    def end_trace(self, trace_id=None, trace_map=None):
        pass

    def on_event_start(self, event_type, payload=None, event_id="", parent_id="", **kwargs):
        if event_type == CBEventType.RERANKING:
            self.starts.append((event_id, payload))
        return event_id

    def on_event_end(self, event_type, payload=None, event_id="", **kwargs):
        if event_type == CBEventType.RERANKING:
            self.ends.append((event_id, payload))

    @property
    def paired(self):
        return [start for start, _ in self.starts] == [end for end, _ in self.ends]


@pytest.fixture
def events():
    root, handler = get_dispatcher(), Events(seen=[])
    root.event_handlers.append(handler)
    yield handler
    root.event_handlers.remove(handler)


@pytest.fixture
def spans():
    root, handler = get_dispatcher(), SimpleSpanHandler()
    root.span_handlers.append(handler)
    yield handler
    root.span_handlers.remove(handler)


@pytest.fixture
def callbacks():
    return Callbacks()


@pytest.fixture
def postprocessor(reranker):
    return BGENodePostprocessor(reranker=reranker, top_k=2)


@pytest.fixture
def everything(reranker):
    return BGENodePostprocessor(reranker=reranker, top_k=None)


def engine_over(found, postprocessor, *, callbacks=None):
    return RetrieverQueryEngine.from_args(
        Found(found),
        llm=MockLLM(),
        node_postprocessors=[postprocessor],
        callback_manager=CallbackManager([callbacks] if callbacks else []),
    )


def vector_index(found=None):
    return VectorStoreIndex(
        [each.node for each in found or nodes()], embed_model=MockEmbedding(embed_dim=8)
    )


async def ask(engine, door, query=QUERY):
    return engine.query(query) if door == "query" else await engine.aquery(query)


async def rerank(postprocessor, found, door):
    """Rerank through the host's public method for that way of asking."""
    if door == "query":
        return postprocessor.postprocess_nodes(found, query_str=QUERY)
    return await postprocessor.apostprocess_nodes(found, query_str=QUERY)


# ---------------------------------------------------------------- in the real hosts


@pytest.mark.parametrize("door", DOORS)
async def test_query_engine_over_a_vector_index(door, postprocessor, reranker):
    engine = vector_index().as_query_engine(
        llm=MockLLM(), similarity_top_k=4, node_postprocessors=[postprocessor]
    )
    response = await ask(engine, door)
    texts = [f"source: s{i}\n\n{text}" for i, text in enumerate(DOCUMENTS)]
    best = reranker.rerank(QUERY, texts, top_k=2)
    assert [each.node.text for each in response.source_nodes] == [
        DOCUMENTS[each.index] for each in best
    ]
    assert ids(response.source_nodes)[0] == "n1"
    assert [each.score for each in response.source_nodes] == pytest.approx(
        [each.score for each in best], abs=1e-5
    )


@pytest.mark.parametrize("door", DOORS)
async def test_what_is_added_reaches_no_prompt(door, postprocessor):
    response = await ask(
        vector_index().as_query_engine(
            llm=MockLLM(), similarity_top_k=4, node_postprocessors=[postprocessor]
        ),
        door,
    )
    # MockLLM answers with its prompt.
    prompt = str(response)
    assert "source: s1" in prompt
    assert DOCUMENTS[1] in prompt
    assert not [key for key in ADDED if key in prompt]


@pytest.mark.parametrize("door", DOORS)
async def test_query_engine_over_bm25(door, postprocessor):
    bm25 = pytest.importorskip("llama_index.retrievers.bm25")
    first_stage = bm25.BM25Retriever.from_defaults(
        nodes=[each.node for each in nodes()], similarity_top_k=4
    )
    before = {each.node.node_id: each.score for each in first_stage.retrieve(QUERY)}
    engine = RetrieverQueryEngine.from_args(
        first_stage, llm=MockLLM(), node_postprocessors=[postprocessor]
    )
    found = (await ask(engine, door)).source_nodes
    assert ids(found)[0] == "n1"
    assert len(found) == 2
    for each in found:
        assert each.node.metadata["retrieval_score"] == pytest.approx(before[each.node.node_id])
        json.dumps(each.to_dict())


@pytest.mark.parametrize("door", ["chat", "achat"])
async def test_chat_engine(door, postprocessor, events):
    engine = vector_index().as_chat_engine(
        chat_mode="context",
        llm=MockLLM(),
        # The default memory leaves a database thread behind that outlives the event loop.
        memory=ChatMemoryBuffer.from_defaults(token_limit=3000),
        similarity_top_k=4,
        node_postprocessors=[postprocessor],
    )
    response = engine.chat(QUERY) if door == "chat" else await engine.achat(QUERY)
    assert ids(response.source_nodes)[0] == "n1"
    assert len(response.source_nodes) == 2
    assert DOCUMENTS[1] in str(response)
    assert not [key for key in ADDED if key in str(response)]
    assert events.names == ["ReRankStartEvent", "ReRankEndEvent"]


def test_postprocessors_in_a_row(postprocessor, reranker):
    class Reverse(BaseNodePostprocessor):
        def _postprocess_nodes(self, found, query_bundle=None):
            return found[::-1]

    engine = vector_index().as_query_engine(
        llm=MockLLM(), similarity_top_k=4, node_postprocessors=[postprocessor, Reverse()]
    )
    assert ids(engine.query(QUERY).source_nodes)[-1] == "n1"


def test_query_bundle_and_query_str_are_the_same(postprocessor):
    by_text = postprocessor.postprocess_nodes(nodes(), query_str=QUERY)
    by_bundle = postprocessor.postprocess_nodes(nodes(), query_bundle=QueryBundle(QUERY))
    assert by_text == by_bundle
    assert ids(by_text)[0] == "n1"
    with pytest.raises(ValueError, match="both"):
        postprocessor.postprocess_nodes(nodes(), QueryBundle(QUERY), query_str=QUERY)


# ---------------------------------------------------------------- what comes back


@pytest.mark.parametrize("door", DOORS)
async def test_scores_and_places_are_told(door, postprocessor):
    found = await rerank(postprocessor, nodes(), door)
    assert len(found) == 2
    assert found[0].score > found[1].score
    for each in found:
        metadata, index = each.node.metadata, each.node.metadata["retrieval_index"]
        assert each.node.node_id == f"n{index}"
        assert each.node.text == DOCUMENTS[index]
        assert metadata["source"] == f"s{index}"
        assert metadata["nested"] == {"a": [index]}
        assert each.node.source_node.node_id == f"doc{index}"
        assert metadata["relevance_score"] == each.score
        assert metadata["retrieval_score"] == 0.1 * index
        assert [type(metadata[key]) for key in ("relevance_score", "retrieval_index")] == [
            float,
            int,
        ]
        assert type(each.score) is float
        assert 0.0 <= each.score <= 1.0
        assert "relevance_truncated" not in metadata


@pytest.mark.parametrize("door", DOORS)
async def test_inputs_stay_untouched_even_when_the_result_is_changed(door, everything):
    found = nodes()
    before = copy.deepcopy([each.to_dict() for each in found])
    for each in await rerank(everything, found, door):
        assert each is not found[each.node.metadata["retrieval_index"]]
        each.node.metadata["nested"]["a"].append("changed")
        each.node.relationships[NodeRelationship.SOURCE].node_id = "changed"
        each.node.excluded_embed_metadata_keys.append("changed")
        each.node.excluded_llm_metadata_keys.append("changed")
    assert [each.to_dict() for each in found] == before


@pytest.mark.parametrize("score", [None, 0.5, 1, np.float32(0.5)])
def test_everything_is_plain_json(score, everything):
    found = nodes()
    for each in found:
        each.score = score
    for each in everything.postprocess_nodes(found, query_str=QUERY):
        again = json.loads(json.dumps(each.to_dict()))
        assert again["score"] == each.score
        if score is None:
            assert "retrieval_score" not in each.node.metadata
        else:
            assert type(each.node.metadata["retrieval_score"]) is float
            assert each.node.metadata["retrieval_score"] == score


def test_duplicates_keep_their_own_index_and_ties_their_order(everything):
    texts = [DOCUMENTS[0], DOCUMENTS[1], DOCUMENTS[1], DOCUMENTS[0]]
    found = nodes(texts)
    for each in found:
        each.node.metadata = {}
    reranked = everything.postprocess_nodes(found, query_str=QUERY)
    assert indexes(reranked) == [1, 2, 0, 3]
    assert ids(reranked) == ["n1", "n2", "n0", "n3"]
    assert reranked[0].score == reranked[1].score
    assert reranked[2].score == reranked[3].score


def test_same_node_twice_gives_two_copies(everything):
    one = nodes()[1]
    first, second = everything.postprocess_nodes([one, one], query_str=QUERY)
    assert (indexes([first, second]), ids([first, second])) == ([0, 1], ["n1", "n1"])
    assert first.node is not second.node


def test_threshold_is_inclusive_and_goes_with_top_k(reranker, everything):
    best = everything.postprocess_nodes(nodes(), query_str=QUERY)

    def kept(**settings):
        postprocessor = BGENodePostprocessor(reranker=reranker, **settings)
        return ids(postprocessor.postprocess_nodes(nodes(), query_str=QUERY))

    second = best[1].score
    assert len(best) == 4
    assert kept(top_k=None, score_threshold=second) == ids(best[:2])
    assert kept(top_k=None, score_threshold=math.nextafter(second, 1)) == ids(best[:1])
    assert kept(top_k=1, score_threshold=second) == ids(best[:1])
    assert kept(top_k=3, score_threshold=second) == ids(best[:2])
    assert kept(top_k=99, score_threshold=0.0) == ids(best)
    assert kept(score_threshold=0.0) == ids(best[:3])


def test_cut_text_and_only_that_is_marked(everything):
    found = nodes([*DOCUMENTS, DOCUMENTS[1] * 60])
    marked = {
        each.node.node_id: each.node.metadata.get("relevance_truncated")
        for each in everything.postprocess_nodes(found, query_str=QUERY)
    }
    assert marked == {"n0": None, "n1": None, "n2": None, "n3": None, "n4": True}


def test_mark_of_an_earlier_reranking_goes(everything):
    found = nodes(scored=False)
    for each in found:
        each.node.metadata |= {"relevance_truncated": True, "retrieval_score": 7.0}
    for each in everything.postprocess_nodes(found, query_str=QUERY):
        assert not each.node.metadata.keys() & {"relevance_truncated", "retrieval_score"}


def test_whatever_an_index_node_points_at_is_shared(everything):
    target = threading.Lock()
    node = IndexNode(index_id="i", text=DOCUMENTS[1], obj=target, metadata={"nested": [1]})
    [found] = everything.postprocess_nodes([NodeWithScore(node=node)], query_str=QUERY)
    assert found.node is not node
    assert found.node.obj is target
    assert node.metadata == {"nested": [1]}


def test_documents_and_subclasses_keep_their_class(everything):
    class Remembered(NodeWithScore):
        seen_at: str = ""

    found = Remembered(node=Document(text=DOCUMENTS[1], id_="d"), score=0.5, seen_at="noon")
    [again] = everything.postprocess_nodes([found], query_str=QUERY)
    assert type(again) is Remembered
    assert again.seen_at == "noon"
    assert type(again.node) is Document
    assert (found.score, again.node.metadata["retrieval_score"]) == (0.5, 0.5)


# ---------------------------------------------------------------- what is scored


def read_in(mode, index):
    """Return the text that a node of `titled` should be scored by."""
    lines = {
        "embed": f"source: s{index}",
        "llm": f"title: t{index}",
        "all": f"source: s{index}\ntitle: t{index}",
        "none": None,
    }[mode]
    return DOCUMENTS[index] if lines is None else f"{lines}\n\n{DOCUMENTS[index]}"


def titled():
    found = nodes()
    for i, each in enumerate(found):
        each.node.metadata = {"source": f"s{i}", "title": f"t{i}"}
        each.node.excluded_embed_metadata_keys = ["title"]
        each.node.excluded_llm_metadata_keys = ["source"]
    return found


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("mode", ["embed", "llm", "all", "none"])
async def test_metadata_mode_says_what_is_scored(mode, door, reranker):
    postprocessor = BGENodePostprocessor(reranker=reranker, top_k=None, metadata_mode=mode)
    found = await rerank(postprocessor, titled(), door)
    expected = reranker.score(QUERY, [read_in(mode, i) for i in range(4)])
    assert scores(found) == pytest.approx({f"n{i}": expected[i] for i in range(4)}, abs=1e-5)
    # The modes can be told apart by their scores, else the line above proves nothing.
    others = {"embed", "llm", "all", "none"} - {mode}
    for other in others:
        there = reranker.score(QUERY, [read_in(other, i) for i in range(4)])
        assert max(abs(a - b) for a, b in zip(there, expected, strict=True)) > 1e-4


def test_metadata_mode_is_that_of_embeddings_by_default(everything, reranker):
    named = BGENodePostprocessor(
        reranker=reranker, top_k=None, metadata_mode=MetadataMode.EMBED
    ).postprocess_nodes(titled(), query_str=QUERY)
    assert everything.postprocess_nodes(titled(), query_str=QUERY) == named
    assert everything.metadata_mode is MetadataMode.EMBED


@pytest.mark.parametrize("mode", [MetadataMode.EMBED, MetadataMode.LLM])
def test_what_is_added_is_hidden_from_models(mode, everything):
    found = nodes([*DOCUMENTS, DOCUMENTS[1] * 60])
    for each in everything.postprocess_nodes(found, query_str=QUERY):
        before = found[each.node.metadata["retrieval_index"]].node
        assert each.node.get_content(mode) == before.get_content(mode)
        assert each.node.get_content(MetadataMode.ALL) != before.get_content(MetadataMode.ALL)


@pytest.mark.parametrize("mode", ["embed", "all"])
def test_reranking_twice_gives_the_same_scores(mode, reranker):
    postprocessor = BGENodePostprocessor(reranker=reranker, top_k=None, metadata_mode=mode)
    once = postprocessor.postprocess_nodes(nodes(), query_str=QUERY)
    twice = postprocessor.postprocess_nodes(once, query_str=QUERY)
    assert ids(twice) == ids(once)
    assert scores(twice) == pytest.approx(scores(once), abs=1e-5)
    assert indexes(twice) == [0, 1, 2, 3]
    for first, second in zip(once, twice, strict=True):
        assert second.node.metadata["retrieval_score"] == first.score
        for hidden in (
            second.node.excluded_embed_metadata_keys,
            second.node.excluded_llm_metadata_keys,
        ):
            assert set(hidden) >= ADDED
            assert len(hidden) == len(set(hidden))


def test_scores_of_an_earlier_reranking_are_not_read_even_if_not_hidden(everything):
    found = nodes()
    for each in found:
        each.node.metadata |= dict.fromkeys(ADDED, 0.25)
    marked = everything.postprocess_nodes(found, query_str=QUERY)
    plain = everything.postprocess_nodes(nodes(), query_str=QUERY)
    assert scores(marked) == pytest.approx(scores(plain), abs=1e-5)


# ---------------------------------------------------------------- events and callbacks


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(("top_k", "told"), [(2, 2), (None, 4), (99, 99)])
async def test_start_and_end_are_told(top_k, told, door, events, callbacks, reranker):
    postprocessor = BGENodePostprocessor(reranker=reranker, top_k=top_k)
    found = nodes()
    response = await ask(engine_over(found, postprocessor, callbacks=callbacks), door)

    assert events.names == ["ReRankStartEvent", "ReRankEndEvent"]
    start, end = events.seen
    assert start.query.query_str == QUERY
    assert (type(start.top_n), start.top_n) == (int, told)
    assert start.model_name == "tiny"
    assert ids(start.nodes) == ["n0", "n1", "n2", "n3"]
    assert end.nodes == response.source_nodes
    assert start.span_id == end.span_id is not None

    assert callbacks.paired
    [(_, payload)] = callbacks.starts
    assert payload[EventPayload.NODES] == found
    assert payload[EventPayload.MODEL_NAME] == "tiny"
    assert payload[EventPayload.QUERY_STR] == QUERY
    assert payload[EventPayload.TOP_K] == told
    [(_, payload)] = callbacks.ends
    assert payload[EventPayload.NODES] == response.source_nodes


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("top_k", [3, None])
async def test_no_nodes_are_told_too_and_need_no_model(top_k, door, events, callbacks):
    # A model that is not there: nothing may ask for it.
    postprocessor = BGENodePostprocessor(model="./no-such-model", top_k=top_k)
    response = await ask(engine_over([], postprocessor, callbacks=callbacks), door)
    assert response.source_nodes == []
    assert events.names == ["ReRankStartEvent", "ReRankEndEvent"]
    assert events.seen[0].top_n == (top_k or 0)
    assert callbacks.paired
    assert callbacks.ends[0][1][EventPayload.NODES] == []
    assert await rerank(postprocessor, [], door) == []


def check_failure_is_told(kind, events, callbacks):
    assert events.names == ["ReRankStartEvent", "ExceptionEvent"]
    assert isinstance(events.seen[1].exception, kind)
    assert len(callbacks.starts) == 1
    assert callbacks.paired


@pytest.mark.parametrize("door", DOORS)
async def test_failure_is_told_once_and_raised(door, events, callbacks):
    engine = engine_over(nodes(), BGENodePostprocessor(reranker=Broken()), callbacks=callbacks)
    with pytest.raises(ScoringError, match="the model failed") as failure:
        await ask(engine, door)
    check_failure_is_told(ScoringError, events, callbacks)
    assert events.seen[0].model_name == "Broken"
    assert events.seen[1].exception is failure.value
    assert callbacks.ends[0][1] == {EventPayload.EXCEPTION: failure.value}


@pytest.mark.parametrize("door", DOORS)
async def test_metadata_that_cannot_be_copied_is_named_and_told(door, events, everything):
    found = nodes()
    found[2].node.metadata["connection"] = threading.Lock()
    with pytest.raises(InputTypeError, match=r"nodes\[2\] .*'connection'.*lock"):
        await rerank(everything, found, door)
    assert events.names == ["ReRankStartEvent", "ExceptionEvent"]


@pytest.mark.parametrize("door", DOORS)
async def test_model_that_cannot_be_loaded_is_told(door, events, callbacks):
    postprocessor = BGENodePostprocessor(model="./no-such-model")
    with pytest.raises(CheckpointNotFoundError, match="no-such-model"):
        await ask(engine_over(nodes(), postprocessor, callbacks=callbacks), door)
    check_failure_is_told(CheckpointNotFoundError, events, callbacks)


async def test_cancelled_call_ends_too(events, callbacks):
    stuck = Stuck()
    engine = engine_over(nodes(), BGENodePostprocessor(reranker=stuck), callbacks=callbacks)
    asking = asyncio.create_task(engine.aquery(QUERY))
    await asyncio.wait_for(stuck.asked.wait(), 60)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    check_failure_is_told(asyncio.CancelledError, events, callbacks)


async def test_events_of_many_at_once_are_paired(events, postprocessor):
    engine = engine_over(nodes(), postprocessor)
    responses = await asyncio.gather(*(engine.aquery(QUERY) for _ in range(8)))
    assert [ids(each.source_nodes)[0] for each in responses] == ["n1"] * 8
    starts = [each.span_id for each in events.seen if isinstance(each, ReRankStartEvent)]
    ends = [each.span_id for each in events.seen if isinstance(each, ReRankEndEvent)]
    assert len(set(starts)) == 8
    assert sorted(starts) == sorted(ends)


@pytest.mark.parametrize(
    ("door", "method"), [("query", "_postprocess_nodes"), ("aquery", "_apostprocess_nodes")]
)
async def test_one_span_for_each_reranking(door, method, spans, postprocessor):
    await ask(engine_over(nodes(), postprocessor), door)
    ours = [
        span.id_ for span in spans.completed_spans if span.id_.startswith("BGENodePostprocessor")
    ]
    assert [name.split("-")[0] for name in ours] == [f"BGENodePostprocessor.{method}"]


def test_callback_manager_can_be_given(callbacks, reranker):
    manager = CallbackManager([callbacks])
    postprocessor = BGENodePostprocessor(reranker=reranker, callback_manager=manager)
    postprocessor.postprocess_nodes(nodes(), query_str=QUERY)
    assert len(callbacks.starts) == 1
    assert callbacks.paired
    assert postprocessor.model_copy(update={"top_k": 1}).callback_manager is manager
    assert "callback_manager" not in postprocessor.to_dict()
    json.dumps(postprocessor.to_dict())


# ---------------------------------------------------------------- the event loop


async def test_async_asks_the_async_method(reranker):
    stuck = Stuck()
    postprocessor = BGENodePostprocessor(reranker=stuck)
    asking = asyncio.create_task(postprocessor.apostprocess_nodes(nodes(), query_str=QUERY))
    await asyncio.wait_for(stuck.asked.wait(), 60)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking


async def test_loading_leaves_the_event_loop_free(monkeypatch, reranker):
    loading, released = threading.Event(), threading.Event()
    in_time = []

    def slow_load(settings):
        loading.set()
        in_time.append(released.wait(60))
        return reranker

    monkeypatch.setattr(sharing, "shared_reranker", slow_load)
    postprocessor = BGENodePostprocessor(model="tiny", top_k=1)
    asking = asyncio.create_task(postprocessor.apostprocess_nodes(nodes(), query_str=QUERY))
    assert await asyncio.to_thread(loading.wait, 60)
    released.set()
    assert ids(await asking) == ["n1"]
    assert in_time == [True]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("door", DOORS)
async def test_query_is_needed_and_must_be_text(door, postprocessor, events):
    async def with_bundle(bundle):
        if door == "query":
            return postprocessor.postprocess_nodes(nodes(), bundle)
        return await postprocessor.apostprocess_nodes(nodes(), bundle)

    with pytest.raises(ValueError, match="query") as missing:
        await with_bundle(None)
    assert isinstance(missing.value, SettingsError)
    with pytest.raises(InputTypeError, match="query"):
        await with_bundle(QueryBundle(7))
    with pytest.raises(InputTypeError, match=r"QueryBundle, got str; .*query_str="):
        await with_bundle(QUERY)
    assert events.names == []


@pytest.mark.parametrize("door", DOORS)
async def test_bare_node_is_named(door, postprocessor, events):
    with pytest.raises(InputTypeError, match=r"nodes\[1\] .*TextNode.*NodeWithScore\(node="):
        await rerank(postprocessor, [nodes()[0], nodes()[1].node], door)
    assert events.names == []


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("wrong", [None, 7, "text", nodes()[0], nodes()[0].node])
async def test_nodes_that_are_no_list_are_refused(wrong, door, postprocessor, events):
    kind = type(wrong).__name__
    with pytest.raises(InputTypeError, match=f"list of NodeWithScore, got {kind}; .*in a list"):
        await rerank(postprocessor, wrong, door)
    assert events.names == []


@pytest.mark.parametrize("text", ["", "  \n", "\x00", "\ud800 lone", "a" * 100_000])
def test_odd_texts_come_back_as_they_were(text, everything):
    found = everything.postprocess_nodes(nodes([text, DOCUMENTS[1]]), query_str=QUERY)
    assert ids(found) == ["n1", "n0"]
    assert found[1].node.text == text


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"top_k": 0}, "top_k"),
        ({"top_n": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": 2, "top_n": 3}, "give one of top_k, top_n"),
        ({"max_length": True}, "max_length must be a whole number"),
        ({"reranker": Broken}, "got the class Broken"),
        ({"score_threshold": 1.01}, "score_threshold"),
        ({"device": "toaster"}, "toaster"),
        ({"dtype": "float7"}, "float7"),
        ({"max_length": 0}, "max_length"),
        ({"metadata_mode": "some"}, "metadata_mode"),
        ({"tpo_k": 3}, "tpo_k"),
        ({"class_name": "CohereRerank"}, "class_name"),
        ({"reranker": object()}, "reranker"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, word):
    with pytest.raises(ValueError, match=word):
        BGENodePostprocessor(**{"model": "tiny", **settings})


@pytest.mark.parametrize(
    "settings", [{"device": "cpu"}, {"model": "tiny"}, {"token": "hub-secret"}]
)
def test_ready_engine_goes_without_engine_settings(settings, reranker):
    assert isinstance(reranker, Scorer)
    with pytest.raises(ValueError, match=next(iter(settings))):
        BGENodePostprocessor(reranker=reranker, **settings)


@pytest.mark.parametrize("name", ["top_k", "top_n"])
def test_top_n_is_top_k_and_assignment_is_checked(name, reranker):
    postprocessor = BGENodePostprocessor(reranker=reranker, **{name: 2})
    assert (postprocessor.top_k, postprocessor.top_n) == (2, 2)
    setattr(postprocessor, name, 1)
    assert (postprocessor.top_k, postprocessor.top_n) == (1, 1)
    assert ids(postprocessor.postprocess_nodes(nodes(), query_str=QUERY)) == ["n1"]
    for bad in (0, -1, "many", True):
        with pytest.raises(ValueError, match="top_k"):
            setattr(postprocessor, name, bad)
    assert postprocessor.top_k == 1


def test_other_assignments_are_checked_too(reranker):
    postprocessor = BGENodePostprocessor(reranker=reranker)
    postprocessor.metadata_mode = "llm"
    assert postprocessor.metadata_mode is MetadataMode.LLM
    with pytest.raises(ValueError, match="score_threshold"):
        postprocessor.score_threshold = 2
    with pytest.raises(ValueError, match="device"):
        postprocessor.device = "cuda"
    with pytest.raises(ValueError, match="colour"):
        postprocessor.colour = "blue"


DUMPS = {
    "to_dict": lambda each: BGENodePostprocessor.from_dict(each.to_dict()),
    "to_json": lambda each: BGENodePostprocessor.from_json(each.to_json()),
    "model_dump": lambda each: BGENodePostprocessor(**each.model_dump()),
    "model_dump_json": lambda each: BGENodePostprocessor.model_validate_json(
        each.model_dump_json()
    ),
    "pickle": lambda each: pickle.loads(pickle.dumps(each)),  # noqa: S301 - made just here
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "model_copy": lambda each: each.model_copy(),
}


@pytest.mark.parametrize("how", DUMPS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": None, "score_threshold": 0.25, "metadata_mode": MetadataMode.NONE},
        {"device": ["cpu", "cpu"], "dtype": "float32", "max_length": 128, "query_max_length": 32},
    ],
)
def test_what_is_carried_builds_an_equal_postprocessor(settings, how):
    postprocessor = BGENodePostprocessor(model="tiny", **settings)
    again = DUMPS[how](postprocessor)
    assert again is not postprocessor
    assert again == postprocessor
    assert again.metadata_mode is postprocessor.metadata_mode
    for name, value in settings.items():
        assert getattr(again, name) == value
    assert again != BGENodePostprocessor(model="tiny", top_k=7)


def test_dumps_are_plain_and_named():
    dumped = BGENodePostprocessor(model="tiny", metadata_mode=MetadataMode.LLM).to_dict()
    assert dumped["class_name"] == "BGENodePostprocessor"
    assert type(dumped["metadata_mode"]) is str
    assert dumped["metadata_mode"] == "llm"
    assert not dumped.keys() & {"reranker", "token", "callback_manager"}
    assert json.loads(json.dumps(dumped)) == dumped


@pytest.mark.parametrize("how", ["to_dict", "pickle", "deepcopy"])
def test_settings_of_a_ready_engine_are_carried_and_not_its_weights(how, postprocessor):
    expected = postprocessor.postprocess_nodes(nodes(), query_str=QUERY)
    assert len(pickle.dumps(postprocessor)) < 10_000
    again = DUMPS[how](postprocessor)
    assert (again.model, again.device, again.dtype, again.top_k) == ("tiny", "cpu", "float32", 2)
    found = again.postprocess_nodes(nodes(), query_str=QUERY)
    assert ids(found) == ids(expected)
    assert scores(found) == pytest.approx(scores(expected), abs=1e-5)


def test_equal_settings_share_one_engine():
    settings = {"model": "tiny", "device": "cpu", "dtype": "float32", "max_length": 96}
    one = BGENodePostprocessor(**settings, top_k=1)
    other = BGENodePostprocessor(**settings, score_threshold=0.5, metadata_mode="none")
    assert one.scorer is other.scorer
    assert one.model_copy(update={"top_n": 2}).scorer is one.scorer
    assert one.model_copy(update={"max_length": 64}).scorer is not one.scorer


def test_token_is_told_to_nobody():
    secret = "hub-secret"  # noqa: S105 - a made-up one
    postprocessor = BGENodePostprocessor(model="tiny", token=secret)
    told = [repr(postprocessor), str(postprocessor), postprocessor.to_json()]
    told += [str(postprocessor.to_dict()), postprocessor.model_dump_json()]
    assert not [each for each in told if secret in each]
    assert secret.encode() not in pickle.dumps(postprocessor)
    with pytest.raises(ValueError, match="top_k") as refused:
        BGENodePostprocessor(model="tiny", token=secret, top_k=0)
    assert secret not in str(refused.value)


# ---------------------------------------------------------------- what an import brings


def test_import_brings_no_torch():
    code = (
        "import sys, bge_rerank_adapters.llama_index as module\n"
        "module.BGENodePostprocessor(model='tiny', top_k=1).postprocess_nodes([], query_str='a')\n"
        "print([name for name in ('torch', 'transformers', 'langchain_core')"
        " if name in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


def test_missing_llama_index_names_the_extra():
    code = (
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'llama_index.core' or name == 'llama_index':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
        "try:\n"
        "    import bge_rerank_adapters.llama_index\n"
        "except ImportError as error:\n"
        "    print(error, '|', type(error.__cause__).__name__)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'pip install "bge-rerank-adapters[llama-index]"' in run.stdout, run.stderr
    assert run.stdout.strip().endswith("| ModuleNotFoundError")
