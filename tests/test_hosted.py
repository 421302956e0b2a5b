"""The one life cycle of an engine under all hosts, and the fields that adapters share."""

import asyncio
import copy
import gc
import pickle
import threading
import weakref
from typing import get_args, get_type_hints

import pytest

from bge_rerank_adapters import CheckpointNotFoundError, DeviceError, Reranker, SettingsError
from bge_rerank_adapters.engine import shared
from bge_rerank_adapters.engine.hosted.lazy import LazyEngine
from bge_rerank_adapters.milvus import BGERerankFunction
from bge_rerank_adapters.settings import EngineSettings
from bge_rerank_adapters.settings.table import rows
from tests.texts import DOCUMENTS, QUERY

SETTINGS = EngineSettings(model="tiny", device="cpu", dtype="float32", max_length=93)


class Recorded:
    """A ready engine that is no `Reranker` and has no settings."""

    closed = False

    def rerank(self, query, documents, *, top_k=None, score_threshold=None):
        return []

    async def arerank(self, query, documents, *, top_k=None, score_threshold=None):
        return []

    def close(self):
        self.closed = True


@pytest.fixture
def loads(monkeypatch):
    """The settings that engines were loaded with."""
    seen = []
    load = Reranker.from_settings

    def from_settings(settings):
        seen.append(settings)
        return load(settings)

    monkeypatch.setattr(Reranker, "from_settings", from_settings)
    return seen


def test_nothing_is_loaded_before_the_first_use_and_then_once(loads):
    engine = LazyEngine(SETTINGS)
    assert loads == []
    found = []
    threads = [threading.Thread(target=lambda: found.append(engine.get())) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert len(found) == 8
    assert set(map(id, found)) == {id(engine.get())}
    assert loads == [SETTINGS]


def test_an_engine_that_another_user_closed_is_loaded_again(loads):
    one, other = LazyEngine(SETTINGS), LazyEngine(SETTINGS)
    one.get().close()
    assert other.get().rerank(QUERY, DOCUMENTS)[0].index == 1
    assert one.get() is other.get()
    assert len(loads) == 2


def test_close_lets_go_of_its_own_hold_alone():
    one = LazyEngine(SETTINGS)
    two, third = copy.copy(one), LazyEngine(EngineSettings(model="tiny", max_length=64))
    one.warm_up()
    two.share(one)
    third.share(one)
    assert third.get() is not one.get()
    engine = weakref.ref(one.get())
    one.close()
    one.close()
    gc.collect()
    assert engine() is not None
    assert two.get() is engine()
    two.close()
    gc.collect()
    assert engine() is None


async def test_loading_leaves_the_event_loop_free(monkeypatch):
    loading, released = threading.Event(), threading.Event()
    ready = Recorded()

    def slow_load(settings):
        loading.set()
        assert released.wait(60)
        return ready

    monkeypatch.setattr(shared, "shared_reranker", slow_load)
    asking = asyncio.create_task(LazyEngine(SETTINGS).aget())
    assert await asyncio.to_thread(loading.wait, 60)
    released.set()
    assert await asking is ready


def test_a_given_engine_is_used_and_never_closed():
    given = Recorded()
    engine = LazyEngine(None, reranker=given)
    engine.warm_up()
    engine.close()
    assert engine.get() is given
    assert asyncio.run(engine.aget()) is given
    assert (given.closed, engine.settings) == (False, None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reranker": Recorded}, "got the class Recorded; .*reranker=Recorded"),
        ({"reranker": "tiny"}, "methods rerank and arerank, got str; give one such as"),
        ({"reranker": Recorded(), "given": ["dtype", "device"]}, "dtype, device cannot be set"),
        ({}, "There is no model: .*give reranker= again, or a model"),
    ],
)
def test_what_is_no_engine_is_refused_at_once(given, message):
    with pytest.raises(SettingsError, match=message):
        LazyEngine(None, **given)


