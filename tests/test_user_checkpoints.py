"""Checkpoints as users have them: run as they were made to run, or refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bge_rerank_adapters import CheckpointError, Reranker, UnsupportedCheckpointError
from tests.checkpoints import build_xlm_roberta
from tests.family_checkpoints import build_family
from tests.texts import DOCUMENTS, QUERY

WEIGHTS, CONFIG = "model.safetensors", "config.json"
LINEAR = "roberta.encoder.layer.1.output.dense"
CPU = {"device": "cpu", "dtype": "float32"}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_xlm_roberta(tmp_path_factory.mktemp("encoder") / "checkpoint")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_family(tmp_path_factory.mktemp("decoder") / "checkpoint", "decoder")


@pytest.fixture
def folder(encoder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(encoder, tmp_path / "checkpoint"))


def logits(folder: Path, **settings: object) -> list[float]:
    with Reranker(str(folder), **(CPU | settings)) as engine:
        return engine.logits(QUERY, DOCUMENTS)


def refusal(folder: Path, **settings: object) -> str:
    with pytest.raises(CheckpointError) as info:
        Reranker(str(folder), **(CPU | settings)).close()
    assert str(folder) in str(info.value)
    assert len(str(info.value)) < 1000
    return str(info.value)


def edit_weights(folder: Path, edit: Callable[[Tensors], Tensors]) -> None:
    save_file(edit(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def edit_json(path: Path, **entries: object) -> None:
    found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps(found | entries), "utf-8")


# Quantised weights


def in_float8(tensors: Tensors) -> Tensors:
    """As llm-compressor writes it: float8 weights and a scale beside each."""
    scaled = {}
    for name, tensor in tensors.items():
        if "encoder" in name and tensor.ndim == 2:
            scale = tensor.abs().max() / 448
            scaled[name] = (tensor / scale).to(torch.float8_e4m3fn)
            scaled[f"{name}_scale"] = scale[None]
        else:
            scaled[name] = tensor
    return scaled


def in_gptq(tensors: Tensors) -> Tensors:
    packed = {
        f"{LINEAR}.qweight": torch.zeros((16, 64), dtype=torch.int32),
        f"{LINEAR}.qzeros": torch.zeros((1, 8), dtype=torch.int32),
        f"{LINEAR}.scales": torch.ones((1, 64), dtype=torch.float16),
    }
    return {k: v for k, v in tensors.items() if k != f"{LINEAR}.weight"} | packed


def in_bitsandbytes(tensors: Tensors) -> Tensors:
    packed = {
        f"{LINEAR}.weight": torch.zeros((64 * 128 // 2, 1), dtype=torch.uint8),
        f"{LINEAR}.weight.absmax": torch.ones(128),
        f"{LINEAR}.weight.quant_map": torch.ones(16),
    }
    return tensors | packed


def with_scales(name: str) -> Callable[[Tensors], Tensors]:
    """As is left where someone widened the weights and forgot their scales."""
    return lambda tensors: tensors | {f"{LINEAR}.{name}": torch.ones(64)}


@pytest.mark.parametrize("settings", [{}, {"backend": "flagembedding"}], ids=["native", "flag"])
@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (in_float8, "float8_e4m3"),
        (in_gptq, "int32"),
        (in_bitsandbytes, "uint8"),
        (lambda t: t | {f"{LINEAR}.weight": t[f"{LINEAR}.weight"].to(torch.int8)}, "int8"),
        (with_scales("weight_scale"), f"{LINEAR}.weight_scale stands beside"),
        (with_scales("weight_scale_inv"), f"{LINEAR}.weight_scale_inv"),
        (with_scales("SCB"), f"{LINEAR}.SCB"),
        (with_scales("weight._scale"), f"{LINEAR}.weight._scale"),
    ],
    ids=["fp8", "gptq", "bitsandbytes", "int8", "scale", "scale_inv", "SCB", "torchao"],
)
def test_quantised_weights_are_refused_by_name(folder, edit, named, settings):
    edit_weights(folder, edit)
    error = refusal(folder, **settings)
    assert named in error
    assert "quantised" in error
    assert "use the checkpoint that was quantised" in error


@pytest.mark.parametrize("settings", [{}, {"backend": "flagembedding"}], ids=["native", "flag"])
@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "compressed-tensors", "fp8"])
def test_a_quantisation_config_is_refused_by_its_method(folder, method, settings):
    edit_json(folder / CONFIG, quantization_config={"quant_method": method})
    error = refusal(folder, **settings)
    assert f"quantization_config of the method {method!r}" in error
    assert "quantised" in error


def test_what_is_stored_beside_weights_without_quantising_them_is_let_in(folder, encoder):
    """Position ids of old releases, and an entry that says nothing."""
    buffer = {"roberta.embeddings.position_ids": torch.arange(514)[None]}
    edit_weights(folder, lambda tensors: tensors | buffer)
    edit_json(folder / CONFIG, quantization_config=None)
    assert logits(folder) == logits(encoder)


# Prefixes left by training


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod."]
)
@pytest.mark.parametrize("family", ["encoder", "decoder"])
def test_a_prefix_of_all_tensors_is_read(request, tmp_path, family, prefix):
    source = request.getfixturevalue(family)
    folder = Path(shutil.copytree(source, tmp_path / "checkpoint"))
    edit_weights(folder, lambda tensors: {prefix + k: v for k, v in tensors.items()})
    assert logits(folder) == logits(source)


def test_a_prefix_of_some_tensors_is_named(folder):
    edit_weights(
        folder,
        lambda tensors: {("module." if "dense" in k else "") + k: v for k, v in tensors.items()},
    )
    error = refusal(folder)
    assert "begin with 'module.'" in error
    assert "training left" in error


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("roberta.", "roberta._orig_mod.", "'_orig_mod.'"),
        ("query.weight", "query.base_layer.weight", "merge_and_unload"),
    ],
)
def test_what_training_left_inside_names_is_named(folder, old, new, named):
    edit_weights(folder, lambda tensors: {k.replace(old, new): v for k, v in tensors.items()})
    assert named in refusal(folder)


# A head of its own in a model whose config says that it has none


def test_a_stored_head_counts_where_the_config_says_tied(decoder, tmp_path):
    folder = Path(shutil.copytree(decoder, tmp_path / "checkpoint"))
    words = load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    other = torch.roll(words, 1, dims=0).contiguous()
    edit_weights(folder, lambda tensors: tensors | {"lm_head.weight": other})
    untied = Path(shutil.copytree(folder, tmp_path / "untied"))
    edit_json(untied / CONFIG, tie_word_embeddings=False)
    assert logits(folder) == logits(untied)
    assert logits(folder) != pytest.approx(logits(decoder), abs=0.1)


def test_a_stored_head_counts_as_in_flagembedding(decoder, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")
    pytest.importorskip("FlagEmbedding")
    assert transformers
    folder = Path(shutil.copytree(decoder, tmp_path / "checkpoint"))
    words = load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    other = torch.roll(words, 1, dims=0).contiguous()
    edit_weights(folder, lambda tensors: tensors | {"lm_head.weight": other})
    assert logits(folder) == pytest.approx(logits(folder, backend="flagembedding"), abs=1e-4)


# Weights in other forms


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("pytorch_model.bin", "pytorch_model.bin only, a pickle"),
        ("onnx/model.onnx", "onnx/model.onnx only, an ONNX model"),
        ("bge-q4_k_m.gguf", "bge-q4_k_m.gguf only, a GGUF model"),
        ("openvino/openvino_model.xml", "an OpenVINO model"),
        ("tf_model.h5", "TensorFlow or Flax"),
        ("checkpoint-500/model.safetensors", "a subfolder only (checkpoint-500/model.safetensors)"),
    ],
)
def test_weights_in_another_form_are_told_by_it(folder, name, named):
    (folder / WEIGHTS).unlink()
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).touch()
    (folder / "training_args.bin").touch()
    assert named in refusal(folder)


def test_a_folder_without_any_weights_says_so(folder):
    (folder / WEIGHTS).unlink()
    assert f"neither {WEIGHTS} nor" in refusal(folder)
    with pytest.raises(CheckpointError) as info:
        Reranker(str(folder), **CPU)
    assert not isinstance(info.value, UnsupportedCheckpointError)
