"""What an engine tells of itself: its numbers and its log."""

import json
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import FrozenInstanceError, asdict

import pytest

from bge_rerank_adapters import EngineStats, Overloaded, Reranker
from bge_rerank_adapters.engine.queue.packs import Job
from bge_rerank_adapters.engine.text.pairs import TokenPair
from tests.checkpoints import build_xlm_roberta, read_sentences
from tests.logs import own_records

QUERY = "Who plays chess?"
TEXTS = [text[:80] for text in list(read_sentences().values())[:60]]
SECRET = "hf_" + "not-to-be-seen"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_xlm_roberta(tmp_path_factory.mktemp("stats") / "checkpoint"))


@pytest.fixture
def engine(folder: str) -> Iterator[Reranker]:
    with Reranker(folder, device="cpu", dtype="float32", pack_tokens=200, max_length=64) as made:
        yield made


def test_a_new_engine_has_done_nothing(engine):
    assert set(engine.stats().to_dict().values()) == {0}


def test_the_numbers_are_those_of_what_was_asked(engine):
    engine.rerank(QUERY, [*TEXTS[:5], TEXTS[0], "long " * 200])
    engine.score(QUERY, [])
    engine.rerank_many([(QUERY, TEXTS[:3]), (QUERY, []), (QUERY, TEXTS[3:4])])
    stats = engine.stats()
    assert stats.requests == 1 + 1 + 3
    # The repeated document counts once.
    assert stats.pairs == 6 + 4
    assert stats.truncated_pairs == 1
    pairs = [*((QUERY, text) for text in [*TEXTS[:5], "long " * 200, *TEXTS[:4]])]
    assert stats.tokens == sum(map(len, engine._calls._tokenizer.tokenize(pairs).distinct)) + sum(
        map(len, engine._calls._tokenizer.tokenize(pairs[:4]).distinct)
    )
    assert stats.packs >= stats.tokens / 200
    assert stats.pack_fill == pytest.approx(stats.tokens / (200 * stats.packs))
    assert stats.queued_pairs == 0
    assert min(stats.waiting_s, stats.tokenizing_s, stats.scoring_s) > 0.0


def test_a_ranking_tells_what_it_took(engine):
    ranking = engine.rerank(QUERY, [*TEXTS[:5], TEXTS[0]], top_k=2)
    stats = engine.stats()
    assert ranking.usage.tokens == stats.tokens
    # A call's own times begin before and end after the work that the counters measure.
    assert ranking.usage.tokenizing_s >= stats.tokenizing_s > 0.0
    assert ranking.usage.waiting_s == stats.waiting_s
    assert ranking.usage.scoring_s >= stats.scoring_s > 0.0
    assert engine.rerank(QUERY, []).usage.tokens == 0
    assert engine.rerank_many([(QUERY, TEXTS[:2])])[0].usage is None


def test_the_time_of_scoring_counts_though_the_callers_thread_comes_late(engine, monkeypatch):
    submit = engine._core.submit

    def late(job: Job[TokenPair]) -> None:
        submit(job)
        job.future.result(60)

    monkeypatch.setattr(engine._core, "submit", late)
    ranking = engine.rerank(QUERY, TEXTS[:5])
    assert ranking.usage.scoring_s >= engine.stats().scoring_s > 0.0


def test_pairs_that_wait_are_counted_from_the_call_on(engine, monkeypatch):
    entered, gate = threading.Event(), threading.Event()
    tokenize = engine._calls._tokenizer.tokenize

    def held_up(pairs: list[tuple[str, str]]) -> object:
        entered.set()
        assert gate.wait(60)
        return tokenize(pairs)

    monkeypatch.setattr(engine._calls._tokenizer, "tokenize", held_up)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(engine.score, QUERY, TEXTS)
        assert entered.wait(60)
        assert engine.stats().queued_pairs == len(TEXTS)
        gate.set()
        call.result(60)
    assert engine.stats().queued_pairs == 0


def test_a_full_queue_refuses_before_it_reads_the_texts(folder, monkeypatch):
    with Reranker(folder, device="cpu", max_queued_pairs=10) as engine:
        engine._core.reserve(Future(), 8)
        monkeypatch.setattr(
            engine._calls._tokenizer, "tokenize", lambda _: pytest.fail("it was read")
        )
        with pytest.raises(Overloaded):
            engine.score(QUERY, TEXTS)
        assert engine.stats().requests == 0


def test_a_single_pair_longer_than_the_budget_fills_its_pack(folder):
    with Reranker(folder, device="cpu", pack_tokens=1) as engine:
        engine.score(QUERY, TEXTS[:3])
        assert (engine.stats().packs, engine.stats().pack_fill) == (3, 1.0)


def test_the_numbers_of_many_threads_add_up(engine):
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: engine.score(f"{i}?", TEXTS[:3]), range(64)))
    assert (engine.stats().requests, engine.stats().pairs) == (64, 192)


def test_they_are_plain_fixed_numbers_and_outlive_the_engine(engine):
    engine.score(QUERY, TEXTS)
    engine.close()
    stats = engine.stats()
    assert isinstance(stats, EngineStats)
    assert json.loads(json.dumps(stats.to_dict())) == asdict(stats)
    assert {type(value) for value in stats.to_dict().values()} == {int, float}
    with pytest.raises(FrozenInstanceError):
        stats.pairs = 0


# The log


def test_loading_and_closing_are_logged_under_the_packages_name(folder, caplog):
    with caplog.at_level(logging.INFO, logger="bge_rerank_adapters"):
        engine = Reranker(folder, device="cpu", dtype="float32", token=SECRET)
        engine.score(QUERY, TEXTS)
        engine.close()
        engine.close()
    loaded, closed = own_records(caplog, level=logging.INFO)
    assert loaded.getMessage().startswith(f"Loaded {engine!r}"[:40])
    assert "Closed" in closed.getMessage()
    assert loaded.levelno == closed.levelno == logging.INFO
    assert SECRET not in caplog.text
    assert QUERY not in caplog.text


def test_a_scoring_thread_that_ends_is_logged_with_its_cause(engine, monkeypatch, caplog):
    def ending(_: object) -> list[float]:
        raise SystemExit("over")

    monkeypatch.setattr(engine._core.workers[0].model, "logits", ending)
    with pytest.raises(Exception, match="over"):
        engine.score(QUERY, TEXTS[:1])
    (record,) = own_records(caplog)
    assert record.levelno == logging.ERROR
    assert "1 calls waiting" in record.getMessage()
    assert record.exc_info[0] is SystemExit
    assert TEXTS[0] not in caplog.text
