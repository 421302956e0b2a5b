"""How much one call reads: limits of tokens, here and as they are sent to a server."""

import inspect

import numpy as np
import pytest

from bge_rerank_adapters import Reranker
from bge_rerank_adapters.engine.checkpoints.hub import TINY_FOLDER
from bge_rerank_adapters.engine.models.flag import TextPairTokenizer
from bge_rerank_adapters.engine.text.tokenizer import PairTokenizer, read_template
from bge_rerank_adapters.engine.text.tokenizer_files import load_tokenizer
from bge_rerank_adapters.engine.text.windows import WindowTokenizer
from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.remote.apis import APIS, COMMON
from bge_rerank_adapters.settings.token_limits import TokenLimits
from tests.logs import own_records
from tests.test_tokenization import words, words_tokenizer

QUERY = "Who wrote Faust?"
LATE = "It rains in Weimar. " * 20 + "Goethe wrote Faust."
DOCUMENTS = [LATE, "Goethe wrote Faust.", "Cats sleep a lot."]
METHODS = ("rerank", "arerank", "score", "logits", "score_pairs", "rerank_many", "arerank_many")


@pytest.fixture(scope="module")
def reranker():
    with Reranker("tiny", device="cpu", dtype="float32") as engine:
        yield engine


def read(tokenizer, pairs, **limits):
    return tokenizer.tokenize(pairs, tokenizer.lengths(TokenLimits(**limits))).distinct


def framed(query: range, document: range) -> list[int]:
    return [0, *query, 2, 2, *document, 2]


def test_each_limit_cuts_what_it_names():
    tokenizer = PairTokenizer(words_tokenizer(), max_length=40)
    pair = [(words(10, 9), words(200, 99))]
    whole = framed(range(10, 19), range(200, 227))
    for limits, wanted, cuts in (
        ({}, whole, (False, True)),
        ({"max_document_tokens": 5}, framed(range(10, 19), range(200, 205)), (False, True)),
        ({"max_query_tokens": 3}, framed(range(10, 13), range(200, 233)), (True, True)),
        ({"max_pair_tokens": 16}, framed(range(10, 19), range(200, 203)), (False, True)),
        ({"max_pair_tokens": 8}, framed(range(10, 13), range(200, 201)), (True, True)),
        (dict.fromkeys(("max_document_tokens", "max_query_tokens"), 10**9), whole, (False, True)),
        ({"max_pair_tokens": 41}, whole, (False, True)),
    ):
        (found,) = read(tokenizer, pair, **limits)
        assert found.ids.tolist() == wanted
        assert (found.query_truncated, found.truncated) == cuts


def test_a_pair_needs_a_token_of_each_text():
    tokenizer = PairTokenizer(words_tokenizer(), max_length=40)
    (found,) = read(tokenizer, [("w5 w6", "w7 w8")], max_pair_tokens=6)
    assert found.ids.tolist() == [0, 5, 2, 2, 7, 2]
    with pytest.raises(SettingsError, match="max_pair_tokens 5 leaves no room"):
        read(tokenizer, [("w5 w6", "w7 w8")], max_pair_tokens=5)


def test_a_document_that_is_exactly_as_long_is_not_cut():
    tokenizer = PairTokenizer(words_tokenizer(), max_length=40)
    exact, over = read(
        tokenizer, [("w5", words(200, 5)), ("w5", words(200, 6))], max_document_tokens=5
    )
    assert (exact.truncated, over.truncated) == (False, True)


@pytest.mark.parametrize("make", [PairTokenizer, WindowTokenizer])
def test_instructions_do_not_count(make):
    template = read_template(words_tokenizer())
    template = type(template)(
        template.before,
        template.between,
        template.after,
        query_instruction="w5 w6 ",
        passage_instruction="w7 w8 w9 ",
    )
    tokenizer = make(words_tokenizer(), max_length=64, template=template)
    found = read(
        tokenizer, [(words(10, 9), words(200, 20))], max_document_tokens=2, max_query_tokens=1
    )
    assert [each.ids.tolist() for each in found] == [[0, 5, 6, 10, 2, 2, 7, 8, 9, 200, 201, 2]]
    assert (found[0].truncated, found[0].query_truncated) == (True, True)


def test_a_document_is_cut_before_windows_are_made():
    tokenizer = WindowTokenizer(
        words_tokenizer(), max_length=20, window_tokens=5, window_overlap_tokens=0
    )
    text = words(200, 30)
    whole = tokenizer.tokenize([("w5", text)]).distinct
    assert len(whole) == 6
    cut = read(tokenizer, [("w5", text)], max_document_tokens=12)
    seen = np.unique(np.concatenate([each.ids for each in cut]))
    assert [each for each in seen if each >= 200] == list(range(200, 212))
    assert all(each.truncated for each in cut)
    assert max(each.span[1] for each in cut) == len(words(200, 12))
    (one,) = read(tokenizer, [("w5", text)], max_document_tokens=4)
    assert (one.span, one.truncated) == ((0, len(words(200, 4))), True)
    longer = read(tokenizer, [("w5", text)], max_document_tokens=30)
    assert [each.ids.tolist() for each in longer] == [each.ids.tolist() for each in whole]
    assert not any(each.truncated for each in longer)
    pair = read(tokenizer, [("w5", text)], max_pair_tokens=25)
    assert max(each.ids[:-1].max() for each in pair) == 200 + 25 - 5 - 1


