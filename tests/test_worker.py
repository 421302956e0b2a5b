"""The scoring threads with models that fail on purpose: no caller hangs, none hears of others'."""

import random
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from threading import Event

import numpy as np
import pytest
import torch

from bge_rerank_adapters import (
    ClosedError,
    NonFiniteLogitError,
    Overloaded,
    ScoringError,
    WorkerDiedError,
)
from bge_rerank_adapters.engine.queue import worker as worker_module
from bge_rerank_adapters.engine.queue.core import ScoringCore
from bge_rerank_adapters.engine.queue.packs import Job
from bge_rerank_adapters.engine.text.pairs import TokenPair

TOKENS = 4
ONE_PAIR = TOKENS
MANY_PAIRS = 1000 * TOKENS
# Long enough for a machine that is busy with other things; nothing here takes as long.
WAIT_S = 60
BAD = 666

Fault = Callable[[list[int]], None]


def pairs(*ids: int) -> list[TokenPair]:
    """Return pairs that `FakeModel` gives their own id as a logit; `index` is the position."""
    return [
        TokenPair(np.full(TOKENS, each, dtype=np.int64), 1, truncated=False, index=position)
        for position, each in enumerate(ids)
    ]


class FakeModel:
    """Gives each pair its id as its logit, after what `fault` does; can be held up."""

    device = torch.device("cpu")
    dtype = torch.float32
    streams = 1
    pack_tokens = MANY_PAIRS
    runs_ahead = False

    def __init__(self, fault: Fault = lambda _: None, logits: dict[int, float] | None = None):
        self.fault = fault
        self.odd_logits = logits or {}
        self.packs: list[list[int]] = []
        self.scored: list[int] = []
        self.threads: set[int | None] = set()
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def logits(self, pack: Sequence[TokenPair]) -> list[float]:
        ids, gate = [int(pair.ids[0]) for pair in pack], self.gate
        self.packs.append(ids)
        self.threads.add(threading.current_thread().native_id)
        self.entered.set()
        assert gate.wait(WAIT_S)
        self.fault(ids)
        self.scored += ids
        return [self.odd_logits.get(each, float(each)) for each in ids]

    def hold(self) -> None:
        """Let the next pack begin and wait in the model until `gate` is set."""
        self.entered.clear()
        self.gate.clear()

    def hold_next(self) -> None:
        """Let the pack that waits in the model go on, and hold the one after it."""
        let_go, self.gate = self.gate, threading.Event()
        self.entered.clear()
        let_go.set()


class Cores:
    """Makes cores and closes them at the end of the test."""

    def __init__(self) -> None:
        self.made: list[tuple[ScoringCore, list[FakeModel]]] = []

    def __call__(
        self,
        *models: FakeModel,
        pack_tokens: int | None = None,
        max_queued_pairs: int = 100_000,
    ) -> ScoringCore:
        core = ScoringCore(models, pack_tokens=pack_tokens, max_queued_pairs=max_queued_pairs)
        self.made.append((core, list(models)))
        return core


@pytest.fixture
def make_core() -> Iterator[Cores]:
    cores = Cores()
    yield cores
    for core, models in cores.made:
        for model in models:
            model.gate.set()
        core.close()


def failure(future: Future[list[float]]) -> BaseException:
    error = future.exception(WAIT_S)
    assert error is not None, f"expected an error, got {future.result()}"
    return error


def submit(core: ScoringCore, some: list[TokenPair], *, bounded: bool = True) -> Job[TokenPair]:
    job = Job(some)
    core.reserve(job.future, len(some), bounded=bounded)
    core.submit(job)
    return job


def hold_up(core: ScoringCore, model: FakeModel, *ids: int) -> Future[list[float]]:
    """Submit a job and return once the model is busy with its first pack."""
    model.hold()
    future = submit(core, pairs(*(ids or (1,)))).future
    assert model.entered.wait(WAIT_S)
    return future


