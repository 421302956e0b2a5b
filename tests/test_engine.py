"""The engine through its public names: results, async, time limits, closing and sharing."""

import asyncio
import copy
import gc
import json
import logging
import math
import os
import pickle
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bge_rerank_adapters.engine.queue.calls as calls_module
from bge_rerank_adapters import (
    ClosedError,
    Overloaded,
    RankedDocument,
    Reranker,
    RerankTimeoutError,
    Scorer,
    SettingsError,
    WorkerDiedError,
)
from bge_rerank_adapters.calls.items import Bad, Item, rank_items
from bge_rerank_adapters.calls.limits import Limits
from bge_rerank_adapters.engine.models import loading
from bge_rerank_adapters.engine.shared import shared_reranker
from bge_rerank_adapters.engine.text.pairs import TokenPair
from bge_rerank_adapters.settings import EngineSettings
from tests.checkpoints import build_xlm_roberta, read_queries, read_sentences
from tests.logs import own_records
from tests.texts import DOCUMENTS, QUERY

SENTENCES = list(read_sentences().values())
QUERIES = list(read_queries().values())
# Takes any machine longer than the limits below: 600 pairs that fill the model's 512 tokens.
LONG = [f"{index} " + "river stone tiger " * 100 for index in range(600)]
# Generous, for a machine that is busy with other things; nothing here takes as long.
WAIT_S = 60
# In float32, how much the company of a pair may move its logit.
COMPANY = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_xlm_roberta(tmp_path_factory.mktemp("engine") / "checkpoint"))


@pytest.fixture
def make(folder: str) -> Iterator[Callable[..., Reranker]]:
    """Return a maker of engines on a small random checkpoint, closed with the test."""
    made: list[Reranker] = []

    def build(**given_settings) -> Reranker:
        engine = Reranker(folder, **{"device": "cpu", "dtype": "float32", **given_settings})
        made.append(engine)
        return engine

    yield build
    for engine in made:
        engine.close()


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def scoring_threads() -> set[threading.Thread]:
    return {each for each in threading.enumerate() if each.name.startswith("bge-rerank")}


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Reranker], threading.Event]]:
    """Let the packs of an engine wait in its model until the event that it returns is set.

    What is to happen while a call waits then does so on the slowest machine, too.
    """
    gates: list[threading.Event] = []

    def hold_up(engine: Reranker) -> threading.Event:
        gate = threading.Event()
        gates.append(gate)
        model = engine._core.workers[0].model
        logits = model.logits

        def when_open(pairs: Sequence[TokenPair]) -> list[float]:
            assert gate.wait(WAIT_S)
            return logits(pairs)

        monkeypatch.setattr(model, "logits", when_open)
        return gate

    yield hold_up
    for gate in gates:
        gate.set()


# Results


def test_documents_come_back_best_first_with_all_that_is_promised(reranker):
    results = reranker.rerank(QUERY, DOCUMENTS)
    assert results[0].index == 1, "the Dartmouth Conference answers the question"
    assert sorted(result.index for result in results) == [0, 1, 2, 3]
    assert [r.logit for r in results] == sorted((r.logit for r in results), reverse=True)
    for result in results:
        assert result.text == DOCUMENTS[result.index]
        assert result.score == pytest.approx(1 / (1 + math.exp(-result.logit)), abs=1e-12)
        assert result.truncated is False


def test_scores_and_logits_are_in_input_order_and_agree_with_the_ranking(reranker):
    results = reranker.rerank(QUERY, DOCUMENTS)
    logits, scores = reranker.logits(QUERY, DOCUMENTS), reranker.score(QUERY, DOCUMENTS)
    assert [logits[r.index] for r in results] == pytest.approx([r.logit for r in results])
    assert [scores[r.index] for r in results] == pytest.approx([r.score for r in results])
    pairs = [(QUERY, document) for document in DOCUMENTS]
    assert reranker.score_pairs(pairs) == pytest.approx(scores, abs=COMPANY)
    assert reranker.score_pairs(iter(pairs[::-1])) == pytest.approx(scores[::-1], abs=COMPANY)


