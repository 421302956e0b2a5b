"""Configs and weights of decoders as users have them: run as transformers does, or refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bge_rerank_adapters import CheckpointError, Reranker, RerankError, SettingsError
from tests.family_checkpoints import build_family
from tests.test_decoder_bases import LLAMA3, YARN, build, ours, pairs, theirs, token_ids, yes_id

pytest.importorskip("transformers", minversion="5.0")

WEIGHTS, CONFIG = "model.safetensors", "config.json"
GEMMA, LAYERWISE, LIGHTWEIGHT = "decoder", "layerwise", "lightweight"
PAIRS = pairs()[:4]
Tensors = dict[str, torch.Tensor]


def make(folder: Path, base: str, **config: object) -> Path:
    """Build one of the families, or one of the other bases; then change entries of its config."""
    own = base in (GEMMA, LAYERWISE, LIGHTWEIGHT)
    build_family(folder, base) if own else build(folder, base)
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | config), "utf-8")
    return folder


def without(folder: Path, *names: str) -> Path:
    path = folder / CONFIG
    entries = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({k: v for k, v in entries.items() if k not in names}), "utf-8")
    return folder


def edit_weights(folder: Path, edit: Callable[[Tensors], Tensors]) -> Path:
    tensors = {name: each.clone() for name, each in load_file(folder / WEIGHTS).items()}
    save_file(edit(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def refusal(folder: Path, *parts: str, base: str = GEMMA, **more: Any) -> str:
    family = base if base in (LAYERWISE, LIGHTWEIGHT) else "decoder"
    with pytest.raises(CheckpointError) as info:
        Reranker(str(folder), family=family, device="cpu", dtype="float32", **more).close()
    text = str(info.value)
    assert str(folder) in text
    missing = [part for part in parts if part not in text]
    assert not missing, f"{missing} not in: {text}"
    assert len(text) < 1000
    return text


def same_as_transformers(folder: Path) -> list[float]:
    expected = theirs(folder, token_ids(folder, PAIRS), yes_id(folder))
    found = ours(folder, PAIRS)
    assert found == pytest.approx(expected, abs=1e-4)
    return found


# Entries of the config


@pytest.mark.parametrize(
    ("base", "config"),
    [
        (GEMMA, {"hidden_act": "gelu_pytorch_tanh"}),
        (GEMMA, {"hidden_act": "relu", "hidden_activation": "relu"}),
        (GEMMA, {"rope_scaling": {"rope_type": "linear", "factor": 3}}),
        ("llama", {"rope_parameters": {"rope_theta": 70.0}}),
        ("llama", {"rope_theta": 700.0, "rope_parameters": {"type": "linear", "factor": 3}}),
        ("llama3-rotary", {"original_max_position_embeddings": 200}),
        ("llama", {"rope_scaling": YARN, "original_max_position_embeddings": 100}),
        ("llama", {"rope_scaling": YARN | {"factor": None}}),
        ("llama", {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}}),
        ("llama", {"rope_scaling": YARN | {"truncate": False}}),
        ("llama", {"is_causal": True, "use_bidirectional_attention": None, "per_layer_config": {}}),
        ("llama", {"eos_token_id": [1, 2], "pad_token_id": None, "bos_token_id": 7}),
        ("llama", {"is_decoder": True, "add_cross_attention": True, "pretraining_tp": 2}),
        ("llama", {"rms_norm_eps": 0.5}),
        ("mistral", {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": None}),
    ],
    ids=str,
)
def test_entries_count_as_in_transformers(tmp_path, base, config):
    same_as_transformers(make(tmp_path, base, **config))


@pytest.mark.parametrize(
    ("base", "missing"),
    [
        (GEMMA, ("hidden_act", "hidden_activation", "tie_word_embeddings", "rms_norm_eps")),
        ("llama", ("rope_theta", "tie_word_embeddings", "hidden_act", "attention_bias")),
    ],
)
def test_entries_that_are_missing_count_as_in_transformers(tmp_path, base, missing):
    same_as_transformers(without(make(tmp_path, base), *missing))


def test_the_activation_of_a_config_of_transformers_5_is_read(tmp_path):
    """Which has no hidden_activation; older releases ignore hidden_act."""
    tanh = same_as_transformers(make(tmp_path / "tanh", GEMMA))
    folder = without(make(tmp_path / "silu", GEMMA, hidden_act="silu"), "hidden_activation")
    assert same_as_transformers(folder) != pytest.approx(tanh, abs=0.01)


@pytest.mark.parametrize(
    ("base", "config", "parts"),
    [
        (GEMMA, {"hidden_act": "silu"}, ("hidden_act 'silu'", "hidden_activation None")),
        (GEMMA, {"hidden_activation": "gelu"}, ("hidden_activation 'gelu'", "releases of")),
        (GEMMA, {"use_bidirectional_attention": True}, ("use_bidirectional_attention must be",)),
        (GEMMA, {"partial_rotary_factor": 0.5}, ("partial_rotary_factor 0.5", "must be 1.0")),
        ("qwen2", {"is_causal": False}, ("is_causal must be True", "got False")),
        ("qwen2", {"is_causal": None}, ("is_causal must be True", "got None")),
        (
            "llama",
            {"per_layer_config": {"1": {"rms_norm_eps": 0.5}}},
            ("per_layer_config must be",),
        ),
        (
            "llama",
            {
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "default"},
            },
            ("rope_parameters", "rope_scaling", "contradict"),
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}},
            ("the rope_type 'linear' and the type 'yarn'", "contradict"),
        ),
        (
            "qwen3",
            {"rope_parameters": {"full_attention": {"rope_theta": 50.0}}},
            ("an object for full_attention",),
        ),
        ("llama", {"rope_theta": None}, ("rope_theta must be a number, got None",)),
        ("llama", {"rope_theta": 0}, ("rope_theta must be a finite number above 1, got 0",)),
        ("llama", {"rope_theta": 1.0, "rope_scaling": YARN}, ("rope_theta must be a finite",)),
        ("llama", {"rope_scaling": [1]}, ("rope_scaling must be an object or null, got [1]",)),
        (
            "llama",
            {"rope_scaling": {"rope_type": "linear"}},
            ("rope_scaling.factor must be a number, and is missing",),
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "linear", "factor": 0}},
            ("rope_scaling.factor must be a finite number above 0, got 0",),
        ),
        (
            "llama",
            {"rope_scaling": LLAMA3, "original_max_position_embeddings": None},
            ("original_max_position_embeddings must be a number, got None",),
        ),
        (
            "mistral",
            {"sliding_window": 8, "layer_types": ["full_attention"] * 3},
            ("layer_types", "contradict sliding_window 8"),
        ),
        (
            "qwen2",
            {"sliding_window": 8, "layer_types": ["full_attention"] * 2 + ["sliding_attention"]},
            ("layer_types", "contradict use_sliding_window None"),
        ),
        ("llama", {"attention_bias": "false"}, ("attention_bias must be true or false",)),
        ("llama", {"tie_word_embeddings": None}, ("tie_word_embeddings must be true or false",)),
        ("llama", {"hidden_size": "48"}, ("hidden_size must be a whole number", "got '48'")),
        ("llama", {"hidden_act": ["silu"]}, ("hidden_act must be a string, got ['silu']",)),
        ("llama", {"configuration_files": ["config.9.json"]}, ("configuration_files ['config.9",)),
        ("llama", {"transformers_weights": "a.bin"}, ("transformers_weights 'a.bin'",)),
        (
            LAYERWISE,
            {"rope_parameters": {"rope_theta": 50.0}},
            ("rope_parameters", "reads rope_th"),
        ),
        (LAYERWISE, {"num_attention_heads": 5}, ("hidden_size must be a multiple of",)),
        (
            LAYERWISE,
            {"start_layer": 9},
            ("start_layer must be at most num_hidden_layers (6), got",),
        ),
        (LAYERWISE, {"head_multi": None}, ("head_multi must be true or false, got None",)),
        (LAYERWISE, {"is_causal": False}, ("is_causal must be True",)),
        (LIGHTWEIGHT, {"rope_scaling": {"type": "linear", "factor": 2.0}}, ("'linear'", "default")),
        (LIGHTWEIGHT, {"attn_implementation": "eager"}, ("attn_implementation must be 'sdpa'",)),
        (LIGHTWEIGHT, {"sliding_window": None}, ("sliding_window must be a whole number",)),
    ],
    ids=str,
)
def test_what_would_change_scores_is_refused_by_name(tmp_path, base, config, parts):
    refusal(make(tmp_path, base, **config), *parts, base=base)


def test_entries_whose_default_differs_between_releases_are_missed(tmp_path):
    folder = without(make(tmp_path, LIGHTWEIGHT), "query_pre_attn_scalar")
    refusal(folder, "query_pre_attn_scalar must be a number, and is missing", base=LIGHTWEIGHT)


def test_a_first_head_beyond_the_last_layer_is_named(tmp_path):
    folder = without(make(tmp_path, LIGHTWEIGHT), "start_layer")
    refusal(folder, "start_layer must be at most num_hidden_layers (6)", base=LIGHTWEIGHT)


CONFIG_KEYS = (
    *("head_dim", "num_key_value_heads", "hidden_size", "num_hidden_layers", "vocab_size"),
    *("max_position_embeddings", "rms_norm_eps", "hidden_act", "attention_bias", "mlp_bias"),
    *("rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "use_sliding_window"),
    *("layer_types", "tie_word_embeddings", "is_causal", "architectures", "per_layer_config"),
    *("original_max_position_embeddings", "partial_rotary_factor", "max_window_layers"),
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.sampled_from([-1, 0, 1, 2, 3, 12, 48, 1e400])
    | st.floats()
    | st.sampled_from(["yarn", "linear", "default", "llama3", "full_attention", "", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["rope_type", "type", "factor", "rope_theta", "beta_fast"]), inner
        )
    ),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: build(root / name, name) for name in ("llama-yarn", "qwen3-layer-types")}


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    base=st.sampled_from(["llama-yarn", "qwen3-layer-types"]),
    key=st.sampled_from(CONFIG_KEYS),
    value=json_values,
)
@example("llama-yarn", "rope_theta", 1)
@example("llama-yarn", "rope_scaling", {"rope_type": "yarn", "factor": 1e-300})
@example("llama-yarn", "head_dim", 10**20)
def test_any_value_is_refused_by_name_or_gives_scores(bases, tmp_path_factory, base, key, value):
    folder = tmp_path_factory.mktemp("config") / "checkpoint"
    folder.mkdir()
    for path in bases[base].iterdir():
        (folder / path.name).symlink_to(path)
    entries = json.loads((folder / CONFIG).read_text("utf-8")) | {key: value}
    (folder / CONFIG).unlink()
    (folder / CONFIG).write_text(json.dumps(entries), "utf-8")
    try:
        engine = Reranker(str(folder), family="decoder", device="cpu", dtype="float32")
    except (CheckpointError, SettingsError) as error:
        if isinstance(error, CheckpointError):
            assert str(folder) in str(error)  # noqa: PT017
        return
    with engine:
        try:
            assert len(engine.rerank("Who won?", ["They did.", "It rained."])) == 2
        except RerankError as error:
            pytest.fail(f"{key}={value!r} was let in and failed later: {error}")


# Weights


def with_tensor(name: str, shape: tuple[int, ...], value: float) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.full(shape, value)}


@pytest.mark.parametrize(
    ("base", "name", "shape"),
    [
        ("llama", "model.layers.1.self_attn.q_norm.weight", (16,)),
        ("llama", "model.layers.1.self_attn.q_proj.bias", (64,)),
        ("mistral", "model.layers.0.self_attn.v_proj.bias", (32,)),
        ("qwen2", "model.layers.2.self_attn.o_proj.bias", (48,)),
        (GEMMA, "model.layers.1.pre_feedforward_layernorm.weight", (48,)),
        ("llama", "model.norm.bias", (48,)),
        ("llama", "lm_head.bias", (1000,)),
        ("qwen2", "score.weight", (1, 48)),
        (LAYERWISE, "lm_head.5.linear_head.weight", (1, 48)),
        (LAYERWISE, "lm_head.4.linear_head.bias", (1,)),
        (LIGHTWEIGHT, "lm_head.5.linear_head.weight", (1, 48)),
    ],
)
def test_tensors_that_the_config_knows_nothing_of_are_refused(tmp_path, base, name, shape):
    """As of another architecture, or with another first layer that has a head."""
    folder = edit_weights(make(tmp_path, base), with_tensor(name, shape, 0.5))
    refusal(folder, name, "config.json does not have", base=base)


def test_several_such_tensors_are_counted(tmp_path):
    norms = {f"model.layers.{layer}.self_attn.k_norm.weight": torch.ones(16) for layer in range(3)}
    folder = edit_weights(make(tmp_path, "llama"), lambda tensors: tensors | norms)
    refusal(folder, "and 2 more")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.1.self_attn.rotary_emb.inv_freq", 0.5),
        ("model.layers.1.self_attn.q_proj.bias", 0.0),
    ],
)
def test_leftovers_that_change_nothing_are_let_in(tmp_path, name, value):
    folder = edit_weights(make(tmp_path, "llama"), with_tensor(name, (64,), value))
    same_as_transformers(folder)


def test_layers_and_heads_beyond_the_cutoff_are_no_leftovers(tmp_path):
    for family in (LAYERWISE, LIGHTWEIGHT):
        with Reranker(str(make(tmp_path / family, family)), cutoff_layers=3, device="cpu") as one:
            assert len(one.rerank("Who won?", ["They did."])) == 1


def test_embeddings_of_another_number_are_told_by_their_rows(tmp_path):
    folder = make(tmp_path, "llama", vocab_size=1010)
    refusal(folder, "model.embed_tokens.weight has 1000 rows", "vocab_size in config.json is 1010")


@pytest.mark.parametrize("base", [GEMMA, "llama"])
def test_names_of_a_model_that_was_saved_without_its_head_are_read(tmp_path, base):
    folder = make(tmp_path, base)
    edit_weights(folder, lambda t: {name.removeprefix("model."): each for name, each in t.items()})
    same_as_transformers(folder)


def test_tied_embeddings_may_be_stored_as_the_head_alone(tmp_path):
    folder = make(tmp_path, GEMMA)
    words = "model.embed_tokens.weight"
    edit_weights(folder, lambda t: {"lm_head.weight" if k == words else k: t[k] for k in t})
    same_as_transformers(folder)


@pytest.mark.parametrize("backend", ["native", "flagembedding"])
def test_a_model_with_a_classification_head_is_told_so(tmp_path, backend):
    """Its tied embeddings would do for a head, and give other scores."""
    if backend == "flagembedding":
        pytest.importorskip("FlagEmbedding")
    folder = make(tmp_path, GEMMA, architectures=["GemmaForSequenceClassification"])
    edit_weights(folder, with_tensor("score.weight", (1, 48), 0.5))
    refusal(folder, "GemmaForSequenceClassification", "CrossEncoder", backend=backend)


def test_what_the_way_out_names_runs(tmp_path):
    """The errors of unsupported entries name the other backend."""
    pytest.importorskip("FlagEmbedding")
    folder = make(tmp_path, "llama", rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    refusal(folder, "'dynamic'", 'backend="flagembedding"')
    expected = theirs(folder, token_ids(make(tmp_path / "plain", "llama"), PAIRS), yes_id(folder))
    settings = {"backend": "flagembedding", "family": "decoder", "device": "cpu"}
    with Reranker(str(folder), dtype="float32", **settings) as reranker:
        found = [reranker.logits(query, [text])[0] for query, text in PAIRS]
    assert found == pytest.approx(expected, abs=1e-4)
