"""Models that run ahead, as on a GPU: the next pack is launched before the last one is read."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from bge_rerank_adapters import ClosedError, NonFiniteLogitError, Reranker, ScoringError
from bge_rerank_adapters.engine.models import device_faults
from bge_rerank_adapters.engine.queue.core import ScoringCore
from bge_rerank_adapters.engine.queue.packs import Job
from bge_rerank_adapters.engine.text.pairs import TokenPair
from tests.test_worker import (
    BAD,
    ONE_PAIR,
    TOKENS,
    WAIT_S,
    FakeModel,
    failure,
    note_done,
    pairs,
    submit,
)

pytestmark = pytest.mark.timeout(120)

ASSERT = "CUDA error: device-side assert triggered"


class AheadModel(FakeModel):
    """Is done with a pack only once its logits are asked for; writes down what happens when.

    Attributes:
        history: `("launch", ids)` and `("read", ids)`, in order.
    """

    runs_ahead = True

    def __init__(
        self,
        launching: Callable[[list[int]], None] = lambda _: None,
        reading: Callable[[list[int]], None] = lambda _: None,
        logits: dict[int, float] | None = None,
    ) -> None:
        super().__init__(logits=logits)
        self.launching, self.reading = launching, reading
        self.history: list[tuple[str, list[int]]] = []

    def launch(self, pack: Sequence[TokenPair]) -> Callable[[], list[float]]:
        ids = [int(pair.ids[0]) for pair in pack]
        self.history.append(("launch", ids))
        self.launching(ids)

        def read() -> list[float]:
            self.entered.set()
            assert self.gate.wait(WAIT_S)
            self.history.append(("read", ids))
            self.reading(ids)
            self.scored += ids
            return [self.odd_logits.get(each, float(each)) for each in ids]

        return read

    def logits(self, pack: Sequence[TokenPair]) -> list[float]:
        return self.launch(pack)()


@pytest.fixture
def make_core() -> Iterator[Callable[..., ScoringCore]]:
    made: list[tuple[ScoringCore, AheadModel]] = []

    def make(model: AheadModel, pack_tokens: int = ONE_PAIR) -> ScoringCore:
        core = ScoringCore([model], pack_tokens=pack_tokens, max_queued_pairs=1000)
        made.append((core, model))
        return core

    yield make
    for core, model in made:
        model.gate.set()
        core.close()


def hold_up(core: ScoringCore, model: AheadModel, *ids: int) -> Job[TokenPair]:
    """Submit a job and return once the model is asked for its first pack's logits."""
    model.hold()
    job = submit(core, pairs(*ids))
    assert model.entered.wait(WAIT_S)
    return job


def failing(error: BaseException) -> Callable[[list[int]], None]:
    def fail(ids: list[int]) -> None:
        if BAD in ids:
            raise error

    return fail


def test_the_next_pack_is_launched_before_the_last_one_is_read_and_no_more(make_core):
    model = AheadModel()
    assert submit(make_core(model), pairs(1, 2, 3, 4)).future.result(WAIT_S) == [1.0, 2.0, 3.0, 4.0]
    # Of equal length, pairs are taken from the end.
    order = [("launch", 4), ("launch", 3), ("read", 4), ("launch", 2), ("read", 3), ("launch", 1)]
    assert model.history == [(what, [each]) for what, each in [*order, ("read", 2), ("read", 1)]]


def test_a_pack_with_nothing_behind_it_is_read_at_once(make_core):
    model = AheadModel()
    core = make_core(model)
    for each in (1, 2, 3):
        assert submit(core, pairs(each)).future.result(WAIT_S) == [float(each)]
    assert [what for what, _ in model.history] == ["launch", "read"] * 3


def test_a_model_that_does_not_run_ahead_is_never_launched(make_core):
    model = AheadModel()
    model.runs_ahead = False
    given, model.launch = model.launch, None
    model.logits = lambda pack: given(pack)()
    assert submit(make_core(model), pairs(1, 2, 3)).future.result(WAIT_S) == [1.0, 2.0, 3.0]
    assert [what for what, _ in model.history] == ["launch", "read"] * 3


def test_on_a_cpu_every_pack_is_read_before_the_next():
    with Reranker("tiny", device="cpu", dtype="float32") as engine:
        assert [worker.model.runs_ahead for worker in engine._core.workers] == [False]


def test_an_error_that_comes_late_reaches_its_own_callers_alone(make_core):
    cause = ValueError("a bad pair")
    model = AheadModel(reading=failing(cause))
    core = make_core(model)
    first = hold_up(core, model, 1)
    bad, last = submit(core, pairs(BAD)), submit(core, pairs(3, 4))
    model.gate.set()
    error = failure(bad.future)
    assert isinstance(error, ScoringError)
    assert error.__cause__ is cause
    assert first.future.result(WAIT_S) == [1.0]
    assert last.future.result(WAIT_S) == [3.0, 4.0]
    # The one after the bad pack had been launched already.
    order = model.history
    assert order.index(("launch", [4])) < order.index(("read", [BAD]))


def test_an_error_at_the_launch_reaches_its_own_callers_after_those_before_it_are_done(make_core):
    cause = ValueError("a bad pair")
    model = AheadModel(launching=failing(cause))
    core = make_core(model)
    held = hold_up(core, model, 5)
    calls = {name: submit(core, pairs(each)) for name, each in (("earlier", 7), ("bad", BAD))}
    done: list[str] = []
    told = note_done({name: job.future for name, job in calls.items()}, done.append)
    model.gate.set()
    assert failure(calls["bad"].future).__cause__ is cause
    assert calls["earlier"].future.result(WAIT_S) == [7.0]
    assert told.wait(WAIT_S)
    assert done == ["earlier", "bad"]
    assert held.future.result(WAIT_S) == [5.0]
    assert submit(core, pairs(8)).future.result(WAIT_S) == [8.0]


