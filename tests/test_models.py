"""The encoder against transformers, and what it reads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification

from bge_rerank_adapters import CheckpointError, Reranker, UnsupportedCheckpointError
from bge_rerank_adapters.engine.models.layers.activations import ACTIVATIONS
from bge_rerank_adapters.engine.models.loading import (
    load_model,
    load_pair_tokenizer,
    read_checkpoint,
)
from bge_rerank_adapters.engine.text.pairs import TokenPair
from bge_rerank_adapters.settings import EngineSettings
from tests.checkpoints import (
    build_bert,
    build_roberta,
    build_xlm_roberta,
    read_queries,
    read_sentences,
)

PARITY = 1e-4
BUILD = {"xlm-roberta": build_xlm_roberta, "roberta": build_roberta, "bert": build_bert}
# Their own names for padding stand in the text: they are read as the padding token.
PADS = ("<pad> before", "between <pad><pad> two", "after [PAD]", "[PAD] [PAD] x")
PAIRS = [
    *zip(list(read_queries().values())[:20], list(read_sentences().values())[:20], strict=True),
    *(("Where is the <pad> [PAD]?", text) for text in PADS),
    ("", ""),
]


@pytest.fixture(scope="module", params=BUILD)
def folder(request, tmp_path_factory) -> Path:
    return BUILD[request.param](tmp_path_factory.mktemp(request.param))


def own_logits(folder: Path, **settings) -> list[float]:
    settings = {"device": "cpu", "dtype": "float32", **settings}
    with Reranker(str(folder), **settings) as reranker:
        return [reranker.logits(query, [document])[0] for query, document in PAIRS]


def packed(folder: Path) -> list[TokenPair]:
    settings = EngineSettings(model=folder)
    tokenizer = load_pair_tokenizer(read_checkpoint(folder, settings), settings)
    return sorted(tokenizer.tokenize(PAIRS).distinct, key=len)


@torch.no_grad()
def plain_logits(folder: Path) -> list[float]:
    """Score each pair alone with transformers, from the ids of the tokenizer's own template."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = AutoModelForSequenceClassification.from_pretrained(folder).float().eval()
    has_types = model.config.type_vocab_size > 1
    logits = []
    for pair in PAIRS:
        encoding = tokenizer.encode(*pair)
        types = {"token_type_ids": torch.tensor([encoding.type_ids])} if has_types else {}
        logits.append(model(input_ids=torch.tensor([encoding.ids]), **types).logits.item())
    return logits