def note_done(jobs: dict[str, Future[list[float]]], note: Callable[[str], object]) -> Event:
    """Call `note` with the name of each future that is done; set the event after the last one.

    A caller of `result` may go on before a future's callbacks have run.
    """
    left, all_done = set(jobs), threading.Event()

    def done(name: str) -> None:
        note(name)
        left.discard(name)
        if not left:
            all_done.set()

    for name, future in jobs.items():
        future.add_done_callback(lambda _, name=name: done(name))
    return all_done


def fail_on_bad(error: BaseException) -> Fault:
    def fault(ids: list[int]) -> None:
        if BAD in ids:
            raise error

    return fault


# Scoring


def test_logits_come_back_in_the_order_of_the_pairs_whatever_order_they_run_in(make_core):
    model = FakeModel()
    core = make_core(model, pack_tokens=3 * TOKENS)
    longer_first = [
        TokenPair(np.full(tokens, each, dtype=np.int64), 1, truncated=False, index=each)
        for each, tokens in enumerate([1, 9, 3, 12, 2, 7])
    ]
    assert submit(core, longer_first).future.result(WAIT_S) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert model.scored != sorted(model.scored)
    assert len(model.packs) > 1


def test_two_devices_run_at_the_same_time(make_core):
    # Neither pack gets past the barrier before the other device has begun its own.
    barrier = threading.Barrier(2)
    models = [FakeModel(lambda _: barrier.wait(WAIT_S) and None) for _ in range(2)]
    core = make_core(*models, pack_tokens=ONE_PAIR)
    assert submit(core, pairs(5, 6, 7, 8)).future.result(WAIT_S) == [5.0, 6.0, 7.0, 8.0]
    assert sorted(models[0].scored + models[1].scored) == [5, 6, 7, 8]
    assert len(models[0].scored) == 2


def test_warming_up_runs_every_stream_of_every_device_and_no_other_takes_its_pairs(make_core):
    quick, slow = FakeModel(), FakeModel()
    quick.streams = 3
    core = make_core(quick, slow)
    core.warm_up(pairs(1)[0])
    assert [quick.packs, slow.packs] == [[[1, 1, 1]], [[1]]]
    quick.fault = fail_on_bad(RuntimeError("no such kernel"))
    with pytest.raises(ScoringError, match="no such kernel"):
        core.warm_up(pairs(BAD)[0])
    assert core.stats().queued_pairs == 0
    assert submit(core, pairs(5)).future.result(WAIT_S) == [5.0]


def test_each_device_has_the_budget_and_the_multiple_of_its_own_model(make_core):
    models = [FakeModel(), FakeModel()]
    models[0].pack_tokens, models[0].streams = 8 * TOKENS, 1
    models[1].pack_tokens, models[1].streams = 5 * TOKENS, 2
    core = make_core(*models)
    for model in models:
        model.hold()
    calls = [submit(core, pairs(*range(40))).future]
    assert all(model.entered.wait(WAIT_S) for model in models)
    assert [len(model.packs[0]) for model in models] == [8, 4]
    for model in models:
        model.gate.set()
    assert calls[0].result(WAIT_S) == list(range(40))


def test_a_budget_that_the_user_gives_is_that_of_every_device(make_core):
    models = [FakeModel(), FakeModel()]
    core = make_core(*models, pack_tokens=3 * TOKENS)
    assert submit(core, pairs(*range(40))).future.result(WAIT_S) == list(range(40))
    assert max(len(pack) for model in models for pack in model.packs) == 3


def test_a_device_short_of_memory_leaves_the_budget_of_others(make_core):
    failed = threading.Event()

    def fault(ids: list[int]) -> None:
        # Each waits for the other, so that both have some of the pairs.
        assert ample.entered.wait(WAIT_S)
        if len(ids) > 2:
            failed.set()
            raise torch.OutOfMemoryError

    short, ample = FakeModel(fault), FakeModel(lambda _: failed.wait(WAIT_S) and None)
    core = make_core(short, ample, pack_tokens=8 * TOKENS)
    # Few enough that the short one's budget has not grown again by the end.
    assert submit(core, pairs(*range(24))).future.result(WAIT_S) == list(range(24))
    assert core.workers[0].budget < core.workers[1].budget == 8 * TOKENS