def test_of_calls_that_share_a_pack_that_fails_late_only_the_one_to_blame_hears_of_it(make_core):
    model = AheadModel(reading=failing(ValueError("a bad pair")))
    core = make_core(model, pack_tokens=100 * TOKENS)
    held = hold_up(core, model, 1)
    sharing = [submit(core, pairs(*ids)).future for ids in ((7,), (BAD, 10), (8, 9))]
    model.gate.set()
    assert held.future.result(WAIT_S) == [1.0]
    assert sharing[0].result(WAIT_S) == [7.0]
    assert isinstance(failure(sharing[1]), ScoringError)
    assert sharing[2].result(WAIT_S) == [8.0, 9.0]


@pytest.mark.parametrize("when", ["launching", "reading"])
def test_a_lack_of_memory_splits_the_pack_and_scores_every_pair_once(make_core, when):
    def fault(ids: list[int]) -> None:
        if len(ids) > 3:
            raise torch.OutOfMemoryError

    model = AheadModel(**{when: fault})
    core = make_core(model, pack_tokens=8 * TOKENS)
    ids = list(range(40))
    assert submit(core, pairs(*ids)).future.result(WAIT_S) == [float(each) for each in ids]
    assert sorted(model.scored) == ids
    assert core.workers[0].budget < 8 * TOKENS


def test_a_logit_that_is_no_number_fails_its_own_call(make_core):
    model = AheadModel(logits={BAD: float("nan")})
    core = make_core(model)
    bad, good = submit(core, pairs(BAD)), submit(core, pairs(1, 2))
    assert isinstance(failure(bad.future), NonFiniteLogitError)
    assert good.future.result(WAIT_S) == [1.0, 2.0]


@pytest.fixture
def losing(make_core, monkeypatch) -> Callable[[str], list[BaseException]]:
    """Lose the device at the launch of the second of three packs, and tell their errors."""
    monkeypatch.setattr(device_faults, "_lost", {})

    def lose(when: str) -> list[BaseException]:
        lost: list[bool] = []

        def launching(ids: list[int]) -> None:
            if ids == [2]:
                lost.append(True)
                if when == "launch":
                    raise torch.AcceleratorError(ASSERT)

        def reading(ids: list[int]) -> None:
            if lost:
                raise torch.AcceleratorError(ASSERT)

        model = AheadModel(launching, reading)
        model.device = torch.device("cuda:0")
        core = make_core(model)
        held = hold_up(core, model, 0)
        calls = [submit(core, pairs(each)).future for each in (1, 2, 3)]
        model.gate.set()
        assert held.future.result(WAIT_S) == [0.0]
        errors = [failure(each) for each in calls]
        assert core.closed
        core.close()
        return errors

    return lose


@pytest.mark.parametrize("when", ["launch", "reading"])
def test_a_device_that_is_lost_under_two_packs_is_told_to_the_callers_of_both(losing, caplog, when):
    errors = losing(when)
    # The pack that was under way has the error itself, whichever call it came out of.
    assert isinstance(errors[0], ScoringError)
    assert {type(each) for each in errors} <= {ScoringError, ClosedError}
    assert all("start the process again" in str(each) for each in errors)
    assert caplog.text.count("The engine closes itself") == 1


def test_a_call_that_is_given_up_between_launch_and_reading_does_no_harm(make_core):
    model = AheadModel()
    core = make_core(model)
    first = hold_up(core, model, 1, 2, 3)
    assert first.future.cancel()
    model.gate.set()
    assert submit(core, pairs(4)).future.result(WAIT_S) == [4.0]


def test_closing_with_packs_under_way_ends_the_thread_and_tells_their_callers(make_core):
    model = AheadModel()
    core = make_core(model)
    running = hold_up(core, model, 1, 2, 3)
    core.stop()
    assert isinstance(failure(running.future), ClosedError)
    model.gate.set()
    threads = [worker.thread for worker in core.workers]
    core.close()
    assert not any(thread.is_alive() for thread in threads)
    launched = [ids for what, ids in model.history if what == "launch"]
    assert [ids for what, ids in model.history if what == "read"] == launched


def test_a_thread_that_dies_with_packs_under_way_tells_all_and_the_next_call_starts_anew(make_core):
    model = AheadModel(reading=failing(SystemExit("over")))
    core = make_core(model)
    job = submit(core, pairs(1, BAD, 2, 3))
    assert failure(job.future).__cause__.code == "over"
    assert submit(core, pairs(4)).future.result(WAIT_S) == [4.0]
    # What the dead thread had launched is not read by the next one.
    assert ("read", [1]) not in model.history


def test_seconds_of_packs_that_overlap_are_counted_once(make_core):
    model = AheadModel(reading=lambda _: time.sleep(0.05))
    core = make_core(model)
    begin = time.perf_counter()
    submit(core, pairs(*range(8))).future.result(WAIT_S)
    took = time.perf_counter() - begin
    assert 8 * 0.05 <= core.stats().scoring_s <= took


def test_results_are_handed_out_while_the_next_pack_is_under_way(make_core):
    reached = threading.Event()

    def reading(ids: list[int]) -> None:
        if ids == [2]:
            assert reached.wait(WAIT_S)

    model = AheadModel(reading=reading)
    core = make_core(model)
    first = submit(core, pairs(1)).future
    second = submit(core, pairs(2)).future
    assert first.result(WAIT_S) == [1.0]
    reached.set()
    assert second.result(WAIT_S) == [2.0]