def test_a_query_that_is_cut_leaves_more_room_and_no_document_cut_in_windows():
    tokenizer = WindowTokenizer(words_tokenizer(), max_length=20)
    rows = read(tokenizer, [(words(10, 9), words(200, 50))], max_query_tokens=2)
    assert {each.query_truncated for each in rows} == {True}
    assert {each.truncated for each in rows} == {False}
    assert {each.ids[:4].tolist()[-1] for each in rows} == {2}


@pytest.mark.parametrize("limits", [{"max_document_tokens": 8}, {"max_pair_tokens": 14}])
async def test_every_method_takes_the_limits(reranker, limits):
    wanted = reranker.logits(QUERY, DOCUMENTS, **limits)
    assert wanted[0] != pytest.approx(reranker.logits(QUERY, DOCUMENTS)[0], abs=1e-3)
    assert wanted[1:] == pytest.approx(reranker.logits(QUERY, DOCUMENTS)[1:], abs=1e-5)
    ranked = reranker.rerank(QUERY, DOCUMENTS, **limits)
    assert {each.index: each.logit for each in ranked} == pytest.approx(
        dict(enumerate(wanted)), abs=1e-5
    )
    assert {each.index for each in ranked if each.truncated} == {0}
    assert reranker.score_pairs([(QUERY, text) for text in DOCUMENTS], **limits) == pytest.approx(
        reranker.score(QUERY, DOCUMENTS, **limits), abs=1e-5
    )
    for many in (
        [await reranker.arerank(QUERY, DOCUMENTS, **limits)],
        reranker.rerank_many([(QUERY, DOCUMENTS)], **limits),
        await reranker.arerank_many([(QUERY, DOCUMENTS)], **limits),
    ):
        assert [[each.index for each in one] for one in many] == [[e.index for e in ranked]]
        assert [each.truncated for each in many[0]] == [each.truncated for each in ranked]


def test_calls_with_other_limits_share_packs_and_not_scores(reranker):
    plain, cut = (reranker.logits(QUERY, [LATE], max_document_tokens=most) for most in (None, 8))
    both = reranker.rerank_many([(QUERY, [LATE])], max_document_tokens=8)
    assert both[0][0].logit == pytest.approx(cut[0], abs=1e-5)
    assert reranker.logits(QUERY, [LATE]) == pytest.approx(plain, abs=1e-5)


def test_a_query_is_cut_as_a_call_asks_without_a_warning(caplog):
    with Reranker("tiny", device="cpu") as engine:
        (result,) = engine.rerank(QUERY, ["a"], max_query_tokens=1)
        assert result.query_truncated
        assert not own_records(caplog)


@pytest.mark.parametrize("name", ["max_document_tokens", "max_query_tokens", "max_pair_tokens"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "9"])
def test_no_number_of_tokens_is_refused_by_name(reranker, name, value):
    with pytest.raises(SettingsError, match=f"{name} must be a whole number of at least 1"):
        reranker.rerank(QUERY, DOCUMENTS, **{name: value})


def test_too_few_tokens_for_a_pair_are_refused(reranker):
    for call in (reranker.rerank, reranker.logits):
        with pytest.raises(SettingsError, match="max_pair_tokens 4 leaves no room"):
            call(QUERY, DOCUMENTS, max_pair_tokens=4)
    assert reranker.stats().queued_pairs == 0


@pytest.mark.parametrize("name", METHODS)
def test_signatures_show_the_limits(name):
    shown = inspect.signature(getattr(Reranker, name)).parameters
    assert {each.name for each in shown.values()} >= {
        "max_document_tokens",
        "max_query_tokens",
        "max_pair_tokens",
    }
    assert not any(each.kind is each.VAR_KEYWORD for each in shown.values())


def test_flagembedding_takes_only_limits_that_do_not_cut():
    tokenizer = load_tokenizer(TINY_FOLDER, max_length=64, make=TextPairTokenizer)
    assert tokenizer.lengths(TokenLimits(max_document_tokens=4096, max_pair_tokens=64))
    with pytest.raises(SettingsError, match="max_document_tokens=8 needs backend='native'"):
        tokenizer.lengths(TokenLimits(max_document_tokens=8))


@pytest.mark.parametrize(
    ("api", "sent"),
    [
        ("bge", ("max_tokens_per_doc", "max_tokens_per_query", "truncate_prompt_tokens")),
        ("vllm", ("max_tokens_per_doc", "max_tokens_per_query", "truncate_prompt_tokens")),
        ("cohere", ("max_tokens_per_doc", None, None)),
        ("tei", (None, None, None)),
        ("jina", (None, None, None)),
        ("infinity", (None, None, None)),
        (None, (None, None, None)),
    ],
)
def test_servers_are_sent_the_field_that_they_know_or_there_is_an_error(api, sent):
    kind = COMMON if api is None else APIS[api]
    names = ("max_document_tokens", "max_query_tokens", "max_pair_tokens")
    for tokens, (name, theirs) in enumerate(zip(names, sent, strict=True), start=1):
        limits = TokenLimits(**{name: tokens})
        if theirs is None:
            with pytest.raises(SettingsError, match=f"{name} is not supported by this server"):
                kind.request("q", ["a"], model=None, scale="score", token_limits=limits)
        else:
            body = kind.request("q", ["a"], model=None, scale="score", token_limits=limits)
            assert body[theirs] == tokens
