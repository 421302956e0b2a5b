"""LoRA adapters that peft writes: merged with their base to what peft itself makes of them."""

import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bge_rerank_adapters import CheckpointError, Reranker, UnsupportedCheckpointError
from bge_rerank_adapters.engine.checkpoints.adapter import read_adapter
from tests.checkpoints import build_bert, build_xlm_roberta
from tests.family_checkpoints import build_family
from tests.test_decoder_bases import build as build_decoder_base
from tests.texts import DOCUMENTS, QUERY

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

CPU = {"device": "cpu", "dtype": "float32"}
PARITY = 1e-4
ADAPTER, CONFIG, WEIGHTS = "adapter_model.safetensors", "adapter_config.json", "model.safetensors"
ENCODER_MODULES = ["query", "key", "value", "dense"]
CLASSES = {
    "encoder": transformers.AutoModelForSequenceClassification,
    "decoder": transformers.AutoModelForCausalLM,
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "encoder": build_xlm_roberta(root / "encoder"),
        "bert": build_bert(root / "bert"),
        "decoder": build_family(root / "decoder", "decoder"),
    }


@pytest.fixture(scope="module")
def adapter(bases, tmp_path_factory) -> Path:
    """An adapter of an encoder, for tests to copy and spoil."""
    return train(bases["encoder"], tmp_path_factory.mktemp("adapter") / "adapter")[0]


@pytest.fixture
def folder(adapter, tmp_path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


def train(base: Path, folder: Path, *, kind: str = "encoder", **options: Any) -> tuple[Path, Path]:
    """Write an adapter with random weights, and what peft merges it to; return both folders."""
    options = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ENCODER_MODULES if kind == "encoder" else "all-linear",
        "task_type": "SEQ_CLS" if kind == "encoder" else "CAUSAL_LM",
    } | options
    torch.manual_seed(1)  # peft draws what is multiplied with the shifts below
    model = CLASSES[kind].from_pretrained(base)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    shift_trained(adapted)
    adapted.save_pretrained(folder)
    merged = folder.with_name(f"{folder.name}-merged")
    adapted.merge_and_unload().save_pretrained(merged)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, merged / name)
    return folder, merged


