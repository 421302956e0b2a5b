"""Calls that read otherwise than their engine: several layers from one pass, other lengths."""

from dataclasses import replace
from pathlib import Path

import pytest

from bge_rerank_adapters import Reranker, SettingsError
from bge_rerank_adapters.engine.models.call_settings import CallSettings
from tests.family_checkpoints import build_family, case_pairs

CPU = {"device": "cpu", "dtype": "float32"}
COMPANY = 1e-5
PAIRS = case_pairs()


@pytest.fixture(scope="module", params=["layerwise", "lightweight"])
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory) -> Path:
    return build_family(tmp_path_factory.mktemp(family), family)


@pytest.fixture(scope="module")
def engine(folder):
    with Reranker(str(folder), **CPU) as reranker:
        yield reranker


def read(engine: Reranker, *layers: int, **changes) -> list[tuple[float, ...]]:
    return engine.pair_logits(PAIRS, CallSettings(replace(engine.settings, **changes), layers))


def own(folder: Path, **settings) -> list[float]:
    """The logits of an engine that has these settings itself."""
    with Reranker(str(folder), **(CPU | settings)) as reranker:
        return [reranker.logits(query, [text])[0] for query, text in PAIRS]


def column(rows: list[tuple[float, ...]], place: int) -> list[float]:
    return [row[place] for row in rows]


def test_one_layer_is_what_an_engine_of_that_layer_gives(engine, folder):
    assert column(read(engine, 4), 0) == pytest.approx(own(folder, cutoff_layers=4), abs=COMPANY)
    assert column(read(engine), 0) == pytest.approx(own(folder), abs=COMPANY)


def test_several_layers_come_from_one_pass(engine, family, folder):
    before = engine.stats()
    rows = read(engine, 2, 4, 6)
    after = engine.stats()
    assert after.pairs - before.pairs == len(set(PAIRS))
    assert {len(row) for row in rows} == {3}
    assert column(rows, 0) == pytest.approx(own(folder, cutoff_layers=2), abs=COMPANY)
    if family == "layerwise":
        assert column(rows, 1) == pytest.approx(own(folder, cutoff_layers=4), abs=COMPANY)
        assert column(rows, 2) == pytest.approx(own(folder), abs=COMPANY)


def test_calls_that_read_differently_share_packs_and_an_engine(engine, folder):
    wanted = own(folder)
    assert column(read(engine, 3, 5), 1) != pytest.approx(wanted, abs=0.1)
    model = engine._core.workers[0].model
    pairs = engine._calls.tokenize(PAIRS[:4]).distinct
    reader = engine.call_tokenizers.tokenize(CallSettings(engine.settings, (3, 6)))
    mixed = [each for both in zip(pairs, reader(PAIRS[:4]).distinct, strict=True) for each in both]
    logits = model.logits(mixed)
    assert logits[::2] == pytest.approx(wanted[:4], abs=COMPANY)
    assert [len(each.layers) for each in logits[1::2]] == [2] * 4


def test_lengths_and_prompt_change_for_one_call(engine, folder):
    changes = {"max_length": 40, "query_max_length": 12, "prompt": "Yes?"}
    assert column(read(engine, **changes), 0) == pytest.approx(own(folder, **changes), abs=COMPANY)
    assert column(read(engine), 0) == pytest.approx(own(folder), abs=COMPANY)


def test_compression_changes_for_one_call(tmp_path):
    folder = build_family(tmp_path, "lightweight", seed=1)
    changes = {"compress_ratio": 2, "compress_layers": (1, 4)}
    with Reranker(str(folder), **CPU, compress_ratio=4, compress_layers=[2]) as engine:
        rows = read(engine, **changes)
        assert column(rows, 0) == pytest.approx(own(folder, **changes), abs=COMPANY)
        plain = read(engine, compress_ratio=None, compress_layers=None)
        assert column(plain, 0) == pytest.approx(own(folder), abs=COMPANY)


@pytest.mark.parametrize(
    ("layers", "changes", "message"),
    [
        ((4, 2), {}, r"ascending order, each layer once, got \[4, 2\]"),
        ((4, 4), {}, "ascending order"),
        ((1,), {}, "from 2 to 6, .*got 1"),
        ((2, 7), {}, "from 2 to 6, .*got 7"),
        (
            (),
            {"query_max_length": 2, "query_instruction": "A long question: "},
            "leaves no room for a query",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_before_it_is_queued(engine, layers, changes, message):
    before = engine.stats().requests
    with pytest.raises(SettingsError, match=message):
        read(engine, *layers, **changes)
    assert engine.stats().requests == before


def test_layers_that_were_not_loaded_are_refused(folder):
    with (
        Reranker(str(folder), **CPU, cutoff_layers=3) as engine,
        pytest.raises(SettingsError, match="beyond the 3 layers that are loaded"),
    ):
        read(engine, 4)


def test_models_with_one_head_give_one_logit(tmp_path):
    folder = build_family(tmp_path, "decoder")
    with Reranker(str(folder), **CPU) as engine:
        rows = read(engine, max_length=64)
    assert column(rows, 0) == pytest.approx(own(folder, max_length=64), abs=COMPANY)
    assert {len(row) for row in rows} == {1}
