"""Logits to ranked documents, and the checks of what callers hand over."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bge_rerank_adapters.calls.checks import check_documents, check_pairs, check_query
from bge_rerank_adapters.calls.limits import Limits, check_top_k
from bge_rerank_adapters.calls.ranked_document import RankedDocument
from bge_rerank_adapters.calls.ranking import PairScore, ScoredRequest, sigmoid
from bge_rerank_adapters.calls.requests import Request
from bge_rerank_adapters.errors import InputTypeError, SettingsError


def ranked(logits, **limits):
    texts = [f"d{index}" for index in range(len(logits))]
    scores = [PairScore(sigmoid(logit), logit) for logit in logits]
    return ScoredRequest(Request("q", texts), scores).rank(Limits(**limits))


def order(logits, **limits):
    return [each.index for each in ranked(logits, **limits)]


@pytest.mark.parametrize(
    ("logit", "score"),
    [(0.0, 0.5), (1e308, 1.0), (-1e308, 0.0), (math.log(3), 0.75), (-math.log(3), 0.25)],
)
def test_sigmoid(logit, score):
    assert sigmoid(logit) == pytest.approx(score, abs=1e-15)


@given(st.floats(allow_nan=False))
def test_sigmoid_stays_between_0_and_1_and_is_symmetric(logit):
    assert 0.0 <= sigmoid(logit) <= 1.0
    assert sigmoid(logit) + sigmoid(-logit) == pytest.approx(1.0)


def test_small_scores_keep_their_digits():
    assert sigmoid(-40.0) == pytest.approx(math.exp(-40), rel=1e-12)


def test_highest_logit_comes_first_with_all_that_belongs_to_it():
    scores = [PairScore(0.25, -1.0, truncated=True), PairScore(0.75, 2.0, span=(0, 1))]
    assert ScoredRequest(Request("q", ["a", "b"]), scores).rank(Limits()) == [
        RankedDocument(1, 0.75, "b", 2.0, truncated=False, span=(0, 1)),
        RankedDocument(0, 0.25, "a", -1.0, truncated=True),
    ]


def test_without_logits_the_score_orders_and_equal_ones_keep_the_order_given():
    scores = [PairScore(0.5, None), PairScore(0.9, None), PairScore(0.5, None)]
    scored = ScoredRequest(Request("q", ["a", "b", "c"]), scores, order=[2, 0, 1])
    assert [each.index for each in scored.rank(Limits())] == [1, 2, 0]
    assert [each.index for each in scored.rank(Limits(top_k=2))] == [1, 2]


def test_equal_logits_keep_input_order():
    assert order([1.0, 2.0, 1.0, 2.0, 1.0]) == [1, 3, 0, 2, 4]


def test_order_is_by_logit_where_scores_are_equal():
    assert sigmoid(50.0) == sigmoid(60.0)
    assert order([50.0, 60.0]) == [1, 0]


def test_threshold_is_inclusive_and_applied_before_top_k():
    logits = [0.0, 3.0, -1.0, 1.0]
    assert order(logits, score_threshold=0.5) == [1, 3, 0]
    assert order(logits, score_threshold=math.nextafter(0.5, 1)) == [1, 3]
    assert order(logits, score_threshold=0.5, top_k=2) == [1, 3]
    assert order(logits, score_threshold=0.99, top_k=2) == []
    assert order(logits, score_threshold=0.0) == [1, 3, 0, 2]


def test_top_k_and_the_empty_list():
    assert order([1.0, 2.0, 3.0], top_k=2) == [2, 1]
    assert order([1.0, 2.0], top_k=9) == [1, 0]
    assert order([]) == []


@given(
    st.lists(st.floats(-30, 30)),
    st.none() | st.integers(1, 5),
    st.none() | st.floats(0, 1),
)
def test_ranking_is_a_filtered_stable_sort(logits, top_k, threshold):
    wanted = sorted(range(len(logits)), key=lambda index: (-logits[index], index))
    kept = [i for i in wanted if threshold is None or sigmoid(logits[i]) >= threshold]
    assert order(logits, top_k=top_k, score_threshold=threshold) == kept[:top_k]


def test_ranked_documents_cannot_be_changed():
    with pytest.raises(AttributeError):
        ranked([1.0])[0].score = 0.0


def test_top_k_is_a_python_int_of_any_whole_number():
    assert Limits().top_k is None
    number = Limits(np.int64(3)).top_k
    assert (number, type(number)) == (3, int)


@pytest.mark.parametrize("value", [0, -1])
def test_top_k_below_1_is_refused(value):
    with pytest.raises(SettingsError, match=f"top_k must be at least 1, got {value}; None returns"):
        Limits(value)


@pytest.mark.parametrize("value", [True, False, 2.0, "3", [1]])
def test_top_k_must_be_a_whole_number(value):
    with pytest.raises(ValueError, match=r"^top_k must be a whole number or None, got"):
        Limits(value)
    with pytest.raises(ValueError, match=r"^depth must be a whole number or None, got"):
        check_top_k(value, name="depth")


def test_threshold_is_a_python_float():
    assert Limits().score_threshold is None
    for value in (0, 1, 0.3, np.float32(0.25)):
        checked = Limits(score_threshold=value).score_threshold
        assert (checked, type(checked)) == (value, float)
        json.dumps(checked)


@pytest.mark.parametrize("value", [-0.001, 1.001, 7, math.nan, math.inf])
def test_threshold_outside_0_to_1_is_refused(value):
    with pytest.raises(
        SettingsError, match=r"score_threshold must be from 0 to 1, .*not with the l"
    ):
        Limits(score_threshold=value)


@pytest.mark.parametrize("value", [True, "0.3", [0.3]])
def test_threshold_must_be_a_number(value):
    with pytest.raises(SettingsError, match="must be a number from 0 to 1 or None"):
        Limits(score_threshold=value)


@pytest.mark.parametrize("value", [None, 3, b"text", ["text"]])
def test_query_must_be_text(value):
    with pytest.raises(InputTypeError, match=f"query must be a str, got {type(value).__name__}"):
        check_query(value)
    assert check_query("") == ""


@pytest.mark.parametrize("value", ["one", b"one", None, 5])
def test_documents_must_be_a_list(value):
    with pytest.raises(TypeError, match=r"documents must be a list of str, got .*wrap a single"):
        check_documents(value)


@pytest.mark.parametrize("value", [None, 3.5, b"x", ["x"]])
def test_a_document_that_is_no_text_is_named_by_its_position(value):
    with pytest.raises(InputTypeError, match=r"documents\[2\] must be a str, got"):
        check_documents(["a", "", value, "b"])


def test_documents_are_copied_from_any_iterable():
    given_list = ["a", "b"]
    checked = check_documents(given_list)
    assert checked == given_list
    assert checked is not given_list
    assert check_documents(text for text in "ab") == ["a", "b"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("ab", "pairs must be a list of"),
        (None, "pairs must be a list of"),
        ([("q", "d"), "qd"], r"pairs\[1\] must be a \(query, document\) tuple"),
        ([("q", "d", "e")], r"pairs\[0\] must be"),
        ([("q", "d"), ("q", None)], r"The document of pairs\[1\] must be a str"),
        ([(7, "d")], r"The query of pairs\[0\] must be a str, got int \(7\)"),
    ],
)
def test_pairs_are_checked(value, message):
    with pytest.raises(InputTypeError, match=message):
        check_pairs(value)


def test_pairs_may_be_lists():
    assert check_pairs([["q", "d"], ("a", "b")]) == [("q", "d"), ("a", "b")]
    assert check_pairs([]) == []


def test_messages_show_no_long_texts():
    with pytest.raises(InputTypeError) as caught:
        check_query(["secret text " * 20])
    assert "secret" not in str(caught.value)