def shift_trained(model: torch.nn.Module) -> None:
    """Move all that was to be trained by a fixed random step, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.15 * torch.randn(parameter.shape, generator=generator)


def logits(folder: Path, **settings: object) -> list[float]:
    with Reranker(str(folder), **(CPU | settings)) as engine:
        return engine.logits(QUERY, DOCUMENTS)


def edit(folder: Path, **entries: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | entries), "utf-8")


def edit_weights(folder: Path, change: Any) -> None:
    save_file(change(load_file(folder / ADAPTER)), folder / ADAPTER, metadata={"format": "pt"})


def refusal(folder: Path, *parts: str, **settings: object) -> CheckpointError:
    with pytest.raises(CheckpointError) as info:
        Reranker(str(folder), **(CPU | settings)).close()
    for part in (str(folder), *parts):
        assert part in str(info.value)
    return info.value


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("encoder", {}),
        ("encoder", {"use_rslora": True}),
        ("encoder", {"modules_to_save": ["classifier"]}),
        (
            "encoder",
            {
                "rank_pattern": {"layer.1.attention.self.query": 7, r"layer\.2\..*dense": 2},
                "alpha_pattern": {"value": 3, "output.dense": 11},
            },
        ),
        ("encoder", {"target_modules": ["value"], "layers_to_transform": [1]}),
        ("bert", {}),
        ("decoder", {}),
        ("decoder", {"rank_pattern": {"q_proj": 9}, "target_modules": ["q_proj", "down_proj"]}),
        ("decoder", {"modules_to_save": ["lm_head"]}),
        ("decoder", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    ],
    ids=str,
)
def test_an_adapter_gives_what_peft_merges_it_to(bases, tmp_path, base, options):
    kind = "decoder" if base == "decoder" else "encoder"
    folder, merged = train(bases[base], tmp_path / "adapter", kind=kind, **options)
    scored = logits(folder)
    assert scored == pytest.approx(logits(merged), abs=PARITY)
    assert scored != pytest.approx(logits(bases[base]), abs=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_in_half_precision_is_merged_in_float32(bases, tmp_path, dtype):
    base = Path(shutil.copytree(bases["encoder"], tmp_path / "half"))
    halved = {k: v.to(dtype) for k, v in load_file(base / WEIGHTS).items()}
    save_file(halved, base / WEIGHTS, metadata={"format": "pt"})
    wide = Path(shutil.copytree(base, tmp_path / "wide"))
    widened = {k: v.float() for k, v in halved.items()}
    save_file(widened, wide / WEIGHTS, metadata={"format": "pt"})
    folder, merged = train(wide, tmp_path / "adapter")
    edit(folder, base_model_name_or_path=str(base))
    assert logits(folder) == pytest.approx(logits(merged), abs=PARITY)


def test_int8_and_several_shards_run_as_well(bases, tmp_path):
    folder, merged = train(bases["encoder"], tmp_path / "adapter")
    assert logits(folder, dtype="int8") == pytest.approx(logits(merged, dtype="int8"), abs=0.05)


@pytest.mark.parametrize("family", ["layerwise", "lightweight"])
def test_adapters_of_the_other_families_are_merged(tmp_path, family):
    """Which transformers 5 does not run, so the merge is computed here."""
    base = build_family(tmp_path / "base", family)
    tensors = load_file(base / WEIGHTS)
    generator = torch.Generator().manual_seed(5)
    name = "model.layers.1.self_attn.v_proj"
    outputs, inputs = tensors[f"{name}.weight"].shape
    down, up = (0.3 * torch.randn(s, generator=generator) for s in ((3, inputs), (outputs, 3)))
    head = 2 * tensors["lm_head.0.linear_head.weight"]
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / CONFIG).write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "base_model_name_or_path": str(base),
                "r": 3,
                "lora_alpha": 6,
                "modules_to_save": ["lm_head"],
            }
        )
    )
    stored = {
        f"base_model.model.{name}.lora_A.weight": down,
        f"base_model.model.{name}.lora_B.weight": up,
        "base_model.model.lm_head.0.linear_head.weight": head,
    }
    save_file(stored, folder / ADAPTER)
    merged = Path(shutil.copytree(base, tmp_path / "merged"))
    tensors[f"{name}.weight"] += 2 * up @ down
    tensors["lm_head.0.linear_head.weight"] = head
    save_file(tensors, merged / WEIGHTS, metadata={"format": "pt"})
    assert logits(folder) == pytest.approx(logits(merged), abs=PARITY)
    assert logits(folder) != pytest.approx(logits(base), abs=0.1)


@pytest.mark.parametrize("name", ["llama-biases", "mistral-window", "qwen2", "qwen3-layer-types"])
def test_adapters_of_the_other_bases_of_decoders_are_merged(tmp_path, name):
    base = build_decoder_base(tmp_path / "base", name)
    folder, merged = train(base, tmp_path / "adapter", kind="decoder")
    scored = logits(folder, family="decoder")
    assert scored == pytest.approx(logits(merged, family="decoder"), abs=PARITY)
    assert scored != pytest.approx(logits(base, family="decoder"), abs=0.1)


def test_a_head_of_its_own_is_merged_as_any_linear_layer(tmp_path):
    """Newer releases of peft store what it is added to as well."""
    base = build_decoder_base(tmp_path / "base", "llama")
    options = {"target_modules": ["q_proj", "lm_head"]}
    folder, merged = train(base, tmp_path / "adapter", kind="decoder", **options)
    scored = logits(folder, family="decoder")
    assert scored == pytest.approx(logits(merged, family="decoder"), abs=PARITY)
    assert "base_model.model.lm_head.base_layer.weight" in load_file(folder / ADAPTER)


@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["q_proj", "lm_head"]}]
)
def test_a_change_of_one_of_tied_tensors_is_refused(bases, tmp_path, options):
    folder, _ = train(bases["decoder"], tmp_path / "adapter", kind="decoder", **options)
    refusal(folder, "changes only one of model.embed_tokens.weight and lm_head.weight")


def test_resized_embeddings_are_told_by_their_rows(tmp_path):
    base = build_decoder_base(tmp_path / "base", "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(1016)
    options = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    folder = tmp_path / "adapter"
    peft.get_peft_model(model, options).save_pretrained(folder, save_embedding_layers=True)
    refusal(folder, "has 1016 rows, but vocab_size", "merge_and_unload()", family="decoder")


def test_an_adapter_with_a_classification_head_is_refused(tmp_path):
    base = build_decoder_base(tmp_path / "base", "llama")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    options = peft.LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS")
    folder = tmp_path / "adapter"
    peft.get_peft_model(model, options).save_pretrained(folder)
    refusal(folder, "score.weight", "config.json does not have", family="decoder")


def test_a_base_that_was_saved_without_a_head_takes_the_adapters(bases, tmp_path):
    """As of an embedding model, whose tensors' names lack the inner model's."""
    base = Path(shutil.copytree(bases["encoder"], tmp_path / "headless"))
    tensors = load_file(base / WEIGHTS)
    inner = {k.removeprefix("roberta."): v for k, v in tensors.items() if "classifier" not in k}
    save_file(inner, base / WEIGHTS, metadata={"format": "pt"})
    folder, merged = train(base, tmp_path / "adapter")
    assert logits(folder) == pytest.approx(logits(merged), abs=PARITY)


def test_an_adapter_brings_its_own_tokenizer_if_it_has_one(bases, adapter, folder):
    shutil.copyfile(bases["encoder"] / "tokenizer.json", folder / "tokenizer.json")
    assert logits(folder) == logits(adapter)
    (folder / "tokenizer.json").write_text("{}", "utf-8")
    refusal(folder, "tokenizer.json")


def test_names_that_older_releases_of_peft_wrote_are_read(adapter, folder):
    def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            k.replace(".lora_A.", ".lora_A.default.").replace(
                "classifier.", "classifier.modules_to_save.default."
            ): v
            for k, v in tensors.items()
        }

    edit_weights(folder, rename)
    assert logits(folder) == logits(adapter)


def test_the_base_and_its_revision_are_asked_of_the_hub(bases, folder, adapter, monkeypatch):
    asked = []

    def download(name: str, *, revision: str | None, token: str | None, **_: object) -> str:
        asked.append((name, revision, token))
        return str(bases["encoder"] if name == "an/base" else folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    edit(folder, base_model_name_or_path="an/base", revision="v2")
    with Reranker("an/adapter", revision="v9", token="hf_x", **CPU) as engine:  # noqa: S106
        assert engine.logits(QUERY, DOCUMENTS) == logits(adapter)
    assert asked == [("an/adapter", "v9", "hf_x"), ("an/base", "v2", "hf_x")]


# Refusals


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("peft_type", "IA3"),
        ("use_dora", True),
        ("bias", "all"),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [3]),
        ("target_parameters", ["x"]),
        ("use_qalora", True),
        ("alora_invocation_tokens", [1]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "olora"),
        ("some_new_option", {"a": 1}),
    ],
)
def test_what_goes_beyond_plain_lora_is_refused_by_name(folder, entry, value):
    edit(folder, **{entry: value})
    error = refusal(folder, CONFIG, entry, "merge_and_unload()")
    assert isinstance(error, UnsupportedCheckpointError)


@pytest.mark.parametrize("begun", [True, False, "gaussian", "eva", "orthogonal"])
def test_beginnings_that_leave_the_base_alone_are_let_in(folder, adapter, begun):
    edit(folder, init_lora_weights=begun)
    assert logits(folder) == logits(adapter)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"target_modules": ["word_embeddings", "query"]}, "lora_embedding"),
        ({"bias": "lora_only"}, "bias"),
        ({"use_dora": True}, "use_dora"),
    ],
)
def test_what_peft_writes_for_more_than_linear_layers_is_refused(bases, tmp_path, options, named):
    folder, _ = train(bases["encoder"], tmp_path / "adapter", **options)
    refusal(folder, named)


@pytest.mark.parametrize(
    "entries",
    [
        {"r": 0},
        {"r": "8"},
        {"lora_alpha": None},
        {"lora_alpha": float("inf")},
        {"base_model_name_or_path": None},
        {"rank_pattern": {"(": 3}},
        {"rank_pattern": [1]},
        {"alpha_pattern": {"query": "x"}},
        {"modules_to_save": [3]},
    ],
    ids=str,
)
def test_a_damaged_config_is_named(folder, entries):
    edit(folder, **entries)
    refusal(folder, CONFIG)


def test_another_rank_than_the_config_says_is_named(folder):
    edit(folder, r=5)
    refusal(folder, ADAPTER, "shape")


def test_a_missing_half_is_named(folder):
    edit_weights(folder, lambda t: {k: v for k, v in t.items() if "layer.1" not in k or "_A" in k})
    refusal(folder, ADAPTER, "only one of lora_A and lora_B")


def test_an_adapter_of_another_model_is_named(bases, folder):
    edit(folder, base_model_name_or_path=str(bases["bert"]))
    refusal(folder, ADAPTER, "lacks")


def test_a_base_that_is_not_there_is_named(folder):
    edit(folder, base_model_name_or_path="./gone")
    refusal(folder, "LoRA adapter", "'./gone'", "base_model_name_or_path")


def test_an_adapter_of_an_adapter_is_refused(folder, adapter):
    edit(folder, base_model_name_or_path=str(adapter))
    refusal(folder, "is an adapter itself")


def test_a_quantised_base_is_refused(bases, folder, tmp_path):
    base = Path(shutil.copytree(bases["encoder"], tmp_path / "base"))
    found = json.loads((base / "config.json").read_text("utf-8"))
    found["quantization_config"] = {"quant_method": "bitsandbytes"}
    (base / "config.json").write_text(json.dumps(found), "utf-8")
    edit(folder, base_model_name_or_path=str(base))
    with pytest.raises(UnsupportedCheckpointError, match="'bitsandbytes'"):
        logits(folder)


def test_quantised_adapters_are_refused(folder):
    edit_weights(folder, lambda t: {k: v.to(torch.float8_e4m3fn) for k, v in t.items()})
    refusal(folder, ADAPTER, "quantised")


def test_a_pickled_adapter_is_refused(folder):
    torch.save(load_file(folder / ADAPTER), folder / "adapter_model.bin")
    (folder / ADAPTER).unlink()
    refusal(folder, "adapter_model.bin only, a pickle")


def test_an_adapter_beside_a_whole_model_is_refused(bases, folder):
    shutil.copyfile(bases["encoder"] / WEIGHTS, folder / WEIGHTS)
    refusal(folder, "a whole model")


def test_flagembedding_is_not_given_an_adapter(folder):
    refusal(folder, "LoRA adapter", 'backend="native"', backend="flagembedding")


CONFIG_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 40) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=3,
)
CONFIG_KEYS = (
    *("peft_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "rank_pattern"),
    *("alpha_pattern", "use_rslora", "modules_to_save", "bias", "init_lora_weights", "use_dora"),
    *("target_modules", "anything"),
)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(key=st.sampled_from(CONFIG_KEYS), value=CONFIG_VALUES)
def test_any_value_in_the_config_is_refused_by_name_or_gives_scales(key, value):
    plain = {"peft_type": "LORA", "base_model_name_or_path": "b", "r": 2, "lora_alpha": 3}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONFIG).write_text(json.dumps(plain | {key: value}), "utf-8")
        try:
            found = read_adapter(Path(folder))
        except CheckpointError as error:
            assert CONFIG in str(error)  # noqa: PT017
        else:
            assert found is not None
            assert math.isfinite(found.scale_of("model.layers.0.q_proj"))
