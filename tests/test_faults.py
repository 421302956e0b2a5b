"""An engine under load while one of its parts fails: the right callers hear the right cause.

Threads and tasks ask at once, from a table of pairs whose logits are known. Whatever is injected,
each call ends with exactly its own scores or with an error that names what happened, nothing
hangs, and the engine serves the next call.
"""

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bge_rerank_adapters import (
    ClosedError,
    NonFiniteLogitError,
    RankedDocument,
    Reranker,
    RerankTimeoutError,
    ScoringError,
    WorkerDiedError,
)
from bge_rerank_adapters.engine.text.pairs import TokenPair
from tests.checkpoints import build_xlm_roberta, read_queries, read_sentences

pytestmark = pytest.mark.timeout(120)

QUERIES = list(read_queries().values())[:4]
TEXTS = [text[:120] for text in list(read_sentences().values())[:40]]
THREADS, TASKS, CALLS = 8, 8, 8
COMPANY = 1e-5

Fault = Callable[[Sequence[TokenPair]], None]
# What a call ended with: None where it got exactly what it should.
Outcome = BaseException | None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_xlm_roberta(tmp_path_factory.mktemp("faults") / "checkpoint"))


@pytest.fixture(scope="module")
def table(folder: str) -> dict[tuple[str, str], float]:
    with Reranker(folder, device="cpu", dtype="float32") as engine:
        return {
            (query, text): logit
            for query in QUERIES
            for text, logit in zip(TEXTS, engine.logits(query, TEXTS), strict=True)
        }


@pytest.fixture
def engine(folder: str) -> Iterator[Reranker]:
    with Reranker(folder, device="cpu", dtype="float32", pack_tokens=400) as made:
        yield made


class FailingModel:
    """The engine's model, after what `fault` does."""

    def __init__(self, engine: Reranker, fault: Fault) -> None:
        self.model, self.fault = engine._core.workers[0].model, fault
        self.device, self.dtype = self.model.device, self.model.dtype
        self.streams, self.pack_tokens = self.model.streams, self.model.pack_tokens
        engine._core.workers[0].model = self

    def logits(self, pairs: Sequence[TokenPair]) -> list[float]:
        self.fault(pairs)
        return self.model.logits(pairs)