def test_pairs_with_different_queries_each_get_their_own_score(reranker):
    pairs = [(query, document) for document in DOCUMENTS for query in (QUERY, "Who plays chess?")]
    alone = [reranker.score(query, [document])[0] for query, document in pairs]
    assert reranker.score_pairs(pairs) == pytest.approx(alone, abs=COMPANY)
    assert len(set(alone)) == len(pairs)


def test_every_number_is_a_plain_python_one(reranker):
    results = reranker.rerank(QUERY, DOCUMENTS)
    for result in results:
        assert [type(v) for v in (result.index, result.score, result.logit)] == [int, float, float]
    numbers = [*reranker.score(QUERY, DOCUMENTS), *reranker.logits(QUERY, DOCUMENTS)]
    assert {type(number) for number in [*numbers, *reranker.score_pairs([("a", "b")])]} == {float}
    json.dumps([[r.index, r.score, r.logit, r.text, r.truncated] for r in results])


def test_duplicates_tie_exactly_and_keep_input_order(reranker):
    documents = [DOCUMENTS[0], DOCUMENTS[1], *DOCUMENTS, DOCUMENTS[1]]
    results = reranker.rerank(QUERY, documents)
    assert sorted(result.index for result in results) == list(range(7))
    assert [result.index for result in results[:3]] == [1, 3, 6]
    assert len({result.logit for result in results[:3]}) == 1
    assert [r.index for r in results if r.text == DOCUMENTS[0]] == [0, 2]


def test_all_documents_alike_keep_input_order_under_top_k(reranker):
    results = reranker.rerank(QUERY, ["the same"] * 9, top_k=4)
    assert [result.index for result in results] == [0, 1, 2, 3]


def test_the_company_of_a_pair_does_not_move_its_logit(reranker):
    alone = [reranker.logits(QUERY, [document])[0] for document in SENTENCES[:12]]
    beside = reranker.logits(QUERY, [*SENTENCES[:12], *SENTENCES[100:140]])[:12]
    assert beside == pytest.approx(alone, abs=COMPANY)


@pytest.mark.parametrize("pack_tokens", [1, 100, 100_000])
def test_the_budget_of_a_pack_does_not_move_a_logit(make, pack_tokens):
    reference = make().logits(QUERY, SENTENCES[:40])
    assert make(pack_tokens=pack_tokens).logits(QUERY, SENTENCES[:40]) == pytest.approx(
        reference, abs=COMPANY
    )


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 9, None])
def test_top_k_gives_the_head_of_the_whole_ranking(reranker, top_k):
    everything = reranker.rerank(QUERY, DOCUMENTS)
    assert reranker.rerank(QUERY, DOCUMENTS, top_k=top_k) == everything[:top_k]


def test_the_threshold_is_inclusive_on_the_score_and_comes_before_top_k(reranker):
    everything = reranker.rerank(QUERY, DOCUMENTS)
    third = everything[2].score
    rerank = reranker.rerank
    assert rerank(QUERY, DOCUMENTS, score_threshold=third) == everything[:3]
    above = math.nextafter(third, 1.0)
    assert rerank(QUERY, DOCUMENTS, score_threshold=above) == everything[:2]
    assert rerank(QUERY, DOCUMENTS, score_threshold=third, top_k=1) == everything[:1]
    assert rerank(QUERY, DOCUMENTS, score_threshold=third, top_k=4) == everything[:3]
    assert rerank(QUERY, DOCUMENTS, score_threshold=0) == everything
    assert rerank(QUERY, DOCUMENTS, score_threshold=1) == []


def test_truncation_is_told_for_the_documents_that_were_cut_alone(make):
    engine = make(max_length=64)
    documents = ["short", "long " * 200, "short too", "long " * 199]
    results = engine.rerank(QUERY, documents)
    assert {r.index for r in results if r.truncated} == {1, 3}
    assert {type(result.truncated) for result in results} == {bool}
    assert not any(r.truncated for r in make().rerank(QUERY, ["long " * 20]))


def test_documents_may_be_any_sequence_or_iterator(reranker):
    reference = reranker.rerank(QUERY, DOCUMENTS)
    assert reranker.rerank(QUERY, tuple(DOCUMENTS)) == reference
    assert reranker.rerank(QUERY, iter(DOCUMENTS)) == reference


