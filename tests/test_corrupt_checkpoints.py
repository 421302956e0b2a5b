"""Damaged and hostile checkpoints: an error that names the file, and none of their code is run."""

import json
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bge_rerank_adapters import (
    CheckpointError,
    Reranker,
    RerankError,
    SettingsError,
    UnsupportedCheckpointError,
)
from tests.checkpoints import build_bert, build_xlm_roberta
from tests.texts import DOCUMENTS, QUERY

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
FILES = (WEIGHTS, CONFIG, TOKENIZER)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = f"{WEIGHTS}.index.json"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_xlm_roberta(tmp_path_factory.mktemp("sound") / "checkpoint")


@pytest.fixture(scope="module")
def sharded(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(sound, tmp_path_factory.mktemp("sharded") / "checkpoint"))
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    index = {"weight_map": {name: SHARDS[i % 2] for i, name in enumerate(sorted(tensors))}}
    (folder / INDEX).write_text(json.dumps(index), "utf-8")
    for shard in SHARDS:
        part = {name: tensors[name] for name, file in index["weight_map"].items() if file == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """Return a copy of a sound checkpoint, for the test to spoil."""
    return Path(shutil.copytree(sound, tmp_path / "checkpoint"))


def load(folder: Path) -> Reranker:
    return Reranker(str(folder), device="cpu", dtype="float32")


def refusal(folder: Path, *parts: object) -> str:
    """Return the error of loading, which has all parts and is a single readable line."""
    with pytest.raises(CheckpointError) as info:
        load(folder).close()
    text = str(info.value)
    missing = [part for part in parts if str(part) not in text]
    assert not missing, f"{missing} not in: {text}"
    assert len(text) < 1000
    return text


def edit_weights(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path: Path, **entries: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **entries}), "utf-8")