class Load:
    """Calls of random sizes from threads and tasks, each checked against the table."""

    def __init__(self, engine: Reranker, table: dict[tuple[str, str], float]) -> None:
        self.engine, self.table = engine, table
        self.lock = threading.Lock()
        self.outcomes: list[Outcome] = []
        self.texts: list[list[str]] = []

    def run(self, *, meanwhile: Callable[[], object] = lambda: None) -> list[Outcome]:
        """Return how each call ended."""
        with ThreadPoolExecutor(THREADS + 1) as pool:
            threads = [pool.submit(self._ask, seed) for seed in range(THREADS)]
            tasks = pool.submit(asyncio.run, self._ask_all())
            meanwhile()
            for each in [*threads, tasks]:
                each.result(100)
        assert len(self.outcomes) == (THREADS + TASKS) * CALLS, "none lost, none doubled"
        return self.outcomes

    def _ask(self, seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(CALLS):
            query, texts = self._draw(dice)
            try:
                self._end(query, texts, self.engine.rerank(query, texts))
            except Exception as error:  # noqa: BLE001 - looked at by the tests
                self._end(query, texts, error)

    async def _ask_all(self) -> None:
        await asyncio.gather(*(self._aask(100 + seed) for seed in range(TASKS)))

    async def _aask(self, seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(CALLS):
            query, texts = self._draw(dice)
            try:
                self._end(query, texts, await self.engine.arerank(query, texts))
            except Exception as error:  # noqa: BLE001 - looked at by the tests
                self._end(query, texts, error)

    def _draw(self, dice: random.Random) -> tuple[str, list[str]]:
        return dice.choice(QUERIES), dice.choices(TEXTS, k=dice.choice([1, 1, 3, 10, 30]))

    def _end(self, query: str, texts: list[str], end: Exception | list[RankedDocument]) -> None:
        if isinstance(end, list):
            check(self.table, query, texts, end)
        with self.lock:
            self.outcomes.append(end if isinstance(end, Exception) else None)
            self.texts.append(texts)


def check(
    table: dict[tuple[str, str], float],
    query: str,
    texts: list[str],
    ranking: list[RankedDocument],
) -> None:
    assert sorted(result.index for result in ranking) == list(range(len(texts)))
    for result in ranking:
        assert result.text == texts[result.index]
        assert result.logit == pytest.approx(table[query, result.text], abs=COMPANY)


def assert_works(engine: Reranker, table: dict[tuple[str, str], float]) -> None:
    check(table, QUERIES[0], TEXTS, engine.rerank(QUERIES[0], TEXTS, timeout_s=60))
    assert engine.stats().queued_pairs == 0


def tokenized(engine: Reranker, texts: list[str]) -> list[TokenPair]:
    """Return the pairs of all queries with some texts as the model gets them."""
    pairs = [(query, text) for query in QUERIES for text in texts]
    return engine._calls._tokenizer.tokenize(pairs).distinct


def kinds(outcomes: list[Outcome]) -> Counter[type]:
    return Counter(type(outcome) for outcome in outcomes)


def test_without_a_fault_every_call_gets_its_own_scores(engine, table):
    assert kinds(Load(engine, table).run()) == {type(None): (THREADS + TASKS) * CALLS}
    assert_works(engine, table)


def test_a_tokenizer_that_fails_on_some_texts(engine, table, monkeypatch):
    tokenize = engine._calls._tokenizer.tokenize

    def failing(pairs: list[tuple[str, str]]) -> object:
        if any(text == TEXTS[7] for _, text in pairs):
            raise RuntimeError("Already borrowed")
        return tokenize(pairs)

    monkeypatch.setattr(engine._calls._tokenizer, "tokenize", failing)
    outcomes = Load(engine, table).run()
    assert set(kinds(outcomes)) == {type(None), ScoringError}
    for outcome in filter(None, outcomes):
        assert "The tokenizer failed" in str(outcome)
        assert "Already borrowed" in str(outcome)
        assert isinstance(outcome.__cause__, RuntimeError)
    monkeypatch.undo()
    assert_works(engine, table)


def test_a_forward_pass_that_fails_once(engine, table):
    causes = [ValueError("once")]

    def fault(_: Sequence[TokenPair]) -> None:
        if causes:
            raise causes.pop()

    FailingModel(engine, fault)
    outcomes = Load(engine, table).run()
    failed = [outcome for outcome in outcomes if outcome is not None]
    # None where several calls shared the pack: each of them was tried again alone.
    assert len(failed) <= 1
    assert all(isinstance(outcome.__cause__, ValueError) for outcome in failed)
    assert_works(engine, table)


def test_a_pair_on_which_the_model_fails_reaches_its_own_callers_alone(engine, table):
    bad = [each.ids.tolist() for each in tokenized(engine, [TEXTS[5]])]

    def fault(pairs: Sequence[TokenPair]) -> None:
        if any(pair.ids.tolist() in bad for pair in pairs):
            raise ValueError("a bad pair")

    FailingModel(engine, fault)
    load = Load(engine, table)
    assert set(kinds(load.run())) == {type(None), ScoringError}
    for texts, outcome in zip(load.texts, load.outcomes, strict=True):
        assert (TEXTS[5] in texts) is isinstance(outcome, ScoringError)


def test_a_forward_pass_that_always_fails(engine, table):
    def fault(_: Sequence[TokenPair]) -> None:
        raise ValueError("always")

    model = FailingModel(engine, fault)
    outcomes = Load(engine, table).run()
    assert kinds(outcomes) == {ScoringError: (THREADS + TASKS) * CALLS}
    assert all("always" in str(outcome) for outcome in outcomes)
    assert engine.stats().packs == 0
    model.fault = lambda _: None
    assert_works(engine, table)


def test_too_little_memory_for_some_sizes(engine, table):
    sizes: list[int] = []

    def fault(pairs: Sequence[TokenPair]) -> None:
        sizes.append(sum(map(len, pairs)))
        if len(pairs) > 1 and sizes[-1] > 150:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    FailingModel(engine, fault)
    assert kinds(Load(engine, table).run()) == {type(None): (THREADS + TASKS) * CALLS}
    too_large = sum(size > 150 for size in sizes)
    assert too_large < 0.2 * len(sizes), "later packs are to be small enough at once"
    assert_works(engine, table)


def test_nan_for_one_document(engine, table, monkeypatch):
    model = engine._core.workers[0].model
    logits = model.logits
    bad = tokenized(engine, [TEXTS[5]])

    def spoiled(pairs: Sequence[TokenPair]) -> list[float]:
        scored = logits(pairs)
        for position, pair in enumerate(pairs):
            if any(pair.ids.tolist() == each.ids.tolist() for each in bad):
                scored[position] = float("nan")
        return scored

    monkeypatch.setattr(model, "logits", spoiled)
    outcomes = Load(engine, table).run()
    assert set(kinds(outcomes)) == {type(None), NonFiniteLogitError}
    with pytest.raises(NonFiniteLogitError, match=r"nan for documents\[2\]"):
        engine.rerank(QUERIES[0], [TEXTS[1], TEXTS[2], TEXTS[5]])
    with pytest.raises(NonFiniteLogitError, match=r"nan for pairs\[1\]"):
        engine.score_pairs([(QUERIES[0], TEXTS[1]), (QUERIES[0], TEXTS[5])])
    monkeypatch.undo()
    assert_works(engine, table)


def test_nan_among_many_requests_is_named_by_request_and_document(engine, monkeypatch):
    import bge_rerank_adapters.engine.queue.calls as calls_module

    monkeypatch.setattr(calls_module, "_PIECE_PAIRS", 4)
    logits = engine._core.workers[0].model.logits
    bad = engine._calls._tokenizer.tokenize([(QUERIES[1], TEXTS[5])]).distinct[0].ids.tolist()

    def spoiled(pairs: Sequence[TokenPair]) -> list[float]:
        scored = logits(pairs)
        return [
            float("nan") if pair.ids.tolist() == bad else logit
            for pair, logit in zip(pairs, scored, strict=True)
        ]

    monkeypatch.setattr(engine._core.workers[0].model, "logits", spoiled)
    requests = [(QUERIES[0], TEXTS[:3]) for _ in range(6)]
    requests += [(QUERIES[0], []), (QUERIES[1], [TEXTS[0], TEXTS[5]])]
    with pytest.raises(NonFiniteLogitError, match=r"requests\[7\], documents\[1\]"):
        engine.rerank_many(requests)


@pytest.mark.parametrize(
    ("stage", "ending"),
    [
        ("model", SystemExit("over")),
        ("model", KeyboardInterrupt()),
        ("queue", SystemExit("over")),
        ("queue", MemoryError()),
        ("bookkeeping", MemoryError()),
    ],
)
def test_the_scoring_thread_ends(engine, table, monkeypatch, stage, ending):
    endings = [ending]
    owner, name = {
        "model": (engine._core.workers[0].model, "logits"),
        "queue": (engine._core._backlog._queue, "take"),
        "bookkeeping": (engine._core.workers[0], "_store"),
    }[stage]
    method = getattr(owner, name)

    def failing(*args: object, **options: object) -> object:
        result = method(*args, **options)
        # After the pairs have left the queue, and after some calls that went well.
        if endings and engine.stats().packs > 3 and result != []:
            raise endings.pop()
        return result

    monkeypatch.setattr(owner, name, failing)
    outcomes = Load(engine, table).run()
    assert endings == []
    failed = [outcome for outcome in outcomes if outcome is not None]
    assert 1 <= len(failed) <= THREADS + TASKS
    for outcome in failed:
        assert isinstance(outcome, WorkerDiedError)
        assert outcome.__cause__ is ending
    assert_works(engine, table)


def test_cancelling_at_random_moments(engine, table):
    dice = random.Random(3)

    async def ask_and_cancel() -> Counter[str]:
        ends: Counter[str] = Counter()
        for _ in range(150):
            texts = dice.choices(TEXTS, k=20)
            task = asyncio.create_task(engine.arerank(QUERIES[0], texts))
            await asyncio.sleep(dice.choice([0, 0, 0.001, 0.003, 0.01, 0.03]))
            task.cancel()
            try:
                check(table, QUERIES[0], texts, await task)
                ends["scored"] += 1
            except asyncio.CancelledError:
                ends["cancelled"] += 1
        return ends

    with ThreadPoolExecutor(1) as pool:
        cancelling = pool.submit(asyncio.run, ask_and_cancel())
        assert kinds(Load(engine, table).run()) == {type(None): (THREADS + TASKS) * CALLS}
        assert cancelling.result(100)["cancelled"] > 0
    assert_works(engine, table)


def test_timeouts_at_random_moments(engine, table):
    dice = random.Random(4)

    def ask(_: int) -> str:
        texts = dice.choices(TEXTS, k=30)
        try:
            ranking = engine.rerank(QUERIES[0], texts, timeout_s=dice.choice([1e-4, 3e-3, 0.01]))
        except RerankTimeoutError:
            return "timed out"
        check(table, QUERIES[0], texts, ranking)
        return "scored"

    with ThreadPoolExecutor(4) as pool:
        assert "timed out" in set(pool.map(ask, range(100), timeout=100))
    assert_works(engine, table)


@pytest.mark.parametrize("packs", [0, 1, 8])
def test_closing_in_mid_flight(engine, table, packs):
    reached = threading.Event()

    def fault(_: Sequence[TokenPair]) -> None:
        if engine.stats().packs >= packs:
            reached.set()
            # A slow machine is not to be done with all calls before the engine is closed.
            while not engine.closed:
                time.sleep(0.001)

    def close_when_busy() -> None:
        assert reached.wait(60)
        engine.close()

    FailingModel(engine, fault)
    outcomes = Load(engine, table).run(meanwhile=close_when_busy)
    assert set(kinds(outcomes)) <= {type(None), ClosedError}
    assert kinds(outcomes)[ClosedError] > 0
    assert engine.stats().queued_pairs == 0


def test_two_devices_of_which_one_keeps_dying(folder, table):
    def fault(_: Sequence[TokenPair]) -> None:
        raise SystemExit

    with Reranker(folder, device=["cpu", "cpu"], pack_tokens=400, dtype="float32") as engine:
        model = FailingModel(engine, fault)
        outcomes = Load(engine, table).run()
        assert set(kinds(outcomes)) <= {type(None), WorkerDiedError}
        model.fault = lambda _: None
        assert_works(engine, table)


def test_two_devices_give_every_call_its_own_scores(folder, table):
    with Reranker(folder, device=["cpu", "cpu"], pack_tokens=100, dtype="float32") as engine:
        assert kinds(Load(engine, table).run()) == {type(None): (THREADS + TASKS) * CALLS}
        assert_works(engine, table)