def test_it_is_a_scorer(reranker):
    assert isinstance(reranker, Scorer)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    query=st.text(max_size=20),
    documents=st.lists(
        st.one_of(
            st.sampled_from(["", "a", "tea", *DOCUMENTS]),
            st.text(st.characters(exclude_categories=()), max_size=30),
        ),
        max_size=8,
    ),
    top_k=st.none() | st.integers(1, 10),
    score_threshold=st.none() | st.floats(0, 1),
)
def test_a_ranking_is_a_permutation_that_agrees_with_the_logits(
    reranker, query, documents, top_k, score_threshold
):
    everything = reranker.rerank(query, documents)
    assert sorted(result.index for result in everything) == list(range(len(documents)))
    assert [result.text for result in everything] == [documents[r.index] for r in everything]
    keys = [(-result.logit, result.index) for result in everything]
    assert keys == sorted(keys)
    logits = reranker.logits(query, documents)
    assert [r.logit for r in everything] == pytest.approx(
        [logits[r.index] for r in everything], abs=COMPANY
    )
    for text in set(documents):
        assert len({r.logit for r in everything if r.text == text}) == 1
    kept = [r for r in everything if score_threshold is None or r.score >= score_threshold]
    limited = reranker.rerank(query, documents, top_k=top_k, score_threshold=score_threshold)
    assert limited == kept[:top_k]


# Many requests


def requests_of(number: int) -> list[tuple[str, list[str]]]:
    return [(QUERIES[i], SENTENCES[i : i + i % 4]) for i in range(number)]


def indexes(ranking: list[RankedDocument]) -> list[int]:
    return [result.index for result in ranking]


def test_many_requests_give_what_each_gives_alone(make, monkeypatch):
    monkeypatch.setattr(calls_module, "_PIECE_PAIRS", 7)
    engine, requests = make(), requests_of(30)
    rankings = engine.rerank_many(requests, top_k=2, score_threshold=0.2)
    assert len(rankings) == 30
    assert rankings[0] == rankings[4] == []
    for (query, documents), ranking in zip(requests, rankings, strict=True):
        alone = engine.rerank(query, documents, top_k=2, score_threshold=0.2)
        assert indexes(ranking) == indexes(alone)
        assert [r.text for r in ranking] == [r.text for r in alone]
        assert [r.logit for r in ranking] == pytest.approx([r.logit for r in alone], abs=COMPANY)


def test_an_iterator_of_requests_is_read_as_it_goes(make, monkeypatch):
    monkeypatch.setattr(calls_module, "_PIECE_PAIRS", 3)
    engine = make()
    read: list[int] = []

    def source() -> Iterator[tuple[str, list[str]]]:
        for position in range(40):
            read.append(position)
            if position == 30:
                raise KeyError("the caller's own")
            yield QUERY, DOCUMENTS

    with pytest.raises(KeyError, match="the caller's own"):
        engine.rerank_many(source())
    assert read == list(range(31))
    assert engine.rerank_many(iter([(QUERY, DOCUMENTS)]), top_k=1) == [
        engine.rerank(QUERY, DOCUMENTS, top_k=1)
    ]
    assert engine.rerank_many([]) == engine.rerank_many(iter(())) == []


async def test_many_requests_give_the_same_asynchronously(make):
    engine, requests = make(), requests_of(12)
    assert await engine.arerank_many(iter(requests), top_k=2) == engine.rerank_many(
        requests, top_k=2
    )
    assert await engine.arerank_many([]) == []


