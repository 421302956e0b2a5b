"""Long documents as windows: where they are cut, which one speaks for the document."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.core.vector_stores.utils import node_to_metadata_dict
from tokenizers import Regex, pre_tokenizers

from bge_rerank_adapters import Reranker
from bge_rerank_adapters.engine.checkpoints.hub import TINY_FOLDER
from bge_rerank_adapters.engine.text import tokenizer as tokenizer_module
from bge_rerank_adapters.engine.text.cutting import cut_windows
from bge_rerank_adapters.engine.text.tokenizer_files import load_tokenizer
from bge_rerank_adapters.engine.text.windows import WindowTokenizer
from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.langchain import BGEDocumentCompressor
from bge_rerank_adapters.llama_index import BGENodePostprocessor
from bge_rerank_adapters.milvus import BGERerankFunction
from bge_rerank_adapters.settings import EngineSettings
from tests.checkpoints import build_roberta, build_xlm_roberta, read_sentences
from tests.test_tokenization import CountingTokenizer, words, words_tokenizer

QUERY = "What year did Tesla die?"
ANSWER = "Nikola Tesla died in New York on 7 January 1943."
YEAR = "died in New York on 7 January 1943."
FILLER = [text for text in read_sentences().values() if "Tesla" not in text][:60]


def long_document(place: int) -> str:
    return " ".join([*FILLER[:place], ANSWER, *FILLER[place:]])


class CountingOffsets(CountingTokenizer):
    def encode_batch(self, texts, **kwargs):
        self.read += texts
        return self._tokenizer.encode_batch(texts, **kwargs)


@pytest.fixture(scope="module")
def windowed():
    with Reranker(
        "tiny", device="cpu", dtype="float32", long_documents="window", window_tokens=64
    ) as engine:
        yield engine


@settings(max_examples=300, deadline=None)
@given(data=st.data(), tokens=st.integers(0, 120), size=st.integers(1, 30))
def test_windows_cover_every_token_advance_and_overlap(data, tokens, size):
    overlap = data.draw(st.integers(0, size - 1))
    starts = data.draw(st.sets(st.integers(1, max(tokens - 1, 1))))
    windows = cut_windows(tokens, size=size, overlap=overlap, starts_word=starts.__contains__)
    assert windows[0][0] == 0
    assert windows[-1][1] == tokens
    assert all(end - start <= size for start, end in windows)
    for (start, end), (following, last) in pairwise(windows):
        assert start < following <= end - overlap
        assert last > end


@settings(max_examples=200, deadline=None)
@given(tokens=st.integers(31, 200), size=st.integers(12, 30), word=st.integers(1, 3))
def test_windows_begin_and_end_between_words_and_the_last_is_no_short_rest(tokens, size, word):
    def starts(place):
        return place % word == 0

    windows = cut_windows(tokens, size=size, overlap=size // 4, starts_word=starts)
    edges = {start for start, _ in windows[1:]} | {end for _, end in windows[:-1]}
    assert all(map(starts, edges))
    assert all(end - start > size - 2 * word for start, end in windows)


@pytest.mark.parametrize(("size", "overlap"), [(0, 0), (-3, 0), (4, 4), (4, -1)])
def test_windows_that_could_not_advance_are_refused(size, overlap):
    with pytest.raises(SettingsError, match=f"got {size} and {overlap}"):
        cut_windows(9, size=size, overlap=overlap, starts_word=lambda _: True)


def test_rows_are_slices_of_the_documents_tokens_behind_the_query():
    tokenizer = WindowTokenizer(
        words_tokenizer(), max_length=20, window_tokens=8, window_overlap_tokens=2
    )
    tokenized = tokenizer.tokenize([("w5 w6", words(200, 20)), ("w5", "w9"), ("w5 w6", "")])
    rows = [row.ids.tolist() for row in tokenized.distinct]
    frame = [0, 5, 6, 2, 2]
    assert rows[:3] == [[*frame, *range(a, a + 8), 2] for a in (200, 206, 212)]
    assert rows[3:] == [[0, 5, 2, 2, 9, 2], [*frame, 2]]
    assert [row.span for row in tokenized.distinct[3:]] == [(0, 2), (0, 0)]
    assert tokenized.windows == [range(3), range(3, 4), range(4, 5)]
    assert not any(row.truncated for row in tokenized.distinct)


def test_without_a_size_windows_take_the_room_beside_each_query():
    tokenizer = WindowTokenizer(words_tokenizer(), max_length=20, query_max_length=10)
    text = words(200, 60)
    tokenized = tokenizer.tokenize([(words(10, 3), text), (words(10, 50), text)])
    assert {len(row) for row in tokenized.distinct} == {20}
    short, long = tokenized.windows
    assert len(short) < len(long)


def test_every_document_is_read_once_and_repeats_are_scored_once():
    counting = CountingOffsets(words_tokenizer())
    tokenizer = WindowTokenizer(counting, max_length=20)
    text = words(200, 100)
    pairs = [("w5", text), ("w6", text), ("w5", text)]
    tokenized = tokenizer.tokenize(pairs)
    assert sorted(counting.read) == sorted(["w5", "w6", text])
    assert tokenized.positions == [0, 1, 0]
    assert {row.index for row in tokenized.distinct} == {0, 1}


@pytest.mark.parametrize("build", [build_xlm_roberta, build_roberta, None])
def test_spans_are_whole_words_of_the_text_as_given(build, tmp_path):
    folder = TINY_FOLDER if build is None else build(tmp_path)

    def make(tokenizer, **lengths):
        return WindowTokenizer(tokenizer, window_tokens=40, **lengths)

    tokenizer = load_tokenizer(folder, max_length=128, make=make)
    text = (
        "  " + long_document(30).replace("the", "thé\u0301").replace(" and ", "\n\t and ") + " \n"
    )
    spans = [row.span for row in tokenizer.tokenize([(QUERY, text)]).distinct]
    assert len(spans) > 20
    assert (spans[0][0], spans[-1][1]) == (2, len(text) - 2)
    for start, end in spans:
        assert text[start:end] == text[start:end].strip()
        assert text[start - 1].isspace()
        assert text[end].isspace()
    for (_, end), (start, _) in pairwise(spans):
        assert start < end


def test_scripts_without_spaces_are_cut_between_characters():
    characters = words_tokenizer()
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = WindowTokenizer(
        characters, max_length=64, window_tokens=20, window_overlap_tokens=4
    )
    text = "歌德写了浮士德。กิน" * 20
    spans = [row.span for row in tokenizer.tokenize([("谁写了浮士德", text)]).distinct]
    assert 10 < len(spans) < 30
    assert {place for start, end in spans for place in range(start, end)} == set(range(len(text)))
    assert not any(text[end : end + 1] == "\u0e34" for _, end in spans), "a vowel sign stays put"


def test_lone_surrogates_do_not_shift_spans():
    tokenizer = WindowTokenizer(words_tokenizer(), max_length=20, window_tokens=4)
    text = "\ud83d\ude00 \ud800 " + words(200, 12)
    last = tokenizer.tokenize([("w5", text)]).distinct[-1].span
    assert text[slice(*last)] == words(208, 4)


@pytest.mark.parametrize("place", [0, 20, 45, 60])
def test_an_answer_anywhere_is_found_and_its_span_shows_it(windowed, place):
    documents = [" ".join(FILLER), long_document(place)]
    best, other = windowed.rerank(QUERY, documents)
    assert (best.index, other.index) == (1, 0)
    start, end = best.span
    assert YEAR in best.text[start:end]
    assert not best.truncated
    assert best.logit > other.logit


def test_truncation_misses_what_windows_find(windowed, reranker):
    document = long_document(45)
    (cut,) = reranker.rerank(QUERY, [document])
    (found,) = windowed.rerank(QUERY, [document])
    assert (cut.truncated, cut.span) == (True, None)
    assert found.logit > cut.logit + 1


def test_a_documents_logit_is_that_of_its_best_window_alone(windowed, reranker):
    document = long_document(45)
    (found,) = windowed.rerank(QUERY, [document])
    (alone,) = reranker.rerank(QUERY, [document[slice(*found.span)]])
    assert found.logit == pytest.approx(alone.logit, abs=1e-4)


def test_short_documents_score_as_without_windows(windowed, reranker):
    short = [text for text in FILLER if len(text) < 150]
    plain = reranker.rerank(QUERY, short)
    for result, wanted in zip(windowed.rerank(QUERY, short), plain, strict=True):
        assert (result.index, result.span) == (wanted.index, (0, len(wanted.text)))
        assert result.logit == pytest.approx(wanted.logit, abs=1e-5)


async def test_all_methods_agree(windowed):
    documents = [long_document(45), *FILLER[:3], long_document(45), ""]
    ranked = windowed.rerank(QUERY, documents)
    assert [each.index for each in ranked][:2] == [0, 4], "repeats tie exactly"
    assert ranked[0].logit == ranked[1].logit
    (many,) = windowed.rerank_many([(QUERY, documents)])
    awaited = await windowed.arerank(QUERY, documents)
    for other in (many, awaited):
        assert [(each.index, each.span) for each in other] == [
            (each.index, each.span) for each in ranked
        ]
    scores = windowed.score(QUERY, documents)
    assert scores[0] == pytest.approx(ranked[0].score, abs=1e-5)


def test_windows_of_many_documents_share_packs():
    with Reranker(
        "tiny", device="cpu", long_documents="window", window_tokens=64, pack_tokens=2048
    ) as engine:
        engine.rerank(QUERY, [long_document(place) for place in range(0, 60, 6)])
        counted = engine.stats()
    assert counted.pairs > 200
    assert counted.packs < counted.pairs / 10
    assert counted.pack_fill > 0.85
    assert counted.truncated_pairs == 0


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"long_documents": "split"}, "long_documents must be one of truncate, window"),
        ({"window_tokens": 64}, "window_tokens had no effect with long_documents='truncate'"),
        ({"long_documents": "window", "window_tokens": 0}, "window_tokens must be a whole number"),
        (
            {"long_documents": "window", "window_overlap_tokens": -1},
            "window_overlap_tokens must be a whole number of at least 0",
        ),
        (
            {"long_documents": "window", "window_tokens": 64, "window_overlap_tokens": 64},
            r"window_overlap_tokens \(64\) must be below window_tokens \(64\)",
        ),
        (
            {"long_documents": "window", "window_overlap_tokens": 600},
            r"window_overlap_tokens \(600\) must be below max_length \(512\)",
        ),
    ],
)
def test_bad_settings_are_refused_by_name(given_settings, message):
    with pytest.raises(SettingsError, match=message):
        EngineSettings(model="tiny", **given_settings)
    with pytest.raises(ValueError, match=message):
        BGEDocumentCompressor(model="tiny", **given_settings)
    with pytest.raises(SettingsError, match=message):
        BGERerankFunction("tiny", **given_settings)


def span(metadata: dict[str, Any]) -> tuple[int, int]:
    return metadata["relevance_span_start"], metadata["relevance_span_end"]


def test_langchain_documents_carry_the_span_of_their_own_text(windowed):
    compressor = BGEDocumentCompressor(reranker=windowed, metadata_fields=["title"])
    assert compressor.long_documents == "window"
    old = {"title": "A very long title " * 5, "relevance_span_start": 7}
    documents = [Document(long_document(45), metadata=old), Document(ANSWER)]
    found = {each.page_content: each for each in compressor.compress_documents(documents, QUERY)}
    start, end = span(found[long_document(45)].metadata)
    assert YEAR in long_document(45)[start:end]
    assert span(found[ANSWER].metadata) == (0, len(ANSWER))
    assert not any("relevance_span" in each.metadata for each in found.values())
    json.dumps([each.metadata for each in found.values()])
    assert documents[0].metadata == old


def test_without_windows_there_is_no_span_in_metadata(reranker):
    old = {"relevance_span_start": 1, "relevance_span_end": 2}
    document = Document(ANSWER, metadata=old)
    (kept,) = BGEDocumentCompressor(reranker=reranker).compress_documents([document], QUERY)
    assert not old.keys() & kept.metadata.keys()
    node = NodeWithScore(node=TextNode(text=ANSWER, metadata=old))
    (best,) = BGENodePostprocessor(reranker=reranker).postprocess_nodes([node], query_str=QUERY)
    assert not old.keys() & best.node.metadata.keys()


def test_llama_index_nodes_carry_the_span_of_their_own_text(windowed):
    postprocessor = BGENodePostprocessor(reranker=windowed)
    node = TextNode(text=long_document(45), metadata={"title": "A very long title " * 5})
    (best,) = postprocessor.postprocess_nodes([NodeWithScore(node=node)], query_str=QUERY)
    start, end = span(best.node.metadata)
    assert YEAR in best.node.text[start:end]
    names = {"relevance_span_start", "relevance_span_end"}
    assert names <= set(best.node.excluded_llm_metadata_keys)
    flat = node_to_metadata_dict(best.node, flat_metadata=True)
    assert (flat["relevance_span_start"], flat["relevance_span_end"]) == (start, end)
    again = postprocessor.postprocess_nodes([best], query_str=QUERY)
    assert again[0].score == best.score


def test_the_milvus_function_takes_windows():
    function = BGERerankFunction(
        "tiny", use_fp16=False, device="cpu", long_documents="window", window_tokens=64
    )
    assert function.reranker.settings.long_documents == "window"
    (best, _) = function(QUERY, [" ".join(FILLER), long_document(45)])
    assert best.index == 1


def test_the_places_of_tokens_are_read_once_from_a_document(monkeypatch):
    """Each reading makes a list of those of all tokens."""
    reads: list[int] = []

    class Counted:
        def __init__(self, encoding):
            self.ids, self._encoding = encoding.ids, encoding

        @property
        def offsets(self):
            reads.append(len(self.ids))
            return self._encoding.offsets

    encode = tokenizer_module.encode_texts
    monkeypatch.setattr(
        tokenizer_module,
        "encode_texts",
        lambda *args, **options: list(map(Counted, encode(*args, **options))),
    )
    with Reranker(
        "tiny",
        device="cpu",
        dtype="float32",
        long_documents="window",
        window_tokens=64,
        passage_instruction="Read this passage with care, please, before you answer: ",
    ) as engine:
        engine.score(QUERY, [long_document(0), long_document(30)])
    assert len(reads) == 2