def test_a_pickle_carries_settings_and_neither_engine_nor_token(reranker):
    engine = LazyEngine(EngineSettings(model="tiny", token="hf_secret"))  # noqa: S106
    pickled = pickle.dumps(engine)
    assert b"hf_secret" not in pickled
    assert pickle.loads(pickled).settings == EngineSettings(model="tiny")  # noqa: S301
    of_given = pickle.loads(pickle.dumps(LazyEngine(None, reranker=reranker)))  # noqa: S301
    assert of_given.settings == reranker.settings
    lost = pickle.loads(pickle.dumps(LazyEngine(None, reranker=Recorded())))  # noqa: S301
    with pytest.raises(SettingsError, match="There is no model"):
        lost.get()


def test_milvus_function_of_a_given_engine_unpickles_with_its_settings(reranker):
    made = BGERerankFunction(reranker=reranker)
    again = pickle.loads(pickle.dumps(made))  # noqa: S301
    assert again.reranker.settings == reranker.settings
    assert again(QUERY, DOCUMENTS) == made(QUERY, DOCUMENTS)


def test_adapters_have_a_field_for_each_row():
    pytest.importorskip("pydantic")
    from bge_rerank_adapters.engine.hosted.fields import AdapterSettings

    table, fields = rows(EngineSettings), AdapterSettings.model_fields
    own = {"top_k", "score_threshold", "reranker"}
    assert set(fields) - own == set(table), "AdapterSettings needs a field for each row"
    assert {name: fields[name].default for name in table} == {
        name: each.default for name, each in table.items()
    }
    kept, taken = get_type_hints(EngineSettings), get_type_hints(AdapterSettings)
    other = {"model", "device", "token", "cutoff_layers", "compress_layers"}
    assert {name for name in table if taken[name] != kept[name]} == other
    assert all(set(get_args(taken[name])) & {str, int, type(None)} for name in other)
    assert all(fields[name].frozen for name in table)
    text = " ".join(AdapterSettings.__doc__.split())
    assert [name for name in table if f" {name}: {table[name].sentence}" not in text] == []


def test_settings_are_checked_once_and_not_for_each_query(monkeypatch, reranker):
    pytest.importorskip("langchain_core")
    from langchain_core.documents import Document

    from bge_rerank_adapters.langchain import BGEDocumentCompressor

    made = BGEDocumentCompressor(model="tiny", device="cpu", dtype="float32")
    made.warm_up()
    checked = []
    check = EngineSettings.__post_init__
    monkeypatch.setattr(
        EngineSettings, "__post_init__", lambda self: (checked.append(self), check(self))
    )
    for _ in range(3):
        made.compress_documents([Document(each) for each in DOCUMENTS], QUERY)
        made.top_k = 2
    assert checked == []


@pytest.mark.parametrize("host", ["langchain", "llama_index", "milvus"])
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model": "bge-reranker-base"}, CheckpointNotFoundError, "did you mean 'BAAI/bge-rer"),
        ({"device": "cuda:99"}, DeviceError, "'cuda:99' is not available"),
        ({"device": ["cpu", "cuda:99"]}, DeviceError, "'cuda:99' is not available"),
    ],
)
def test_adapters_check_at_once_what_needs_no_weights(host, settings, error, message):
    module = pytest.importorskip(f"bge_rerank_adapters.{host}")
    adapter = {
        "langchain": "BGEDocumentCompressor",
        "llama_index": "BGENodePostprocessor",
        "milvus": "BGERerankFunction",
    }[host]
    renamed = {"model_name" if host == "milvus" else "model": "tiny"}
    renamed |= {
        "model_name" if host == "milvus" and name == "model" else name: value
        for name, value in settings.items()
    }
    with pytest.raises(error, match=message):
        getattr(module, adapter)(**renamed)


def test_a_folder_that_may_come_later_is_not_looked_for():
    LazyEngine(EngineSettings(model="./later"))
    LazyEngine(EngineSettings(model="owner/later"))