class Trap:
    """Leaves a mark if it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


# Every file


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("left", [0.0, 0.001, 0.5, 0.98])
def test_a_truncated_file_is_named(folder, name, left):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(left * len(data))])
    refusal(folder, folder / name)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_zeros_is_named(folder, name):
    (folder / name).write_bytes(bytes((folder / name).stat().st_size))
    refusal(folder, folder / name)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    refusal(folder, folder, name)


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_place_of_a_file_is_named(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    refusal(folder, folder, name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("other", FILES)
def test_a_file_with_the_content_of_another_is_named(folder, sound, name, other):
    if name != other:
        shutil.copyfile(sound / other, folder / name)
        refusal(folder, folder / name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("write", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_a_pickle_in_place_of_a_file_is_named_and_not_run(folder, tmp_path, name, write):
    mark = tmp_path / "trapped"
    with (folder / name).open("wb") as file:
        write(Trap(mark), file)
    refusal(folder, folder / name)
    assert not mark.exists()


@pytest.mark.parametrize("name", [*SHARDS, INDEX])
@pytest.mark.parametrize("left", [0.0, 0.5, 0.98])
def test_a_truncated_shard_or_index_is_named(sharded, tmp_path, name, left):
    folder = Path(shutil.copytree(sharded, tmp_path / "checkpoint"))
    with load(folder) as engine:
        assert len(engine.rerank(QUERY, DOCUMENTS)) == 4
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(left * len(data))])
    refusal(folder, folder / name)


def test_swapped_shards_are_as_good_as_any_order_of_tensors(sharded, tmp_path):
    """Tensors are found by their names, so no shard can be read for another."""
    folder = Path(shutil.copytree(sharded, tmp_path / "checkpoint"))
    shutil.copyfile(sharded / SHARDS[0], folder / SHARDS[1])
    shutil.copyfile(sharded / SHARDS[1], folder / SHARDS[0])
    with load(folder) as engine, load(sharded) as reference:
        assert engine.logits(QUERY, DOCUMENTS) == reference.logits(QUERY, DOCUMENTS)


def test_a_shard_twice_is_a_checkpoint_that_lacks_tensors(sharded, tmp_path):
    folder = Path(shutil.copytree(sharded, tmp_path / "checkpoint"))
    shutil.copyfile(sharded / SHARDS[0], folder / SHARDS[1])
    refusal(folder, folder, "lack the tensor")


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "[]"])
def test_an_index_of_another_form_is_named(sharded, tmp_path, index):
    folder = Path(shutil.copytree(sharded, tmp_path / "checkpoint"))
    (folder / INDEX).write_text(index, "utf-8")
    refusal(folder, folder / INDEX)


def test_a_shard_outside_the_folder_is_not_read(sharded, tmp_path):
    folder = Path(shutil.copytree(sharded, tmp_path / "checkpoint"))
    outside = {name: f"../{name}" for name in SHARDS}
    for name, path in outside.items():
        (folder / name).rename(folder / path)
    text = (folder / INDEX).read_text("utf-8")
    for name, path in outside.items():
        text = text.replace(name, path)
    (folder / INDEX).write_text(text, "utf-8")
    refusal(folder, folder / INDEX, "../model")


# Weights


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_no_floating_point_numbers_are_named(folder, dtype):
    name = "roberta.encoder.layer.1.output.dense.weight"

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)

    edit_weights(folder / WEIGHTS, edit)
    refusal(folder, folder / WEIGHTS, name, str(dtype).removeprefix("torch."), "float")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_floating_point_type_are_read(folder, sound, dtype):
    with load(sound) as engine:
        reference = engine.logits(QUERY, DOCUMENTS)
    edit_weights(
        folder / WEIGHTS, lambda t: t.update({name: each.to(dtype) for name, each in t.items()})
    )
    with load(folder) as engine:
        assert engine.logits(QUERY, DOCUMENTS) == pytest.approx(reference, abs=0.2)


@pytest.mark.parametrize(
    "reshape",
    [torch.Tensor.flatten, torch.Tensor.t, lambda t: t[:-1], lambda t: t[None], lambda t: t[:0]],
    ids=["flat", "transposed", "shorter", "deeper", "empty"],
)
def test_a_tensor_of_another_shape_is_named(folder, reshape):
    name = "roberta.encoder.layer.1.output.dense.weight"

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = reshape(tensors[name]).contiguous().clone()

    edit_weights(folder / WEIGHTS, edit)
    refusal(folder, folder / WEIGHTS, name, "shape")


@pytest.mark.parametrize("shape", [(0, 64), (), (3, 64)])
def test_a_head_that_gives_no_single_label_is_refused(folder, shape):
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["classifier.out_proj.weight"] = torch.ones(shape)

    edit_weights(folder / WEIGHTS, edit)
    refusal(folder, folder)


@pytest.mark.parametrize("build", [build_xlm_roberta, build_bert])
def test_extra_labels_are_counted(build, tmp_path):
    build(tmp_path / "labels", labels=3)
    with pytest.raises(UnsupportedCheckpointError, match="3 labels"):
        load(tmp_path / "labels")


def test_weights_of_another_architecture_are_named(folder, tmp_path):
    build_bert(tmp_path / "bert")
    shutil.copyfile(tmp_path / "bert" / WEIGHTS, folder / WEIGHTS)
    refusal(folder, folder / WEIGHTS, "classifier.out_proj.weight")


def test_more_layers_than_the_config_says_are_refused(folder):
    """Run without them it would give numbers, and wrong ones."""
    edit_json(folder / CONFIG, num_hidden_layers=2)
    refusal(folder, folder / WEIGHTS, "layer.2", "num_hidden_layers")


# The config


CONFIG_KEYS = (
    *("model_type", "architectures", "num_hidden_layers", "hidden_size", "num_attention_heads"),
    *("intermediate_size", "vocab_size", "max_position_embeddings", "type_vocab_size"),
    *("layer_norm_eps", "hidden_act", "pad_token_id", "position_embedding_type"),
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.sampled_from([-1, 0, 1, 2, 3, 5, 64, 1e400, -1e400])
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=3,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(key=st.sampled_from(CONFIG_KEYS), value=json_values)
@example("hidden_size", math.inf)
@example("num_attention_heads", 0)
@example("num_attention_heads", 5)
@example("num_hidden_layers", 0)
@example("num_hidden_layers", -1)
@example("pad_token_id", -1)
@example("pad_token_id", 513)
@example("layer_norm_eps", math.nan)
@example("layer_norm_eps", -1.0)
@example("model_type", ["bert"])
@example("architectures", 5)
@example("architectures", [{}])
@example("hidden_act", ["gelu"])
def test_any_value_in_the_config_is_refused_by_name_or_gives_scores(
    sound, tmp_path_factory, key, value
):
    folder = tmp_path_factory.mktemp("config") / "checkpoint"
    folder.mkdir()
    for path in sound.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / CONFIG).unlink()
    shutil.copyfile(sound / CONFIG, folder / CONFIG)
    edit_json(folder / CONFIG, **{key: value})
    try:
        engine = load(folder)
    except CheckpointError as error:
        if str(folder) not in str(error):
            pytest.fail(f"{key}={value!r}: the folder is not named: {error}")
        return
    except SettingsError:
        return
    with engine:
        try:
            assert len(engine.rerank(QUERY, DOCUMENTS)) == 4
        except RerankError as error:
            pytest.fail(f"{key}={value!r} was let in and failed later: {error}")


@pytest.mark.parametrize(
    "text",
    [*("[" * 100_000, '{"a":' * 100_000, '{"model_type"', "\ufeff{}"), "", "3", "NaN", '"text"'],
    ids=str.__len__,
)
def test_a_config_of_another_form_is_named(folder, text):
    (folder / CONFIG).write_text(text, "utf-8")
    refusal(folder, folder / CONFIG)


# The tokenizer


def _spoil(text: str, path: list[str], value: object) -> str:
    tokenizer = json.loads(text)
    inner = tokenizer
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return json.dumps(tokenizer)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["model"], None),
        (["model", "vocab"], []),
        (["model", "vocab"], [["a", "b"]]),
        (["model", "unk_id"], 10**6),
        (["model", "type"], "WordLevel"),
        (["normalizer"], {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        (["pre_tokenizer"], {"type": "None such"}),
        (["post_processor"], None),
        (["post_processor"], {"type": "TemplateProcessing"}),
        (["added_tokens"], [{"id": 10**9, "content": "x"}]),
        (["truncation"], {"max_length": 1}),
        (["version"], "9.9"),
    ],
    ids=str,
)
def test_a_spoilt_tokenizer_is_named(folder, path, value):
    text = (folder / TOKENIZER).read_text("utf-8")
    (folder / TOKENIZER).write_text(_spoil(text, path, value), "utf-8")
    refusal(folder, folder, "tokenizer")


@pytest.mark.parametrize("size", [0, 10, 1000])
def test_random_bytes_in_place_of_a_tokenizer_are_named(folder, size):
    (folder / TOKENIZER).write_bytes(bytes(i * 97 % 256 for i in range(size)))
    refusal(folder, folder / TOKENIZER)


def test_code_that_a_checkpoint_brings_is_not_run(folder, tmp_path):
    """By the names under which transformers looks for it, for a tokenizer that needs conversion."""
    mark = tmp_path / "trapped"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')", "utf-8")
    code = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}
    edit_json(folder / CONFIG, auto_map=code)
    edit_json(folder / "tokenizer_config.json", auto_map=code)
    with load(folder) as engine:
        assert len(engine.rerank(QUERY, DOCUMENTS)) == 4
    edit_json(folder / "tokenizer_config.json", tokenizer_class="Evil")
    refusal(folder, folder, "tokenizer_class 'Evil'")
    (folder / TOKENIZER).unlink()
    (folder / "vocab.txt").write_text("a\nb\n", "utf-8")
    refusal(folder, folder, "vocab.txt")
    assert not mark.exists()
