"""Packs shared out among streams: what goes where, and what a program around them notices."""

import gc
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bge_rerank_adapters import Reranker
from bge_rerank_adapters.engine.models.cpu import streams
from bge_rerank_adapters.engine.models.cpu import threads as cpu_threads
from bge_rerank_adapters.engine.models.cpu.onednn.ranges import int8_works
from bge_rerank_adapters.engine.models.cpu.streams import (
    SmallPack,
    StreamedModel,
    one_thread_stream_count,
    stream_count,
)
from bge_rerank_adapters.engine.models.cpu.threads import ALONE, Helpers
from bge_rerank_adapters.engine.text.pairs import TokenPair
from bge_rerank_adapters.settings import EngineSettings
from tests.checkpoints import read_sentences

CPU = torch.device("cpu")
THREADS = 4
SENTENCES = list(read_sentences().values())


def pair(tokens: int, index: int = 0) -> TokenPair:
    return TokenPair(np.full(tokens, 7), 1, truncated=False, index=index)


class FakeModel:
    """Gives each pair its own index, and keeps by which thread each part was run."""

    device, dtype, streams, pack_tokens = CPU, torch.bfloat16, 1, 2048

    def __init__(self):
        self.parts: list[tuple[str, list[int]]] = []
        self.threads: set[int] = set()
        self.idents: set[int] = set()
        self.error: Exception | None = None
        # Where streams are to meet before any of them goes on.
        self.together: threading.Barrier | None = None

    def logits(self, pairs, *, helpers=ALONE):
        self.threads.add(torch.get_num_threads())
        self.idents.add(threading.get_ident())
        if self.error is not None and pairs[0].index == 0:
            raise self.error
        if self.together is not None:
            self.together.wait(60)
        self.parts.append((threading.current_thread().name, [len(each) for each in pairs]))
        return [float(each.index) for each in pairs]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model():
    return FakeModel()


def lengths(model) -> list[list[int]]:
    return sorted(part for _, part in model.parts)


def test_pairs_are_shared_out_evenly_and_logits_come_in_order(model):
    tokens = [9, 30, 12, 28, 11, 10]
    pairs = [pair(each, index) for index, each in enumerate(tokens)]
    model.together = threading.Barrier(2)
    assert StreamedModel(model, 2).logits(pairs) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert lengths(model) == [[28, 12, 10], [30, 11, 9]]
    assert {name for name, _ in model.parts} == {"bge-rerank-stream"}
    assert len(model.idents) == 2


def test_a_pair_alone_is_run_by_all_threads_together(model):
    streamed = StreamedModel(model, 2)
    for pairs in ([pair(100)], [pair(100), pair(5, 1)]):
        assert streamed.logits(pairs) == [float(each.index) for each in pairs]
    assert [name for name, _ in model.parts] == [threading.current_thread().name] * 2
    assert model.threads == {THREADS}


def test_a_small_pack_is_run_by_the_streams_together(model):
    streamed = StreamedModel(model, 2, small=SmallPack(even=18, uneven=20))
    assert streamed.logits([pair(9, 0), pair(9, 1)]) == [0.0, 1.0]
    assert streamed.logits([pair(20)]) == [0.0]
    assert lengths(model) == [[9, 9], [20]]
    assert {name for name, _ in model.parts} == {"bge-rerank-stream"}
    # What is larger is divided, or run by all threads together.
    assert streamed.logits([pair(9, 0), pair(10, 1)]) == [0.0, 1.0]
    assert streamed.logits([pair(21)]) == [0.0]
    assert lengths(model) == [[9], [9, 9], [10], [20], [21]]
    assert model.parts[-1][0] == threading.current_thread().name


