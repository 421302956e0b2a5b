"""Every check of the engine's settings, and what may leave them."""

import copy
import inspect
import json
import pickle
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from bge_rerank_adapters import Reranker
from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.settings import EngineOptions, EngineSettings, setting_names
from bge_rerank_adapters.settings.table import rows

SECRET = "hf_do-not-tell"  # noqa: S105


def test_defaults():
    settings = EngineSettings()
    assert settings.model == "BAAI/bge-reranker-v2-m3"
    assert (settings.device, settings.dtype) == ("auto", "auto")
    assert (settings.max_length, settings.query_max_length) == (512, None)
    assert (settings.pack_tokens, settings.local_files_only) == ("auto", False)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model", "", "model must be a non-empty str or a path"),
        ("model", "  ", "model must be a non-empty"),
        ("model", None, "model must be a non-empty"),
        ("model", b"tiny", "model must be a non-empty"),
        ("device", "gpu", "device 'gpu' is not known; use \"auto\", or one of cpu, cuda"),
        ("device", "cuda:", "is not known"),
        ("device", "cuda:x", "is not known"),
        ("device", "cuda:1 ", "is not known"),
        ("device", None, "device 'None' is not known"),
        ("device", [], "device must name at least one device"),
        ("device", ["cpu", "gpu"], "device 'gpu' is not known"),
        ("dtype", "float8", "dtype 'float8' is not known; use one of auto, float32"),
        ("dtype", None, "dtype 'None' is not known"),
        ("max_length", 0, "max_length must be a whole number of at least 1, got 0"),
        ("max_length", 512.0, "max_length must be a whole number"),
        ("max_length", True, "max_length must be a whole number"),
        ("query_max_length", 0, "query_max_length must be a whole number"),
        ("query_max_length", "9", "query_max_length must be a whole number"),
        ("query_max_length", 512, r"query_max_length \(512\) leaves no room for a document"),
        (
            "query_truncation_side",
            "middle",
            "query_truncation_side must be one of right, left, got 'middle'",
        ),
        ("long_documents", "split", "long_documents must be one of truncate, window, got 'split'"),
        ("long_documents", None, "long_documents must be one of"),
        ("window_tokens", 0, "window_tokens must be a whole number of at least 1"),
        ("window_overlap_tokens", -1, "window_overlap_tokens must be a whole number of at least 0"),
        ("revision", "", "revision must be a non-empty"),
        ("revision", 7, "revision must be a non-empty"),
        ("cache_dir", "", "cache_dir must be a non-empty"),
        ("local_files_only", 1, "local_files_only must be True or False"),
        ("local_files_only", "no", "local_files_only must be True or False"),
        ("token", 5, "token must be a str or None, got a int"),
        ("token", True, "token must be a str or None"),
        ("backend", "vllm", "backend must be one of 'native', 'flagembedding', got 'vllm'"),
        ("backend", None, "backend must be one of"),
        ("family", "gemma", "family must be one of 'encoder', 'decoder', 'layerwise'"),
        ("family", True, "family must be one of"),
        ("prompt", 5, "prompt must be a str or None, got 5"),
        ("query_instruction", b"A", "query_instruction must be a str or None"),
        ("passage_instruction", ["B"], "passage_instruction must be a str or None"),
        ("cutoff_layers", 0, "cutoff_layers must be a whole number of at least 1"),
        ("cutoff_layers", [8, 16], "cutoff_layers must be one layer, or a list of one"),
        ("cutoff_layers", [], "cutoff_layers must be one layer, or a list of one"),
        ("compress_ratio", 3, "compress_ratio must be one of 1, 2, 4, 8, or None, got 3"),
        ("compress_ratio", True, "compress_ratio must be one of"),
        ("compress_ratio", 2.0, "compress_ratio must be one of 1, 2, 4, 8, or None, got 2.0"),
        ("compress_layers", [], "compress_layers must name at least one layer"),
        ("compress_layers", [8, 0], "compress_layers must be a whole number"),
        ("pack_tokens", 0, 'pack_tokens must be "auto" or a whole number of at least 1, got 0'),
        ("pack_tokens", "much", 'pack_tokens must be "auto" or a whole number'),
        ("pack_tokens", True, 'pack_tokens must be "auto" or a whole number'),
        ("max_queued_pairs", -1, "max_queued_pairs must be a whole number"),
    ],
)
def test_a_bad_value_is_refused_by_name(name, value, message):
    with pytest.raises(SettingsError, match=message):
        EngineSettings(**{name: value})


def test_every_setting_is_checked():
    [mark] = test_a_bad_value_is_refused_by_name.pytestmark
    assert {name for name, *_ in mark.args[1]} == set(setting_names())


def test_layers_are_normalised():
    settings = EngineSettings(
        model="m", cutoff_layers=[28], compress_ratio=2, compress_layers=[24, 8, 8]
    )
    assert (settings.cutoff_layers, settings.compress_layers) == (28, (8, 24))
    one = EngineSettings(model="m", compress_ratio=1, compress_layers=8)
    assert one.compress_layers == (8,)
    assert settings.to_dict()["compress_layers"] == [8, 24]
    assert EngineSettings(**settings.to_dict()) == settings