def test_a_small_job_overtakes_the_rest_of_a_big_one(make_core):
    model = FakeModel()
    core = make_core(model, pack_tokens=ONE_PAIR)
    big = hold_up(core, model, *range(1000))
    small = submit(core, pairs(2001, 2002, 2003)).future
    done_after: list[int] = []
    told = note_done({"small": small}, lambda _: done_after.append(len(model.scored)))
    model.gate.set()
    assert small.result(WAIT_S) == [2001.0, 2002.0, 2003.0]
    assert told.wait(WAIT_S)
    # The pack under way, its own three, and at most one for the job that has waited longest.
    assert done_after[0] <= 5
    assert len(big.result(WAIT_S)) == 1000


# Out of memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
    ids=["torch", "python", "cpu allocator"],
)
def test_out_of_memory_once_splits_the_pack_and_scores_every_pair_once(make_core, error):
    failures = [error]

    def fault(ids: list[int]) -> None:
        if failures:
            raise failures.pop()

    model = FakeModel(fault)
    ids = list(range(10, 19))
    assert submit(make_core(model), pairs(*ids)).future.result(WAIT_S) == [float(i) for i in ids]
    assert [len(pack) for pack in model.packs] == [9, 4, 5]
    assert sorted(model.scored) == ids


def test_a_pack_is_halved_until_it_fits_even_if_that_is_a_single_pair(make_core):
    def fault(ids: list[int]) -> None:
        if len(ids) > 1:
            raise torch.OutOfMemoryError

    model = FakeModel(fault)
    assert submit(make_core(model), pairs(*range(8))).future.result(WAIT_S) == list(range(8))
    assert sorted(model.scored) == list(range(8))


def test_a_pair_that_does_not_fit_alone_fails_with_its_cause_and_the_next_job_runs(make_core):
    cause = torch.OutOfMemoryError("no room")
    core = make_core(FakeModel(fail_on_bad(cause)))
    error = failure(submit(core, pairs(1, BAD, 3)).future)
    assert isinstance(error, ScoringError)
    assert error.__cause__ is cause
    assert submit(core, pairs(4)).future.result(WAIT_S) == [4.0]


def test_what_the_failed_pass_held_is_given_back_before_the_halves_run(make_core):
    class Tensor:
        """Stands for memory of the device."""

    held: list[weakref.ref] = []

    def fault(ids: list[int]) -> None:
        assert [each() for each in held if each()] == [], "the failed pass still holds its tensors"
        states = Tensor()
        held.append(weakref.ref(states))
        if len(ids) > 2:
            raise torch.OutOfMemoryError

    submit(make_core(FakeModel(fault)), pairs(*range(8))).future.result(WAIT_S)
    assert len(held) > 4


def test_after_a_lack_of_memory_packs_are_smaller_and_grow_again(make_core, caplog):
    def fault(ids: list[int]) -> None:
        if short and len(ids) > 3:
            raise torch.OutOfMemoryError

    short, model = [True], FakeModel(fault)
    core = make_core(model, pack_tokens=8 * TOKENS)
    submit(core, pairs(*range(100))).future.result(WAIT_S)
    assert [len(pack) for pack in model.packs[:3]] == [8, 4, 2]
    failed = sum(len(pack) > 3 for pack in model.packs)
    assert failed < 8, "not one for each of the packs that follow"
    assert "too little memory for a pack of 8 pairs and 32 tokens" in caplog.text
    short.clear()
    model.packs.clear()
    submit(core, pairs(*range(1000))).future.result(WAIT_S)
    assert max(map(len, model.packs)) == len(model.packs[-2]) == 8


def test_a_model_that_gives_too_few_logits_fails_its_pack_alone(make_core):
    model = FakeModel()
    core = make_core(model)
    give = model.logits
    model.logits = lambda pack: give(pack)[1:]
    assert isinstance(failure(submit(core, pairs(1, 2)).future), ScoringError)
    model.logits = give
    assert submit(core, pairs(3)).future.result(WAIT_S) == [3.0]
    assert len(model.threads) == 1


# Errors of the model