def test_streams_share_the_threads_and_leave_others_theirs(model):
    assert StreamedModel(model, 2).logits([pair(9, 0), pair(9, 1)]) == [0.0, 1.0]
    assert model.threads == {THREADS // 2}
    counts = []
    later = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert [*counts, torch.get_num_threads()] == [THREADS] * 2


def test_an_error_comes_as_it_is_once_all_parts_are_done(model, monkeypatch):
    # Time for a caller that would not wait for the other part to go on.
    monkeypatch.setattr(model, "together", SimpleNamespace(wait=lambda _: time.sleep(0.05)))
    model.error = MemoryError("no room")
    streamed = StreamedModel(model, 2)
    with pytest.raises(MemoryError, match="no room"):
        streamed.logits([pair(9, 0), pair(9, 1)])
    assert [part for _, part in model.parts] == [[9]], "one part was not waited for"
    model.error = None
    assert streamed.logits([pair(9, 0), pair(9, 1)]) == [0.0, 1.0]


def test_threads_end_with_the_model(model):
    before = set(threading.enumerate())
    streamed = StreamedModel(model, 2)
    streamed.logits([pair(9, 0), pair(9, 1)])
    ours = {each for each in set(threading.enumerate()) - before if "stream" in each.name}
    assert len(ours) == 2
    del streamed
    gc.collect()
    for each in ours:
        each.join(60)
        assert not each.is_alive()


@pytest.mark.parametrize(
    ("device", "dtype", "threads", "count"),
    [
        ("cpu", torch.bfloat16, 2, 2),
        ("cpu", torch.int8, 3, 3),
        ("cpu", torch.bfloat16, 1, 1),
        ("cpu", torch.bfloat16, 8, 8),
        ("cpu", torch.bfloat16, 9, 4),
        ("cpu", torch.bfloat16, 15, 7),
        ("cpu", torch.bfloat16, 16, 8),
        ("cpu", torch.bfloat16, 40, 8),
        ("cpu", torch.float32, 2, 1),
        ("cuda", torch.bfloat16, 2, 1),
    ],
)
def test_half_precision_on_a_processor_gets_streams(monkeypatch, device, dtype, threads, count):
    monkeypatch.setattr(streams.torch, "get_num_threads", lambda: threads)
    assert stream_count(torch.device(device), dtype) == count


@pytest.mark.parametrize(("threads", "count"), [(1, 1), (2, 2), (40, 40), (64, 64), (65, 64)])
def test_with_own_kernels_each_thread_is_a_stream(monkeypatch, threads, count):
    monkeypatch.setattr(streams.torch, "get_num_threads", lambda: threads)
    assert one_thread_stream_count() == count


@pytest.mark.parametrize("threads", [2, 3, 8, 9, 16, 32, 64])
def test_equal_pairs_are_shared_out_however_many_threads_there_are(monkeypatch, model, threads):
    monkeypatch.setattr(streams.torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(cpu_threads.torch, "set_num_threads", lambda _: None)
    count = stream_count(CPU, torch.bfloat16)
    streamed = StreamedModel(model, count)
    streamed.logits([pair(50, index) for index in range(3 * count)])
    assert lengths(model) == [[50, 50, 50]] * count
    model.parts.clear()
    streamed.logits([pair(400), *(pair(5, index) for index in range(1, 5))])
    assert lengths(model) == [[400, 5, 5, 5, 5]]


def split_together(count, least, work, *, streams=2):
    """Run within a model all of whose threads are together."""

    class Whole(FakeModel):
        def logits(self, pairs, *, helpers=ALONE):
            helpers.split(count, least, work)
            return super().logits(pairs)

    return StreamedModel(Whole(), streams).logits([pair(100)])


@pytest.mark.parametrize(
    ("count", "least", "expected"),
    [
        (9, 1, [(0, 2), (2, 4), (4, 6), (6, 9)]),
        (9, 4, [(0, 4), (4, 9)]),
        (9, 9, [(0, 9)]),
        (3, 4, [(0, 3)]),
    ],
)
def test_threads_that_run_a_model_together_share_its_work(count, least, expected):
    done, ran, everyone = [], set(), threading.Barrier(len(expected))

    def work(begin, end):
        everyone.wait(60)
        done.append((begin, end))
        ran.add(threading.get_ident())

    split_together(count, least, work, streams=4)
    assert sorted(done) == expected
    assert len(ran) == len(expected)
    assert threading.get_ident() in ran


def test_a_thread_of_its_own_does_all_of_the_work():
    done = []
    ALONE.split(100, 1, lambda *part: done.append(part))
    ALONE.split(0, 1, lambda *part: done.append(part))
    assert done == [(0, 100)]


def test_work_is_shared_though_no_other_thread_is_free(model):
    streamed, busy, done = StreamedModel(model, 2), threading.Event(), []
    for _ in range(2):
        streamed._helpers.tasks.put(lambda: busy.wait(100))
    Helpers(streamed._helpers.tasks, 2).split(2, 1, lambda *part: done.append(part))
    assert done == [(0, 1), (1, 2)]
    busy.set()


def test_an_error_of_shared_work_comes_once_all_parts_are_done():
    done = []

    def work(begin, end):
        if begin == 0:
            raise MemoryError("no room")
        time.sleep(0.1)
        done.append((begin, end))

    with pytest.raises(MemoryError, match="no room"):
        split_together(2, 1, work)
    assert done == [(1, 2)]


def test_a_stream_that_cannot_start_leaves_nothing_behind(model, monkeypatch):
    started = []

    class Refusing(threading.Thread):
        def start(self):
            if started:
                raise RuntimeError("can't start new thread")
            started.append(self)
            super().start()

    monkeypatch.setattr(cpu_threads.threading, "Thread", Refusing)
    with pytest.raises(RuntimeError, match="new thread") as caught:
        StreamedModel(model, 2)
    caught.value.__traceback__ = None
    del caught
    gc.collect()
    started[0].join(60)
    assert not started[0].is_alive()
    assert torch.get_num_threads() == THREADS


needs_int8 = pytest.mark.skipif(
    not int8_works(), reason="this torch or processor has no 8-bit product"
)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("bfloat16", 0.1), pytest.param("int8", 0.3, marks=needs_int8)]
)
def test_the_engine_scores_with_streams_as_with_one(dtype, tolerance):
    settings = EngineSettings(model="tiny", dtype=dtype, device="cpu")
    query, documents = SENTENCES[0], SENTENCES[1:40]
    with Reranker.from_settings(settings) as engine:
        streamed = engine._core.workers[0].model
        assert isinstance(streamed, StreamedModel)
        found = engine.logits(query, documents)
        assert found == engine.logits(query, documents)
        alone = [engine.logits(query, [document])[0] for document in documents]
        pool = [each for each in threading.enumerate() if "bge-rerank-stream" in each.name]
        assert pool
    assert found == pytest.approx(alone, abs=tolerance)