@pytest.mark.parametrize(
    ("model", "setting", "value"),
    [
        ("BAAI/bge-reranker-base", "prompt", "?"),
        ("tiny", "cutoff_layers", 2),
        ("BAAI/bge-reranker-v2-m3", "cutoff_layers", 8),
        ("BAAI/bge-reranker-v2-gemma", "cutoff_layers", [8]),
        ("BAAI/bge-reranker-v2-gemma", "compress_ratio", 2),
        ("BAAI/bge-reranker-v2-gemma", "dtype", "int8"),
        ("BAAI/bge-reranker-v2-minicpm-layerwise", "compress_layers", [8]),
    ],
)
def test_what_does_not_belong_to_a_known_family_is_refused_by_name(model, setting, value):
    with pytest.raises(SettingsError, match=f"{setting}.*famil.*leave|dtype 'int8'"):
        EngineSettings(model=model, **{setting: value})


def test_layers_without_a_ratio_are_refused():
    with pytest.raises(SettingsError, match=r"\(8,\) had no effect without compress_ratio"):
        EngineSettings(model="m", compress_layers=[8])


def test_what_belongs_to_a_known_family_is_taken():
    EngineSettings(model="BAAI/bge-reranker-v2-minicpm-layerwise", cutoff_layers=28, prompt="")
    EngineSettings(
        model="BAAI/bge-reranker-v2.5-gemma2-lightweight",
        cutoff_layers=28,
        compress_ratio=2,
        compress_layers=[24, 40],
    )
    EngineSettings(model="BAAI/bge-reranker-v2-m3", query_instruction="Query: ")


@pytest.mark.parametrize(
    ("given", "kept", "devices"),
    [
        ("cuda:1", "cuda:1", ("cuda:1",)),
        (["cuda:0", "cuda:1"], ("cuda:0", "cuda:1"), ("cuda:0", "cuda:1")),
        (["cpu"], "cpu", ("cpu",)),
        (("mps",), "mps", ("mps",)),
    ],
)
def test_devices(given, kept, devices):
    settings = EngineSettings(device=given)
    assert settings.device == kept
    assert settings.devices == devices
    assert json.loads(json.dumps(settings.to_dict()))["device"] in (kept, list(kept))


def test_values_are_normalised():
    settings = EngineSettings(
        model=Path("some") / "where", dtype="torch.float16", cache_dir=Path("c")
    )
    assert (settings.model, settings.dtype, settings.cache_dir) == (
        str(Path("some") / "where"),
        "float16",
        "c",
    )


def test_equal_settings_are_equal_keys():
    assert len({EngineSettings(device=["cpu"]), EngineSettings(device="cpu")}) == 1
    assert EngineSettings(max_length=256) != EngineSettings()
    assert EngineSettings(token="a") != EngineSettings(token="b")  # noqa: S106


def test_settings_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        EngineSettings().dtype = "float16"


def test_the_token_leaves_only_by_its_own_name():
    settings = EngineSettings(token=SECRET, device=["cpu", "cuda:0"])
    assert settings.token == SECRET
    assert SECRET not in repr(settings) + str(settings) + json.dumps(settings.to_dict())
    assert SECRET.encode() not in pickle.dumps(settings)
    assert "token" not in settings.to_dict()
    assert settings.without_token().token is None
    with pytest.raises(SettingsError) as caught:
        EngineSettings(token=[SECRET])
    assert SECRET not in str(caught.value)


def test_what_is_carried_builds_equal_settings():
    settings = EngineSettings(model="tiny", device=["cpu", "cuda:0"], max_length=64, token=SECRET)
    rest = settings.without_token()
    assert pickle.loads(pickle.dumps(settings)) == rest  # noqa: S301
    assert EngineSettings(**json.loads(json.dumps(settings.to_dict()))) == rest
    assert copy.deepcopy(rest) == rest
    assert set(settings.to_dict()) == set(setting_names()) - {"token"}


def test_type_checkers_inspect_and_documentation_see_the_rows():
    """Each of these is what someone looks at instead of the table."""
    table = rows(EngineSettings)
    taken = get_type_hints(EngineOptions)
    assert set(taken) == set(table) - {"model"}, "EngineOptions needs a line for each row"
    kept = get_type_hints(EngineSettings)
    wider = {"device", "cutoff_layers", "compress_layers"}
    assert {name for name in taken if taken[name] != kept[name]} == wider
    assert all(set(get_args(kept[name])) & set(get_args(taken[name])) for name in wider)
    shown = inspect.signature(Reranker).parameters
    assert {name: each.default for name, each in shown.items()} == {
        name: each.default for name, each in table.items()
    }
    assert {name: each.annotation for name, each in shown.items()} == {"model": str, **taken}
    for described in (Reranker.__init__, EngineSettings):
        text = " ".join(described.__doc__.split())
        assert [name for name in table if f" {name}: {table[name].sentence}" not in text] == []


def test_an_option_that_is_not_known_is_refused_by_its_name():
    with pytest.raises(TypeError, match=r"'max_lenght'; did you mean 'max_length'.*takes mod"):
        Reranker("tiny", max_lenght=3)
    with pytest.raises(TypeError, match=r"'colour'\. It takes model, device, .*max_queued_pairs"):
        Reranker("tiny", colour="blue")
