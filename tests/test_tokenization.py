"""Texts to token ids: what is read, what is cut, and what is refused."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from bge_rerank_adapters import Reranker
from bge_rerank_adapters.engine.checkpoints.hub import TINY_FOLDER
from bge_rerank_adapters.engine.text.tokenizer import PairTokenizer, read_template
from bge_rerank_adapters.engine.text.tokenizer_files import load_tokenizer
from bge_rerank_adapters.engine.text.windows import WindowTokenizer
from bge_rerank_adapters.errors import CheckpointError, SettingsError
from tests.checkpoints import build_bert, build_xlm_roberta, read_queries, read_sentences

# A word is a token: "w7" has id 7, anything else id 4. Two tokens frame a pair, two part it.
SPECIALS = {"<s>": 0, "<pad>": 1, "</s>": 2, "<mask>": 3, "<unk>": 4}
XLM_R = "<s> $A </s> </s> $B </s>"


def words_tokenizer(pair: str | None = XLM_R) -> Tokenizer:
    words = {f"w{i}": i for i in range(5, 1000)}
    tokenizer = Tokenizer(models.WordLevel(SPECIALS | words, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if pair:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair=pair, special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    return tokenizer


def words(start: int, count: int) -> str:
    return " ".join(f"w{i}" for i in range(start, start + count))


class CountingTokenizer:
    """Hands everything on and remembers which texts were read."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self.read = tokenizer, []

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def encode_batch_fast(self, texts, **kwargs):
        self.read += texts
        # Releases of tokenizers before 0.20 lack the fast one.
        encode = getattr(self._tokenizer, "encode_batch_fast", self._tokenizer.encode_batch)
        return encode(texts, **kwargs)


@pytest.fixture(scope="module")
def tiny() -> PairTokenizer:
    return load_tokenizer(TINY_FOLDER, max_length=40)


def ids(tokenizer: PairTokenizer, query: str, document: str) -> list[int]:
    return tokenizer.tokenize([(query, document)]).distinct[0].ids.tolist()


def test_every_distinct_text_is_read_once_per_call():
    counting = CountingTokenizer(words_tokenizer())
    tokenizer = PairTokenizer(counting, max_length=64)
    documents = [f"w{i}" for i in range(5, 3005)]
    pairs = [(query, document) for query in ("q one", "q two") for document in documents * 2]
    tokenized = tokenizer.tokenize(pairs)
    assert sorted(counting.read) == sorted(["q one", "q two", *documents])
    assert len(tokenized.distinct) == 2 * len(documents)
    assert len(tokenized.positions) == len(pairs)


def test_repeated_pairs_point_at_the_first_of_them():
    tokenized = PairTokenizer(words_tokenizer(), max_length=64).tokenize(
        [("w5", "w6"), ("w5", "w7"), ("w5", "w6"), ("w8", "w6")]
    )
    assert tokenized.positions == [0, 1, 0, 2]
    assert [pair.index for pair in tokenized.distinct] == [0, 1, 3]
    assert PairTokenizer(words_tokenizer(), max_length=64).tokenize([]).distinct == []


def test_query_may_take_three_quarters_by_default():
    assert PairTokenizer(words_tokenizer(), max_length=41).query_max_length == 30
    (pair,) = (
        PairTokenizer(words_tokenizer(), max_length=40)
        .tokenize([(words(10, 100), words(200, 100))])
        .distinct
    )
    assert pair.ids.tolist() == [0, *range(10, 40), 2, 2, *range(200, 206), 2]
    assert pair.document_start == 33
    assert pair.truncated


def test_query_is_cut_to_its_own_limit_then_the_document():
    tokenizer = PairTokenizer(words_tokenizer(), max_length=20, query_max_length=5)
    assert ids(tokenizer, words(10, 9), words(200, 99)) == [
        *(0, 10, 11, 12, 13, 14, 2, 2),
        *range(200, 211),
        2,
    ]
    assert ids(tokenizer, words(10, 2), words(200, 99)) == [0, 10, 11, 2, 2, *range(200, 214), 2]


def test_an_exact_fit_is_not_truncated_and_one_more_is():
    tokenizer = PairTokenizer(words_tokenizer(), max_length=20)
    exact, over, cut_query = tokenizer.tokenize(
        [("w5", words(200, 15)), ("w5", words(200, 16)), (words(10, 50), "w5")]
    ).distinct
    assert (len(exact), exact.truncated) == (20, False)
    assert (len(over), over.truncated) == (20, True)
    assert not cut_query.truncated, "truncated tells of the document, not of the query"
    assert (over.query_truncated, cut_query.query_truncated) == (False, True)


@pytest.mark.parametrize("query_tokens", [5, 6, 500])
def test_a_query_is_cut_at_the_side_that_is_asked_for(query_tokens):
    start = 999 - query_tokens
    given = words(start, query_tokens)
    for side, first in (("right", start), ("left", 994)):
        tokenizer = PairTokenizer(
            words_tokenizer(), max_length=20, query_max_length=5, query_truncation_side=side
        )
        (pair,) = tokenizer.tokenize([(given, words(10, 99))]).distinct
        assert pair.ids.tolist() == [0, *range(first, first + 5), 2, 2, *range(10, 21), 2]
        assert pair.query_truncated is (query_tokens > 5)
        assert pair.document_start == 8


@pytest.mark.parametrize("make", [PairTokenizer, WindowTokenizer])
def test_an_instruction_stays_where_the_beginning_of_a_query_is_cut_off(make):
    template = replace(read_template(words_tokenizer()), query_instruction="w5 w6 ")
    tokenizer = make(
        words_tokenizer(),
        max_length=20,
        query_max_length=5,
        template=template,
        query_truncation_side="left",
    )
    long, short = tokenizer.tokenize([(words(100, 50), "w7"), ("w8", "w7")]).distinct
    assert long.ids.tolist() == [0, 5, 6, 147, 148, 149, 2, 2, 7, 2]
    assert short.ids.tolist() == [0, 5, 6, 8, 2, 2, 7, 2]
    assert (long.query_truncated, short.query_truncated) == (True, False)