def test_an_error_reaches_the_jobs_of_its_pack_alone_and_names_its_cause(make_core):
    cause = ValueError("a bad pair")
    model = FakeModel(fail_on_bad(cause))
    core = make_core(model, pack_tokens=ONE_PAIR)
    first = hold_up(core, model, 1, 2, 3)
    bad = submit(core, pairs(BAD)).future
    last = submit(core, pairs(4, 5)).future
    model.gate.set()
    error = failure(bad)
    assert isinstance(error, ScoringError)
    assert error.__cause__ is cause
    assert "ValueError" in str(error)
    assert "a bad pair" in str(error)
    assert first.result(WAIT_S) == [1.0, 2.0, 3.0]
    assert last.result(WAIT_S) == [4.0, 5.0]
    assert submit(core, pairs(6)).future.result(WAIT_S) == [6.0]
    assert len(model.threads) == 1


def test_of_calls_that_share_a_failing_pack_only_the_one_to_blame_hears_of_it(make_core):
    model = FakeModel(fail_on_bad(ValueError("a bad pair")))
    core = make_core(model)
    held = hold_up(core, model)
    sharing = [submit(core, pairs(*ids)).future for ids in ((7,), (BAD, 10), (8, 9))]
    model.gate.set()
    assert held.result(WAIT_S) == [1.0]
    assert sharing[0].result(WAIT_S) == [7.0]
    assert isinstance(failure(sharing[1]), ScoringError)
    assert sharing[2].result(WAIT_S) == [8.0, 9.0]
    # All together, then each call's alone, and no more.
    assert sorted(map(sorted, model.packs[1:])) == [[7], [7, 8, 9, 10, BAD], [8, 9], [10, BAD]]


def test_calls_of_a_pack_that_all_fail_each_hear_of_it_once(make_core):
    def fault(ids: list[int]) -> None:
        if ids != [1]:
            raise ValueError("a bad model")

    model = FakeModel(fault)
    core = make_core(model)
    hold_up(core, model)
    sharing = [submit(core, pairs(*ids)).future for ids in ((7,), (8, 9), (10,), (11,))]
    model.gate.set()
    errors = [failure(future) for future in sharing]
    assert all(isinstance(error, ScoringError) for error in errors)
    # Each has its own, since raising one in two threads would mix their tracebacks.
    assert len({id(error) for error in errors}) == 4
    assert len(model.packs) == 1 + 1 + 4


def test_calls_given_up_while_their_pack_failed_are_not_tried_again(make_core):
    model = FakeModel(fail_on_bad(ValueError("a bad pair")))
    core = make_core(model)
    sharing: list[Future[list[float]]] = []
    held = hold_up(core, model)
    sharing += [submit(core, pairs(*ids)).future for ids in ((7,), (BAD,))]
    model.hold_next()
    assert held.result(WAIT_S) == [1.0]
    assert model.entered.wait(WAIT_S)
    assert sharing[0].cancel()
    model.gate.set()
    assert isinstance(failure(sharing[1]), ScoringError)
    assert sorted(map(sorted, model.packs[1:])) == [[7, BAD], [BAD]]


def test_the_rest_of_a_failed_job_is_not_scored(make_core):
    model = FakeModel(fail_on_bad(ValueError("a bad pair")))
    core = make_core(model, pack_tokens=ONE_PAIR)
    # Of equal length, pairs are taken from the end.
    failure(submit(core, pairs(*range(50), BAD)).future)
    assert submit(core, pairs(100)).future.result(WAIT_S) == [100.0]
    assert len(model.scored) <= 3


@pytest.mark.parametrize("logit", [float("nan"), float("inf"), float("-inf")])
def test_a_logit_that_is_no_number_names_its_pair_and_fails_that_job_alone(make_core, logit):
    model = FakeModel(logits={BAD: logit})
    core = make_core(model)
    held = hold_up(core, model)
    good, bad = submit(core, pairs(4, 5)).future, submit(core, pairs(6, 7, 8, BAD, 9)).future
    model.gate.set()
    error = failure(bad)
    assert isinstance(error, NonFiniteLogitError)
    assert "index 3" in str(error)
    assert str(logit) in str(error)
    assert "float32" in str(error)
    assert good.result(WAIT_S) == [4.0, 5.0]
    assert held.result(WAIT_S) == [1.0]
    assert any({4, BAD} <= set(pack) for pack in model.packs), "they were to share a pack"


