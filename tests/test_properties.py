"""What holds for any query and documents, by way of the engine and of each adapter."""

import asyncio
import copy
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode

from bge_rerank_adapters import Reranker
from bge_rerank_adapters.langchain import BGEDocumentCompressor
from bge_rerank_adapters.llama_index import BGENodePostprocessor
from tests.checkpoints import build_xlm_roberta, read_sentences

COMPANY = 1e-5
MAX_LENGTH = 40
SENTENCES = list(read_sentences().values())[:20]

# Whatever Python calls a string, half surrogate pairs and control characters included.
anything = st.text(st.characters(exclude_categories=()), max_size=40)
texts = st.one_of(st.sampled_from(["", " ", "\0", "a", "tea", "long " * 60, *SENTENCES]), anything)
# Of what hosts take: their own models refuse half surrogate pairs.
host_texts = st.one_of(st.sampled_from(["", " ", "a", *SENTENCES]), st.text(max_size=40))
documents = st.lists(texts, max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2)
    ),
    max_leaves=4,
)
metadatas = st.dictionaries(st.text(max_size=8), values, max_size=3)
top_ks = st.none() | st.integers(1, 10)
thresholds = st.none() | st.floats(0, 1)

few = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_xlm_roberta(tmp_path_factory.mktemp("properties") / "checkpoint"))


@pytest.fixture(scope="module")
def engine(folder: str) -> Iterator[Reranker]:
    with Reranker(folder, device="cpu", dtype="float32", max_length=MAX_LENGTH) as made:
        yield made


@pytest.fixture(scope="module")
def wide(folder: str) -> Iterator[Reranker]:
    with Reranker(folder, device="cpu", dtype="float32", max_length=512) as made:
        yield made


@few
@given(query=texts, given_documents=documents, seed=st.randoms(use_true_random=False))
def test_the_order_in_which_documents_come_moves_no_logit(engine, query, given_documents, seed):
    places = list(range(len(given_documents)))
    seed.shuffle(places)
    logits = engine.logits(query, given_documents)
    shuffled = engine.logits(query, [given_documents[place] for place in places])
    assert shuffled == pytest.approx([logits[place] for place in places], abs=COMPANY)


@few
@given(query=texts, given_documents=documents, cut=st.integers(0, 8), others=documents)
def test_neither_company_nor_calls_in_parts_move_a_logit(
    engine, query, given_documents, cut, others
):
    whole = engine.logits(query, given_documents)
    parts = [
        *engine.logits(query, given_documents[:cut]),
        *engine.logits(query, given_documents[cut:]),
    ]
    beside = engine.logits(query, [*given_documents, *others])[: len(given_documents)]
    assert parts == pytest.approx(whole, abs=COMPANY)
    assert beside == pytest.approx(whole, abs=COMPANY)


@few
@given(
    query=texts,
    given_documents=documents,
    copies=st.lists(st.integers(0, 7), max_size=5),
    top_k=top_ks,
    score_threshold=thresholds,
)
def test_every_method_gives_the_head_of_one_ranking_in_which_duplicates_tie(
    engine, query, given_documents, copies, top_k, score_threshold
):
    asked = [*given_documents, *(given_documents[i] for i in copies if i < len(given_documents))]
    everything = engine.rerank(query, asked)
    assert [r.index for r in everything] == sorted(
        range(len(asked)), key=lambda i: (-{r.index: r.logit for r in everything}[i], i)
    )
    for text in set(asked):
        assert len({r.logit for r in everything if r.text == text}) <= 1
    kept = [r for r in everything if score_threshold is None or r.score >= score_threshold]
    limits = {"top_k": top_k, "score_threshold": score_threshold}
    assert engine.rerank(query, asked, **limits) == kept[:top_k]
    assert engine.rerank_many([(query, asked)], **limits) == [kept[:top_k]]
    assert asyncio.run(engine.arerank(query, asked, **limits)) == kept[:top_k]
    assert engine.score(query, asked) == [
        r.score for r in sorted(everything, key=lambda result: result.index)
    ]


@few
@given(
    # Far from the query's own limit, so that only documents can be cut.
    query=st.text(st.characters(max_codepoint=127), max_size=MAX_LENGTH // 4),
    given_documents=st.lists(texts, min_size=1, max_size=5),
)
def test_a_document_is_cut_exactly_where_the_pair_would_be_too_long(
    engine, wide, query, given_documents
):
    told = {result.index: result.truncated for result in engine.rerank(query, given_documents)}
    for index, text in enumerate(given_documents):
        (cut,) = engine._calls._tokenizer.tokenize([(query, text)]).distinct
        (full,) = wide._calls._tokenizer.tokenize([(query, text)]).distinct
        assert told[index] == (len(full) > MAX_LENGTH)
        assert len(cut) == min(len(full), MAX_LENGTH)
        # All but the special token at the end is a beginning of the whole.
        assert cut.ids[:-1].tolist() == full.ids[: len(cut) - 1].tolist()
        assert cut.ids[-1] == full.ids[-1]


@few
@given(
    query=host_texts,
    rows=st.lists(st.tuples(host_texts, metadatas), max_size=6),
    top_k=top_ks,
    score_threshold=thresholds,
)
def test_langchain_documents_are_left_alone_and_ranked_as_by_the_engine(
    engine, query, rows, top_k, score_threshold
):
    found = [
        Document(page_content=text, metadata=metadata, id=str(place))
        for place, (text, metadata) in enumerate(rows)
    ]
    before = copy.deepcopy(found)
    compressor = BGEDocumentCompressor(
        reranker=engine, top_k=top_k, score_threshold=score_threshold
    )
    kept = compressor.compress_documents(found, query)
    expected = engine.rerank(
        query, [text for text, _ in rows], top_k=top_k, score_threshold=score_threshold
    )
    assert found == before
    assert [document.id for document in kept] == [str(result.index) for result in expected]
    for document, result in zip(kept, expected, strict=True):
        assert document.page_content == result.text
        assert document.metadata["relevance_score"] == pytest.approx(result.score, abs=COMPANY)
        added = {"relevance_score", "retrieval_index"}
        added |= {"relevance_truncated", "relevance_query_truncated"}
        own = {k: v for k, v in document.metadata.items() if k not in added}
        assert own == {k: v for k, v in rows[result.index][1].items() if k not in added}
    assert asyncio.run(compressor.acompress_documents(found, query)) == kept


@few
@given(query=host_texts, rows=st.lists(st.tuples(host_texts, thresholds), max_size=6), top_k=top_ks)
def test_llama_index_nodes_are_left_alone_and_ranked_as_by_the_engine(engine, query, rows, top_k):
    nodes = [
        NodeWithScore(node=TextNode(text=text, id_=str(place)), score=score)
        for place, (text, score) in enumerate(rows)
    ]
    before = copy.deepcopy(nodes)
    postprocessor = BGENodePostprocessor(reranker=engine, top_k=top_k)
    kept = postprocessor.postprocess_nodes(nodes, query_str=query)
    expected = engine.rerank(query, [text for text, _ in rows], top_k=top_k)
    assert nodes == before
    assert [each.node.node_id for each in kept] == [str(result.index) for result in expected]
    assert [each.score for each in kept] == pytest.approx(
        [result.score for result in expected], abs=COMPANY
    )
    for each, result in zip(kept, expected, strict=True):
        assert each.node.metadata.get("retrieval_score") == rows[result.index][1]