@pytest.mark.parametrize("build", [build_xlm_roberta, build_bert])
def test_ids_are_those_of_the_tokenizers_own_template(build, tmp_path):
    folder = build(tmp_path)
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder, max_length=512)
    pairs = list(zip(read_queries().values(), read_sentences().values(), strict=False))[:30]
    for pair, got in zip(pairs, tokenizer.tokenize(pairs).distinct, strict=True):
        wanted = plain.encode(*pair)
        assert got.ids.tolist() == wanted.ids
        assert got.document_start == wanted.sequence_ids.index(1)
    ends = (0, 2) if build is build_xlm_roberta else (2, 3)
    assert (got.ids[0], got.ids[-1]) == ends


def test_lone_surrogates_are_read_as_the_replacement_character(tiny):
    assert ids(tiny, "caf\ud800é", "a\udfffb \x00") == ids(tiny, "caf\ufffdé", "a\ufffdb \x00")
    assert ids(tiny, "\ud83d\ude00", "x") == ids(tiny, "\U0001f600", "x")


def test_a_lone_surrogate_leaves_its_neighbours_alone(tiny):
    tokenized = tiny.tokenize([("q", "fine"), ("q", "\ud800"), ("q", "good")])
    assert tokenized.distinct[0].ids.tolist() == ids(tiny, "q", "fine")
    assert tokenized.distinct[2].ids.tolist() == ids(tiny, "q", "good")


def test_a_tokenizer_without_a_template_for_pairs_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no special tokens around a pair"):
        PairTokenizer(words_tokenizer(pair=None), max_length=64)
    words_tokenizer(pair=None).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: the tokenizer puts no special"):
        load_tokenizer(tmp_path, max_length=64)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "has no tokenizer"), ("{", "not a readable tokenizer"), ("{}", "not a readable")],
)
def test_missing_and_damaged_tokenizers_are_named(tmp_path, content, message):
    if content:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path, max_length=64)


@pytest.mark.parametrize(
    ("max_length", "query_max_length", "room"),
    [(16, 11, 1), (16, 12, 0), (16, 15, -3), (17, None, 1), (12, None, -1), (4, None, -3)],
)
def test_settings_without_room_for_a_document_are_refused(max_length, query_max_length, room):
    def make():
        return PairTokenizer(
            words_tokenizer(), max_length=max_length, query_max_length=query_max_length
        )

    if room > 0:
        assert make().tokenize([(words(5, 90), words(200, 90))]).distinct[0].truncated
        return
    with pytest.raises(SettingsError, match=f"max_length {max_length} leaves no room"):
        make()


@pytest.mark.parametrize("long_documents", ["truncate", "window"])
def test_an_instruction_that_leaves_no_room_for_documents_is_refused(long_documents):
    """Documents would be cut to nothing, and windows of no length would never end."""
    for words_before, kept in ((6, True), (12, False), (60, False)):
        chosen = {
            "device": "cpu",
            "dtype": "float32",
            "max_length": 32,
            "passage_instruction": "the " * words_before,
            "long_documents": long_documents,
        }
        if kept:
            with Reranker("tiny", query_max_length=16, **chosen) as engine:
                query = "the " * 40
                assert len(set(engine.score(query, ["one", "two of them", "three"]))) == 3
            continue
        with pytest.raises(SettingsError, match=r"no room for a document .*passage_instruction"):
            Reranker("tiny", query_max_length=16, **chosen)


def test_an_instruction_that_leaves_no_room_for_queries_is_refused():
    """Queries would be cut to nothing, and all rank alike."""
    chosen = {"device": "cpu", "dtype": "float32", "query_max_length": 8}
    with Reranker("tiny", query_instruction="the " * 7, **chosen) as engine:
        assert engine.score("one", ["one"]) != engine.score("two", ["one"])
    with pytest.raises(SettingsError, match=r"no room for a query after 8 tokens"):
        Reranker("tiny", query_instruction="the " * 8, **chosen)


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.txt"])
def test_a_vocabulary_that_cannot_be_converted_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"\0 nothing of the kind")
    with pytest.raises(CheckpointError, match=rf"\({name}\) cannot be converted"):
        load_tokenizer(tmp_path, max_length=64)


def test_threads_do_not_disturb_each_other(tiny):
    queries, documents = list(read_queries().values()), list(read_sentences().values())
    tasks = [[(query, document) for document in documents[:40]] for query in queries[:40]]
    alone = [tiny.tokenize(task) for task in tasks]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(tiny.tokenize, tasks))
    for one, other in zip(alone, together, strict=True):
        for pair, again in zip(one.distinct, other.distinct, strict=True):
            np.testing.assert_array_equal(pair.ids, again.ids)


any_text = st.text(st.characters(), max_size=300)  # lone surrogates among them


@settings(max_examples=150, deadline=None)
@given(pairs=st.lists(st.tuples(any_text, any_text), max_size=6))
def test_no_pair_is_ever_longer_than_max_length(tiny, pairs):
    tokenized = tiny.tokenize(pairs)
    assert all(len(pair) <= tiny.max_length for pair in tokenized.distinct)
    assert all(pair.document_start <= len(pair) for pair in tokenized.distinct)
    assert all(len(pair) == tiny.max_length for pair in tokenized.distinct if pair.truncated)
    assert [pairs[tokenized.distinct[i].index] for i in tokenized.positions] == pairs