# The end of a thread


@pytest.mark.parametrize("ending", [SystemExit("over"), KeyboardInterrupt()])
def test_when_the_thread_dies_all_who_wait_hear_of_it_and_the_next_job_starts_another(
    make_core, ending
):
    model = FakeModel(fail_on_bad(ending))
    core = make_core(model, pack_tokens=ONE_PAIR)
    running = hold_up(core, model, BAD)
    waiting = [submit(core, pairs(1, 2)).future, submit(core, pairs(3)).future]
    model.gate.set()
    for future in [running, *waiting]:
        error = failure(future)
        assert isinstance(error, WorkerDiedError)
        assert error.__cause__ is ending
        assert type(ending).__name__ in str(error)
    assert submit(core, pairs(4)).future.result(WAIT_S) == [4.0]
    assert len(model.threads) == 2
    assert not core.closed


def test_a_thread_that_dies_leaves_the_other_device_working(make_core):
    broken, sound = FakeModel(fail_on_bad(SystemExit())), FakeModel()
    core = make_core(broken, sound, pack_tokens=ONE_PAIR)
    outcomes = []
    for _ in range(20):
        try:
            outcomes.append(submit(core, pairs(BAD)).future.result(WAIT_S))
        except WorkerDiedError:
            outcomes.append(None)
    assert all(outcome in (None, [float(BAD)]) for outcome in outcomes)
    assert submit(core, pairs(1, 2, 3)).future.result(WAIT_S) == [1.0, 2.0, 3.0]


def test_what_is_not_finite_is_not_handed_out_by_the_device_that_is_done_last(
    make_core, monkeypatch
):
    telling, tell = threading.Event(), threading.Event()
    told = worker_module.fail

    def slow_fail(future, error, cause=None):
        telling.set()
        tell.wait(WAIT_S)
        told(future, error, cause=cause)

    def wait_for_the_other(ids: list[int]) -> None:
        if ids == [1]:
            telling.wait(WAIT_S)

    monkeypatch.setattr(worker_module, "fail", slow_fail)
    models = [FakeModel(wait_for_the_other, logits={BAD: float("nan")}) for _ in range(2)]
    core = make_core(*models, pack_tokens=ONE_PAIR)
    future = submit(core, pairs(BAD, 1)).future
    assert telling.wait(WAIT_S)
    # Scored by the other device, which is therefore done with the pair before it.
    assert submit(core, pairs(2)).future.result(WAIT_S) == [2.0]
    tell.set()
    assert isinstance(failure(future), NonFiniteLogitError)


def test_every_future_resolves_under_random_faults_from_many_threads(make_core):
    dice = random.Random(7)

    def fault(ids: list[int]) -> None:
        roll = dice.random()
        if roll < 0.1:
            raise ValueError("by chance")
        if roll < 0.2:
            raise torch.OutOfMemoryError
        if roll < 0.25:
            raise SystemExit

    models = [FakeModel(fault, logits={BAD: float("nan")}) for _ in range(2)]
    core = make_core(*models, pack_tokens=5 * TOKENS)
    outcomes: list[object] = []

    def ask(seed: int) -> None:
        own = random.Random(seed)
        for _ in range(25):
            ids = [own.choice([1, 2, 3, BAD]) for _ in range(own.randint(1, 12))]
            future = submit(core, pairs(*ids)).future
            error = future.exception(WAIT_S)
            outcomes.append(error or future.result() == [float(each) for each in ids])

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(outcomes) == 8 * 25
    assert {type(outcome) for outcome in outcomes} == {
        bool,
        ScoringError,
        NonFiniteLogitError,
        WorkerDiedError,
    }
    assert False not in outcomes


# Closing


