"""Large calls in parts, where a device runs ahead: it scores one while the next is tokenised."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import pytest

from bge_rerank_adapters import NonFiniteLogitError, Overloaded, Reranker, RerankTimeoutError
from bge_rerank_adapters.engine import reranker as reranker_module
from bge_rerank_adapters.engine.models.encoder import model as encoder_model
from bge_rerank_adapters.engine.text.parts import parts_of
from tests.test_transfers import LateTransfers

pytestmark = pytest.mark.timeout(120)

QUERY = "Who wrote Faust?"
# Of many lengths; the sixth and the ninth are there twice.
TEXTS = [f"document {number} " + "and more " * (number % 5) for number in range(14)]
TEXTS = [*TEXTS, TEXTS[5], TEXTS[8]]
WAIT_S = 60


@pytest.fixture
def engine(monkeypatch) -> Iterator[Reranker]:
    monkeypatch.setattr(reranker_module, "_PART_PAIRS", 4)
    monkeypatch.setattr(encoder_model, "transfers_for", LateTransfers)
    with Reranker("tiny", device="cpu", dtype="float32") as made:
        yield made


def tokenised(engine: Reranker, monkeypatch, happening=lambda number: None) -> list[int]:
    """Return a list that gets the number of pairs whenever some are about to be tokenised."""
    found: list[int] = []
    whole = engine._calls._tokenizer.tokenize

    def tokenize(pairs, lengths=None):
        found.append(len(pairs))
        happening(len(found))
        return whole(pairs, lengths)

    monkeypatch.setattr(engine._calls._tokenizer, "tokenize", tokenize)
    return found


def test_distinct_pairs_are_in_one_part_once_and_keep_their_first_index():
    pairs = [("q", each) for each in "abacbde"]
    parts = parts_of(pairs, 2)
    assert [[text for _, text in part.pairs] for part in parts] == [["a", "b"], ["c", "d"], ["e"]]
    assert [list(part.indices) for part in parts] == [[0, 1], [3, 5], [6]]
    assert parts[1].name(lambda index: f"documents[{index}]")(1) == "documents[5]"


def test_a_call_that_fits_one_part_is_left_as_it_is():
    pairs = [("q", each) for each in "aba"]
    [part] = parts_of(pairs, 3)
    assert (list(part.pairs), list(part.indices)) == (pairs, [0, 1, 2])


def test_a_call_in_parts_gives_what_it_gives_in_one(engine, monkeypatch, reranker):
    sizes = tokenised(engine, monkeypatch)
    found = engine.rerank(QUERY, TEXTS)
    wanted = reranker.rerank(QUERY, TEXTS)
    assert sizes == [4, 4, 4, 2]
    assert [each.index for each in found] == [each.index for each in wanted]
    assert [each.logit for each in found] == pytest.approx([x.logit for x in wanted], abs=1e-5)
    by_index = {each.index: each.logit for each in found}
    assert by_index[5] == by_index[14]
    assert by_index[8] == by_index[15]
    assert engine.stats().pairs == 14
    assert engine.stats().requests == 1
    assert found.usage.tokens == wanted.usage.tokens
    assert engine.stats().queued_pairs == 0


def test_windows_of_a_document_stay_in_its_part(monkeypatch):
    options = {"device": "cpu", "dtype": "float32", "long_documents": "window"}
    options |= {"max_length": 48, "window_tokens": 16}
    words = [
        "river",
        "stone",
        "bridge",
        "winter",
        "morning",
        "letter",
        "garden",
        "music",
        "train",
        "harbour",
    ]
    texts = [
        " ".join(
            f"{words[(7 * each + place) % 10]} {place + each}" for place in range(9 + 4 * each)
        )
        for each in range(9)
    ]
    with Reranker("tiny", **options) as whole:
        wanted = whole.rerank(QUERY, texts)
    monkeypatch.setattr(reranker_module, "_PART_PAIRS", 4)
    monkeypatch.setattr(encoder_model, "transfers_for", LateTransfers)
    with Reranker("tiny", **options) as parted:
        found = parted.rerank(QUERY, texts)
    assert [(each.index, each.span) for each in found] == [(x.index, x.span) for x in wanted]


async def test_asynchronous_calls_are_in_parts_as_well(engine, monkeypatch, reranker):
    sizes = tokenised(engine, monkeypatch)
    found = await engine.arerank(QUERY, TEXTS)
    assert [each.index for each in found] == [x.index for x in reranker.rerank(QUERY, TEXTS)]
    assert sizes == [4, 4, 4, 2]


def test_on_a_processor_a_call_is_one_part(monkeypatch):
    monkeypatch.setattr(reranker_module, "_PART_PAIRS", 4)
    with Reranker("tiny", device="cpu", dtype="float32") as engine:
        sizes = tokenised(engine, monkeypatch)
        engine.rerank(QUERY, TEXTS)
    assert sizes == [16]


def test_the_first_part_is_scored_before_the_second_is_tokenised(engine, monkeypatch):
    scored = threading.Event()
    model = engine._core.workers[0].model
    whole = model.launch

    def launch(pairs, **options):
        scored.set()
        return whole(pairs, **options)

    monkeypatch.setattr(engine._core.workers[0], "_launch", launch)
    tokenised(engine, monkeypatch, lambda number: number < 2 or scored.wait(WAIT_S) or 1 / 0)
    assert len(engine.rerank(QUERY, TEXTS)) == 16


def test_an_error_names_the_document_by_its_place_in_the_whole_call(engine, monkeypatch):
    worker = engine._core.workers[0]
    whole = worker._launch
    bad = engine._calls._tokenizer.tokenize([(QUERY, TEXTS[9])]).distinct[0].ids

    def launch(pairs, **options):
        logits = whole(pairs, **options)()
        return lambda: [
            float("nan") if np.array_equal(pair.ids, bad) else logit
            for pair, logit in zip(pairs, logits, strict=True)
        ]

    monkeypatch.setattr(worker, "_launch", launch)
    with pytest.raises(NonFiniteLogitError, match=r"documents\[9\]"):
        engine.rerank(QUERY, TEXTS)
    assert engine.stats().queued_pairs == 0


def test_all_of_a_call_keeps_its_room_until_it_is_tokenised(monkeypatch):
    monkeypatch.setattr(reranker_module, "_PART_PAIRS", 4)
    monkeypatch.setattr(encoder_model, "transfers_for", LateTransfers)
    waiting: list[int] = []
    with Reranker("tiny", device="cpu", dtype="float32", max_queued_pairs=12) as engine:

        def look(number: int) -> None:
            waiting.append(engine.stats().queued_pairs)
            if number == 1:
                with pytest.raises(Overloaded):
                    engine._core.reserve(Future(), 4)

        tokenised(engine, monkeypatch, look)
        engine.rerank(QUERY, TEXTS[:10])
        assert engine.stats().queued_pairs == 0
    # Less what has been scored meanwhile.
    assert waiting[0] == 10
    assert 6 <= waiting[1] <= 10
    assert 2 <= waiting[2] <= 10


def test_a_call_that_runs_out_of_time_between_parts_leaves_nothing_behind(engine, monkeypatch):
    worker, gate = engine._core.workers[0], threading.Event()
    whole = worker._launch

    def launch(pairs, **options):
        assert gate.wait(WAIT_S)
        return whole(pairs, **options)

    monkeypatch.setattr(worker, "_launch", launch)
    with pytest.raises(RerankTimeoutError):
        engine.rerank(QUERY, TEXTS, timeout_s=0.3)
    assert engine.stats().queued_pairs == 0
    gate.set()
    assert len(engine.rerank(QUERY, TEXTS)) == 16


def test_a_tokenizer_that_fails_on_a_later_part_leaves_nothing_behind(engine, monkeypatch):
    def fail(number: int) -> None:
        if number == 3:
            raise ValueError("no such text")

    tokenised(engine, monkeypatch, fail)
    with pytest.raises(Exception, match="no such text"):
        engine.rerank(QUERY, TEXTS)
    assert engine.stats().queued_pairs == 0
    assert len(engine.rerank(QUERY, TEXTS)) == 16