def copy_of(folder: Path, to: Path, *, weights: bool = True, **config) -> Path:
    """Copy a checkpoint, some entries of its config changed."""
    changed = json.loads((folder / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps(changed))
    for name in ("tokenizer.json", "model.safetensors")[: 1 + weights]:
        (to / name).write_bytes((folder / name).read_bytes())
    return to


def assert_near(ours: list[float], theirs: list[float], within: float = PARITY) -> None:
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= within


def test_logits_equal_transformers(folder):
    wanted = plain_logits(folder)
    assert max(wanted) - min(wanted) > 0.5, "too flat to compare"
    assert_near(own_logits(folder), wanted)


def test_the_padding_token_is_among_the_texts_ids(folder):
    config = json.loads((folder / "config.json").read_text())
    assert sum(config["pad_token_id"] in pair.ids for pair in packed(folder)) >= 4


def test_a_whole_pack_equals_its_pairs_alone(folder):
    settings = EngineSettings(model=folder, dtype="float32")
    checkpoint = read_checkpoint(folder, settings)
    tokenizer = load_pair_tokenizer(checkpoint, settings)
    model = load_model(checkpoint, settings, tokenizer=tokenizer, device=torch.device("cpu"))
    pairs = packed(folder)
    alone = [model.logits([pair])[0] for pair in pairs]
    assert_near(model.logits(pairs), alone, 1e-5)
    assert_near(model.logits(pairs[::-1])[::-1], alone, 1e-5)
    assert all(type(logit) is float for logit in alone)


def test_sharded_weights_give_the_same(folder, tmp_path):
    copy_of(folder, tmp_path, weights=False)
    tensors = load_file(folder / "model.safetensors")
    shards = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    for number, (name, tensor) in enumerate(tensors.items()):
        list(shards.values())[number % 2][name] = tensor
    for file, part in shards.items():
        save_file(part, tmp_path / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert own_logits(tmp_path) == own_logits(folder)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00002\.safetensors"):
        own_logits(tmp_path)


def test_old_names_of_layer_norms_are_read(folder, tmp_path):
    copy_of(folder, tmp_path, weights=False)
    tensors = load_file(folder / "model.safetensors")
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in tensors.items()
    }
    assert set(renamed) != set(tensors)
    save_file(renamed, tmp_path / "model.safetensors")
    assert own_logits(tmp_path) == own_logits(folder)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_equal_transformers(activation, tmp_path_factory):
    gelu = build_xlm_roberta(tmp_path_factory.mktemp("gelu"))
    changed = copy_of(gelu, tmp_path_factory.mktemp(activation), hidden_act=activation)
    ours = own_logits(changed)
    assert_near(ours, plain_logits(changed))
    assert (ours == own_logits(gelu)) == (activation == "gelu")


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"hidden_act": "mish"}, UnsupportedCheckpointError, "hidden_act 'mish' is not known"),
        (
            {"position_embedding_type": "relative_key"},
            UnsupportedCheckpointError,
            "position_embedding_type must be 'absolute'",
        ),
        (
            {"is_decoder": True},
            UnsupportedCheckpointError,
            "is_decoder is True, .* Write false there",
        ),
        (
            {"model_type": "t5"},
            UnsupportedCheckpointError,
            "'t5' model .*is not supported; supported",
        ),
        ({"hidden_size": None}, CheckpointError, "config.json: missing or unusable"),
        ({"pad_token_id": None}, CheckpointError, "pad_token_id is null, but positions count from"),
        ({"hidden_size": 32}, CheckpointError, "has shape .* but config.json asks for"),
        ({"num_hidden_layers": 4}, CheckpointError, "the weights lack the tensor .*layer.3"),
        ({"vocab_size": 100}, CheckpointError, "embeddings for 100; tokenizer and weights are not"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configs_that_cannot_be_run_are_named(config, error, message, tmp_path_factory):
    folder = build_xlm_roberta(tmp_path_factory.mktemp("good"))
    with pytest.raises(error, match=message):
        own_logits(copy_of(folder, tmp_path_factory.mktemp("bad"), **config))


def test_a_bert_needs_no_padding_token(tmp_path):
    """Its positions do not depend on it."""
    folder = build_bert(tmp_path / "bert")
    (tmp_path / "null").mkdir()
    changed = copy_of(folder, tmp_path / "null", pad_token_id=None)
    assert_near(own_logits(changed), plain_logits(changed))


@pytest.mark.parametrize("build", BUILD.values())
def test_several_labels_are_refused(build, tmp_path):
    with pytest.raises(UnsupportedCheckpointError, match="a classifier of 3 labels; a reranker"):
        own_logits(build(tmp_path, labels=3))


def test_absent_pickled_and_damaged_weights_are_named(folder, tmp_path):
    copy_of(folder, tmp_path, weights=False)
    with pytest.raises(CheckpointError, match=r"has no weights: neither model\.safetensors nor"):
        own_logits(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin only, a pickle"):
        own_logits(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"\xff" * 64):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is damaged or incomplete"):
            own_logits(tmp_path)


def test_max_length_is_clamped_to_the_models_positions(tmp_path):
    folder = build_xlm_roberta(tmp_path, positions=66)
    settings = EngineSettings(model=folder)
    tokenizer = load_pair_tokenizer(read_checkpoint(folder, settings), settings)
    assert tokenizer.max_length == 64
    with Reranker(str(folder), device="cpu", dtype="float32") as reranker:
        [result] = reranker.rerank("what?", ["a very long text " * 100])
    assert result.truncated


@pytest.mark.parametrize(("dtype", "within"), [("bfloat16", 0.5), ("float16", 0.1)])
def test_half_types_stay_near(folder, dtype, within):
    exact, half = own_logits(folder), own_logits(folder, dtype=dtype)
    assert_near(half, exact, within)
    assert half != exact