def test_stop_fails_what_runs_and_what_waits_at_once_and_the_thread_ends(make_core):
    model = FakeModel()
    core = make_core(model, pack_tokens=ONE_PAIR)
    running = hold_up(core, model, 1)
    waiting = submit(core, pairs(3, 4)).future
    core.stop()
    # The model is still held up: nobody waits for it.
    assert isinstance(failure(running), ClosedError)
    assert isinstance(failure(waiting), ClosedError)
    assert core.closed
    model.gate.set()
    threads = [worker.thread for worker in core.workers]
    core.close()
    assert not any(thread.is_alive() for thread in threads)
    assert model.scored == [1]


def test_close_before_the_first_job_and_again_is_harmless_and_later_jobs_are_refused(make_core):
    core = make_core(FakeModel())
    core.close()
    core.close()
    with pytest.raises(ClosedError, match="new Reranker"):
        submit(core, pairs(1))


def test_close_from_the_scoring_thread_itself_does_not_wait_for_itself(make_core):
    core = make_core(FakeModel())
    closed_from: list[str] = []
    closed = threading.Event()

    def close(_: object) -> None:
        core.close()
        closed_from.append(threading.current_thread().name)
        closed.set()

    held = hold_up(core, core.workers[0].model, 1)
    held.add_done_callback(close)
    model = core.workers[0].model
    model.gate.set()
    assert held.result(WAIT_S) == [1.0]
    assert closed.wait(WAIT_S)
    assert closed_from[0].startswith("bge-rerank")


# Cancelling and refusing


def test_pairs_of_a_cancelled_future_are_not_scored(make_core):
    model = FakeModel()
    core = make_core(model, pack_tokens=ONE_PAIR)
    held = hold_up(core, model)
    cancelled = submit(core, pairs(7, 8, 9)).future
    kept = submit(core, pairs(2, 3)).future
    assert cancelled.cancel()
    model.gate.set()
    assert held.result(WAIT_S) == [1.0]
    assert kept.result(WAIT_S) == [2.0, 3.0]
    with pytest.raises(CancelledError):
        cancelled.result(WAIT_S)
    assert sorted(model.scored) == [1, 2, 3]


def test_a_future_cancelled_while_its_pack_runs_does_no_harm(make_core):
    model = FakeModel()
    core = make_core(model, pack_tokens=ONE_PAIR)
    running = hold_up(core, model, 1, 2, 3)
    assert running.cancel()
    model.gate.set()
    assert submit(core, pairs(4)).future.result(WAIT_S) == [4.0]
    assert len(model.scored) == 2
    assert len(model.threads) == 1


def test_room_that_was_reserved_counts_until_it_is_given_back(make_core):
    core = make_core(FakeModel(), max_queued_pairs=10)
    reserved: Future[list[float]] = Future()
    core.reserve(reserved, 8)
    assert core.stats().queued_pairs == 8
    with pytest.raises(Overloaded, match="8 pairs wait"):
        core.reserve(Future(), 3)
    assert reserved.cancel()
    assert core.stats().queued_pairs == 0
    # Its pairs come too late, and nobody waits for them.
    core.submit(Job(pairs(1, 2), reserved))
    assert submit(core, pairs(3)).future.result(WAIT_S) == [3.0]
    assert core.stats().pairs == 1


def test_too_many_waiting_pairs_are_refused_whole_and_room_is_counted_again_after(make_core):
    model = FakeModel()
    core = make_core(model, pack_tokens=ONE_PAIR, max_queued_pairs=4)
    held = hold_up(core, model)
    waiting = submit(core, pairs(2, 3)).future
    with pytest.raises(Overloaded, match=r"2 pairs wait.*max_queued_pairs=4"):
        submit(core, pairs(7, 8, 9))
    fits = submit(core, pairs(4, 5)).future
    with pytest.raises(Overloaded):
        submit(core, pairs(7))
    unbounded = submit(core, pairs(*range(10, 30)), bounded=False).future
    assert fits.cancel()
    model.gate.set()
    assert held.result(WAIT_S) == [1.0]
    assert waiting.result(WAIT_S) == [2.0, 3.0]
    assert len(unbounded.result(WAIT_S)) == 20
    assert not {7, 8, 9} & set(model.scored)
    assert submit(core, pairs(*range(50))).future.result(WAIT_S) == list(range(50))