def test_the_progress_bar_is_on_standard_error_and_only_when_asked_for(make, capfd):
    engine = make()
    engine.rerank_many(requests_of(8))
    assert capfd.readouterr() == ("", "")
    engine.rerank_many(requests_of(8), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "8/8" in err
    engine.rerank_many(iter(requests_of(8)), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "8/" in err


def test_the_progress_bar_ends_even_if_the_call_fails(make, capfd):
    engine = make()
    for _ in range(2):
        with pytest.raises(TypeError):
            engine.rerank_many([(QUERY, [None])], progress=True)
    assert len(engine.rerank_many(requests_of(3), progress=True)) == 3
    assert "3/3" in capfd.readouterr().err


def test_a_bulk_run_with_a_bad_item_is_not_refused_because_others_fill_the_queue(make, monkeypatch):
    engine = make(max_queued_pairs=4)
    tokenize = engine._calls._tokenizer.tokenize

    def failing(pairs):
        if any(text == "bad" for _, text in pairs):
            raise RuntimeError("it cannot be read")
        return tokenize(pairs)

    monkeypatch.setattr(engine._calls._tokenizer, "tokenize", failing)
    engine._core.reserve(Future(), 4)
    texts = [DOCUMENTS, ["fine", "bad"], DOCUMENTS[:2]]
    items = [Item(n, QUERY, each, [{}] * len(each)) for n, each in enumerate(texts, start=1)]
    first, second, third = rank_items(engine, items, limits=Limits(top_k=2))
    assert (len(first), len(third)) == (2, 2)
    assert isinstance(second, Bad)
    assert "it cannot be read" in second.reason


# Time limits and cancelling


def test_a_call_that_runs_out_of_time_says_so_and_the_engine_goes_on(make, hold):
    engine = make(pack_tokens=600)
    gate = hold(engine)
    with pytest.raises(RerankTimeoutError, match=r"timeout_s=0\.05") as info:
        engine.rerank(QUERY, LONG, timeout_s=0.05)
    assert isinstance(info.value, TimeoutError)
    assert len(engine._core._backlog) == 0
    gate.set()
    assert len(engine.rerank(QUERY, DOCUMENTS, timeout_s=WAIT_S)) == 4
    # The rest was dropped, except for the pack that was under way.
    assert engine.stats().pairs <= 1 + 4


@pytest.mark.parametrize("step", ["reserve", "add", "tokenize", "submit"])
def test_an_interrupt_right_after_any_step_of_a_call_gives_its_room_back(make, monkeypatch, step):
    """Ctrl-C raises wherever a call of a function has just returned."""
    engine = make()
    owners = {"add": engine._core.tally, "tokenize": engine._calls._tokenizer}
    owner = owners.get(step, engine._core)
    work = getattr(owner, step)

    def interrupted(*args, **kwargs):
        work(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(owner, step, interrupted)
        for call in (engine.rerank, engine.logits):
            with pytest.raises(KeyboardInterrupt):
                call(QUERY, DOCUMENTS)
        with pytest.raises(KeyboardInterrupt):
            engine.rerank_many(requests_of(3))
    assert len(engine._core._backlog) == 0
    assert len(engine.rerank(QUERY, DOCUMENTS, timeout_s=WAIT_S)) == len(DOCUMENTS)


async def test_an_async_call_that_runs_out_of_time_says_so_and_the_engine_goes_on(make, hold):
    engine = make()
    gate = hold(engine)
    with pytest.raises(RerankTimeoutError, match=r"timeout_s=0\.05") as info:
        await engine.arerank(QUERY, LONG, timeout_s=0.05)
    assert isinstance(info.value, TimeoutError)
    with pytest.raises(RerankTimeoutError):
        await engine.arerank_many([(QUERY, LONG)] * 3, timeout_s=0.05)
    gate.set()
    assert len(await engine.arerank(QUERY, DOCUMENTS, timeout_s=WAIT_S)) == 4
    wait_for(lambda: len(engine._core._backlog) == 0)


async def test_a_bad_time_limit_is_refused_by_the_async_methods(make):
    engine = make()
    with pytest.raises(SettingsError, match="timeout_s"):
        await engine.arerank(QUERY, DOCUMENTS, timeout_s=-1)
    with pytest.raises(SettingsError, match="timeout_s"):
        await engine.arerank_many([], timeout_s=0)


async def test_cancelling_a_task_drops_its_waiting_pairs(make, hold):
    engine = make(max_queued_pairs=10)
    gate = hold(engine)
    task = asyncio.create_task(engine.arerank(QUERY, LONG))
    await asyncio.to_thread(wait_for, lambda: len(engine._core._backlog))
    with pytest.raises(Overloaded):
        await engine.arerank(QUERY, DOCUMENTS)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # Nothing waits any more, so there is room for others.
    others = asyncio.create_task(engine.arerank(QUERY, DOCUMENTS, timeout_s=WAIT_S))
    await asyncio.sleep(0)
    gate.set()
    assert len(await others) == 4


@pytest.mark.parametrize("ending", ["cancelled", "out of time"])
@pytest.mark.parametrize("many", [False, True])
async def test_a_call_that_is_given_up_while_it_tokenises_frees_its_place_at_once(
    make, monkeypatch, ending, many
):
    """A tokenizer cannot be interrupted, but nobody need wait for what it will give."""
    engine = make(max_queued_pairs=10)
    entered, gate = threading.Event(), threading.Event()
    tokenize = engine._calls._tokenizer.tokenize

    def held_up(pairs: list[tuple[str, str]]) -> object:
        monkeypatch.undo()
        entered.set()
        assert gate.wait(WAIT_S)
        return tokenize(pairs)

    monkeypatch.setattr(engine._calls._tokenizer, "tokenize", held_up)
    timeout_s = None if ending == "cancelled" else 0.5
    texts = SENTENCES[:20]
    call = (
        engine.arerank_many([(QUERY, texts)], timeout_s=timeout_s)
        if many
        else engine.arerank(QUERY, texts, timeout_s=timeout_s)
    )
    task = asyncio.create_task(call)
    await asyncio.to_thread(entered.wait, WAIT_S)
    if timeout_s is None:
        task.cancel()
    with pytest.raises(asyncio.CancelledError if timeout_s is None else RerankTimeoutError):
        await task
    assert engine.stats().queued_pairs == 0
    assert len(await engine.arerank(QUERY, DOCUMENTS, timeout_s=WAIT_S)) == 4
    gate.set()
    for pool in (engine._runner._short, engine._runner._long):
        await asyncio.to_thread(pool.shutdown)
    assert len(engine.rerank(QUERY, DOCUMENTS)) == 4
    assert engine.stats().pairs == 8, "those that were given up are not scored"


async def test_cancelling_before_anything_is_queued_leaves_nothing_behind(make):
    engine = make()
    tasks = [asyncio.create_task(engine.arerank(QUERY, LONG)) for _ in range(8)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {asyncio.CancelledError}
    assert len(await engine.arerank(QUERY, DOCUMENTS, timeout_s=WAIT_S)) == 4
    wait_for(lambda: len(engine._core._backlog) == 0)


# Threads and event loops


async def test_the_async_method_gives_what_the_sync_one_gives(reranker):
    results = await reranker.arerank(QUERY, DOCUMENTS, top_k=3, score_threshold=0.1)
    assert results == reranker.rerank(QUERY, DOCUMENTS, top_k=3, score_threshold=0.1)
    assert await reranker.arerank(QUERY, []) == []


async def test_the_event_loop_goes_on_while_documents_are_tokenised_and_scored(make, monkeypatch):
    engine = make()
    loop = asyncio.get_running_loop()
    worked: list[str] = []

    def slowed(owner: object, name: str) -> None:
        work = getattr(owner, name)

        def once_the_loop_has_gone_on(*args: object) -> object:
            went_on = threading.Event()
            loop.call_soon_threadsafe(went_on.set)
            assert went_on.wait(WAIT_S), f"{name} keeps the loop"
            worked.append(name)
            return work(*args)

        monkeypatch.setattr(owner, name, once_the_loop_has_gone_on)

    slowed(engine._calls._tokenizer, "tokenize")
    slowed(engine._core.workers[0].model, "logits")
    assert len(await engine.arerank(QUERY, DOCUMENTS)) == 4
    assert set(worked) == {"tokenize", "logits"}


def test_many_threads_each_get_their_own_results(make):
    engine = make(pack_tokens=500)
    requests = requests_of(60)
    expected = [engine.rerank(query, documents) for query, documents in requests]
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda request: engine.rerank(*request), requests, timeout=WAIT_S))
    assert [indexes(ranking) for ranking in results] == [indexes(each) for each in expected]


def test_many_event_loops_share_an_engine(make):
    engine = make()
    requests = requests_of(24)
    expected = [indexes(engine.rerank(*request)) for request in requests]

    async def ask(part: list[tuple[str, list[str]]]) -> list[list[int]]:
        rankings = await asyncio.gather(*(engine.arerank(*request) for request in part))
        return [indexes(ranking) for ranking in rankings]

    parts = [requests[i::4] for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda part: asyncio.run(ask(part)), parts, timeout=WAIT_S))
    assert results == [expected[i::4] for i in range(4)]


def test_a_loop_that_ends_with_calls_under_way_leaves_the_engine_usable(make):
    engine = make()

    async def leave() -> None:
        for _ in range(4):
            # Referenced by the loop alone, and cancelled by asyncio.run at its end.
            leave.tasks.append(asyncio.create_task(engine.arerank(QUERY, LONG)))
        await asyncio.sleep(0.05)

    leave.tasks = []
    asyncio.run(leave())
    assert len(engine.rerank(QUERY, DOCUMENTS, timeout_s=WAIT_S)) == 4


def test_two_devices_give_the_results_of_one(make):
    single, double = make(), make(device=["cpu", "cpu"], pack_tokens=300)
    assert double.logits(QUERY, SENTENCES[:60]) == pytest.approx(
        single.logits(QUERY, SENTENCES[:60]), abs=COMPANY
    )
    assert double.device == "cpu, cpu"
    assert double.settings.device == ("cpu", "cpu")


# Load


def test_past_the_limit_a_call_is_refused_at_once_and_many_requests_never_are(make, hold):
    engine = make(max_queued_pairs=10)
    gate = hold(engine)
    with ThreadPoolExecutor(2) as pool:
        # Larger than the limit, and let in since nothing else waits.
        big = pool.submit(engine.rerank, QUERY, LONG[:30])
        wait_for(lambda: len(engine._core._backlog))
        with pytest.raises(Overloaded, match="max_queued_pairs=10"):
            engine.rerank(QUERY, DOCUMENTS)
        many = pool.submit(engine.rerank_many, [(QUERY, SENTENCES[:20])] * 3)
        wait_for(lambda: engine.stats().requests >= 3)
        with pytest.raises(Overloaded):
            engine.rerank(QUERY, DOCUMENTS)
        gate.set()
        assert len(big.result(WAIT_S)) == 30
        assert [len(ranking) for ranking in many.result(WAIT_S)] == [20] * 3
    assert len(engine.rerank(QUERY, DOCUMENTS)) == 4


def test_warming_up_runs_every_device(make):
    engine = make(device=["cpu", "cpu"])
    packs: list[int] = []
    for place, worker in enumerate(engine._core.workers):
        worker.model.logits = counted(worker.model.logits, place, packs)
    engine.warm_up()
    assert sorted(packs) == [0, 1]
    assert engine.stats().requests == 1


def test_unlike_devices_have_each_their_own_budget_and_dtype(folder, monkeypatch):
    class Accelerated:
        """Stands for a model on an accelerator."""

        device, dtype = torch.device("cuda:0"), torch.float16
        streams, pack_tokens, runs_ahead = 1, 16_384, False

    load, made = loading.load_model, [Accelerated()]

    def load_one(*args, **options):
        return made.pop() if made else load(*args, **options)

    monkeypatch.setattr(loading, "load_model", load_one)
    with Reranker(folder, device=["cpu", "cpu"], dtype="float32") as engine:
        assert engine.device == "cuda:0, cpu"
        assert engine.dtype == "float16, float32"
        assert "dtype=float16, float32" in repr(engine)
        assert [worker.budget for worker in engine._core.workers] == [16_384, 2048]


def test_devices_of_one_dtype_name_it_once(make):
    assert make(device=["cpu", "cpu"]).dtype == "float32"


def counted(logits, place: int, packs: list[int]):
    def count(pairs):
        packs.append(place)
        return logits(pairs)

    return count


# Closing


def test_a_closed_engine_refuses_calls_and_may_be_closed_again(make):
    engine = make()
    assert not engine.closed
    engine.warm_up()
    engine.close()
    engine.close()
    assert engine.closed
    for call in (
        lambda: engine.rerank(QUERY, DOCUMENTS),
        lambda: engine.score(QUERY, DOCUMENTS),
        lambda: engine.score_pairs([(QUERY, "text")]),
        lambda: engine.rerank_many([(QUERY, DOCUMENTS)]),
        lambda: asyncio.run(engine.arerank(QUERY, DOCUMENTS)),
        lambda: asyncio.run(engine.arerank_many([(QUERY, DOCUMENTS)])),
        engine.warm_up,
    ):
        with pytest.raises(ClosedError, match="new Reranker"):
            call()


def test_callers_that_wait_hear_of_the_closing(make, hold):
    engine = make()
    gate = hold(engine)
    requests = [(QUERY, LONG[:20]), (QUERIES[1], LONG[:20])]

    async def ask() -> None:
        await engine.arerank(*requests[0])

    with ThreadPoolExecutor(7) as pool:
        calls = [pool.submit(engine.rerank, *requests[0]) for _ in range(3)]
        calls += [pool.submit(asyncio.run, ask()) for _ in range(2)]
        calls += [pool.submit(engine.rerank_many, requests)]
        wait_for(lambda: len(engine._core._backlog._jobs) == len(calls))
        closing = pool.submit(engine.close)
        # They hear of it at once, whatever the pack in the model still takes.
        for call in calls:
            assert isinstance(call.exception(WAIT_S), ClosedError)
        assert not closing.done()
        gate.set()
        closing.result(WAIT_S)


def test_a_context_manager_closes_it_even_on_an_error(folder):
    with Reranker(folder, device="cpu") as engine:
        assert len(engine.rerank(QUERY, DOCUMENTS)) == 4
    assert engine.closed
    failing = Reranker(folder, device="cpu")
    with pytest.raises(ZeroDivisionError), failing:
        _ = 1 / 0
    assert failing.closed


def test_closing_ends_the_threads(make):
    before = scoring_threads()
    engine = make(device=["cpu", "cpu"])
    asyncio.run(engine.arerank(QUERY, SENTENCES[:100]))
    assert scoring_threads() - before
    engine.close()
    wait_for(lambda: not scoring_threads() - before)


def test_a_handler_that_keeps_records_keeps_no_engine(caplog):
    caplog.set_level(logging.INFO, logger="bge_rerank_adapters")
    engine = Reranker("tiny", device="cpu", dtype="float32")
    gone = weakref.ref(engine)
    engine.close()
    del engine
    gc.collect()
    told = own_records(caplog, level=logging.INFO)
    assert [record.msg.split()[0] for record in told] == ["Loaded", "Closed"]
    assert gone() is None


def test_an_engine_that_is_dropped_takes_its_threads_along(folder):
    before = scoring_threads()
    engine = Reranker(folder, device="cpu", dtype="float32")
    engine.rerank(QUERY, DOCUMENTS)
    asyncio.run(engine.arerank(QUERY, DOCUMENTS))
    assert scoring_threads() - before
    gone, model = weakref.ref(engine), weakref.ref(engine._core.workers[0].model)
    del engine
    gc.collect()
    assert gone() is None
    wait_for(lambda: not scoring_threads() - before)
    gc.collect()
    assert model() is None, "the weights were to go with it"


# Copies, pickles and names


def test_pickling_carries_settings_and_no_token_and_rebuilds(folder):
    secret = "hf_" + "not-to-be-seen"
    with Reranker(folder, device="cpu", dtype="float32", max_length=77, token=secret) as engine:
        data = pickle.dumps(engine)
        assert secret.encode() not in data
        assert len(data) < 5000, "the weights are to stay behind"
        assert secret not in repr(engine) + repr(engine.settings) + repr(vars(engine))
        with pickle.loads(data) as other:  # noqa: S301 - made above
            assert other is not engine
            assert other.settings == engine.settings
            assert other.settings.max_length == 77
            assert other.logits(QUERY, DOCUMENTS) == engine.logits(QUERY, DOCUMENTS)


def test_a_copy_is_the_engine_itself(reranker):
    assert copy.deepcopy({"nested": [reranker]})["nested"][0] is reranker
    assert copy.copy(reranker) is reranker, "another model was loaded"


def test_the_repr_names_model_device_and_dtype_and_whether_it_is_closed(make, folder):
    engine = make()
    assert repr(engine) == f"Reranker({folder!r}, device=cpu, dtype=float32)"
    engine.close()
    assert repr(engine).endswith("closed)")


def test_a_path_is_a_model_too(folder):
    with Reranker(Path(folder), device="cpu") as engine:
        assert engine.settings.model == folder


# Sharing


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[EngineSettings]:
    """Return the settings of every engine that is loaded from here on."""
    loaded: list[EngineSettings] = []
    load = Reranker._set_up

    def slow_load(self: Reranker, given_settings: EngineSettings) -> None:
        loaded.append(given_settings)
        # Long enough for the other threads to ask meanwhile.
        time.sleep(0.2)
        load(self, given_settings)

    monkeypatch.setattr(Reranker, "_set_up", slow_load)
    return loaded


def test_ten_threads_that_ask_at_once_load_one_engine(folder, loads):
    start = threading.Barrier(10)

    def ask(_: int) -> Reranker:
        start.wait(WAIT_S)
        # Equal settings, each made anew.
        return shared_reranker(EngineSettings(model=folder, device="cpu", max_length=100))

    with ThreadPoolExecutor(10) as pool:
        engines = list(pool.map(ask, range(10), timeout=WAIT_S))
    assert len(loads) == 1
    assert len({id(engine) for engine in engines}) == 1
    assert len(engines[0].rerank(QUERY, DOCUMENTS)) == 4


def test_other_settings_load_another_engine_and_the_last_user_frees_it(folder, loads):
    first = EngineSettings(model=folder, device="cpu", max_length=101)
    other = EngineSettings(model=folder, device="cpu", max_length=102)
    one, two = shared_reranker(first), shared_reranker(other)
    assert one is not two
    assert shared_reranker(first) is one
    gone = weakref.ref(one)
    del one
    gc.collect()
    assert gone() is None
    assert len(loads) == 2
    again = shared_reranker(first)
    assert len(loads) == 3
    assert again.settings == first


def test_a_shared_engine_that_was_closed_is_loaded_again(folder, loads):
    wanted = EngineSettings(model=folder, device="cpu", max_length=103)
    closed = shared_reranker(wanted)
    closed.close()
    fresh = shared_reranker(wanted)
    assert fresh is not closed
    assert len(fresh.rerank(QUERY, DOCUMENTS)) == 4


def test_a_shared_engine_that_could_not_be_loaded_is_tried_again(tmp_path, loads):
    wanted = EngineSettings(model=str(tmp_path / "later"), device="cpu")
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            shared_reranker(wanted)
    build_xlm_roberta(tmp_path / "later")
    assert len(shared_reranker(wanted).rerank(QUERY, DOCUMENTS)) == 4


# Forks


def in_forked_child(ask: Callable[[], object]) -> str:
    """Run `ask` in a forked child and return its outcome; fail if it hangs."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            outcome = f"gave {ask()}"
        except BaseException as error:  # noqa: BLE001 - the parent is to see it
            outcome = f"{type(error).__name__}: {error}"
        os.write(writing, outcome.encode())
        os._exit(0)
    os.close(writing)
    killer = threading.Timer(100, os.kill, (pid, 9))
    killer.start()
    with os.fdopen(reading) as pipe:
        outcome = pipe.read()
    killer.cancel()
    os.waitpid(pid, 0)
    return outcome or "hung"


@pytest.mark.skipif(sys.platform != "linux", reason="forks are for Linux")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_is_told_to_make_its_own_engine_by_either_method(make):
    engine = make()
    engine.rerank(QUERY, DOCUMENTS)
    asyncio.run(engine.arerank(QUERY, DOCUMENTS))
    for ask in (
        lambda: engine.rerank(QUERY, DOCUMENTS),
        lambda: asyncio.run(engine.arerank(QUERY, DOCUMENTS)),
    ):
        outcome = in_forked_child(ask)
        assert outcome.startswith(WorkerDiedError.__name__), outcome
        assert "forked" in outcome
        assert "in the new process" in outcome
    assert len(engine.rerank(QUERY, DOCUMENTS)) == 4
