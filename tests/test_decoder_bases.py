"""The decoder family on the bases that FlagLLMReranker is fine-tuned from, beside transformers."""

import json
import re
from pathlib import Path

import pytest
import torch

from bge_rerank_adapters import CheckpointError, Reranker, UnsupportedCheckpointError
from bge_rerank_adapters.engine.models.causal.model import CausalModel
from tests.family_checkpoints import build_family, family_texts

transformers = pytest.importorskip("transformers")

PLAIN = {"num_hidden_layers": 3, "tie_word_embeddings": False, "hidden_act": "silu"}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
NAMES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Model type, what its config says besides, and by what the tensors differ from a plain Llama's.
CASES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "head_dim": None}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 20, "rope_theta": 500000.0}),
    "llama3-rotary": ("llama", {"rope_scaling": LLAMA3, "rope_theta": 500.0}),
    "llama-linear-rotary": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama-yarn": ("llama", {"rope_scaling": YARN | {"beta_fast": 16, "beta_slow": 2}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 100}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen2-yarn": ("qwen2", {"rope_scaling": YARN | {"attention_factor": 1.3}}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-bias": ("qwen3", {"head_dim": 8, "attention_bias": True, "rope_theta": 1e6}),
    "qwen3-layer-types": (
        "qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 20,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


def build(folder: Path, name: str, **more) -> Path:
    kind, config = CASES[name]
    named = {"model_type": kind, "architectures": [NAMES[kind]]}
    return build_family(folder, "decoder", config=PLAIN | named | config | more)


def pairs() -> list[tuple[str, str]]:
    queries, sentences = family_texts()
    found = [(queries[i], " ".join(sentences[i * 3 : i * 3 + i % 4 + 1])) for i in range(12)]
    return [*found, ("", ""), (queries[3], "Yes.")]


def ours(folder: Path, asked: list[tuple[str, str]], **settings) -> list[float]:
    options = {"family": "decoder", "device": "cpu", "dtype": "float32"} | settings
    with Reranker(str(folder), **options) as reranker:
        found = [reranker.logits(*_one(pair))[0] for pair in asked]
        packed = reranker.rerank_many([(query, [text]) for query, text in asked])
        assert [ranking[0].logit for ranking in packed] == pytest.approx(found, abs=1e-5)
        return found


def _one(pair: tuple[str, str]) -> tuple[str, list[str]]:
    return pair[0], [pair[1]]


def token_ids(folder: Path, asked: list[tuple[str, str]]) -> list[list[int]]:
    """Return the ids as the model is given them, which other tests hold against FlagEmbedding."""
    from bge_rerank_adapters.engine.models import loading
    from bge_rerank_adapters.settings import EngineSettings

    settings = EngineSettings(model=str(folder), family="decoder")
    tokenizer = loading.load_pair_tokenizer(loading.read_checkpoint(folder, settings), settings)
    tokenized = tokenizer.tokenize(asked)
    return [tokenized.distinct[place].ids.tolist() for place in tokenized.positions]


def theirs(folder: Path, ids: list[list[int]], yes_id: int) -> list[float]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.inference_mode():
        return [model(torch.tensor([each])).logits[0, -1, yes_id].item() for each in ids]


def yes_id(folder: Path) -> int:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer("Yes", add_special_tokens=False)["input_ids"][0]


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(name, tmp_path):
    folder = build(tmp_path, name)
    asked = pairs()
    expected = theirs(folder, token_ids(folder, asked), yes_id(folder))
    assert max(expected) - min(expected) > 0.5
    assert ours(folder, asked) == pytest.approx(expected, abs=1e-4)


def test_cases_differ_in_what_they_are_about(tmp_path):
    """A key of the config that nothing reads would make two cases equal."""
    asked = pairs()[:4]
    found = {name: ours(build(tmp_path / name, name), asked) for name in CASES}
    for name, logits in found.items():
        kind = CASES[name][0]
        others = [found[each] for each in CASES if each != name and CASES[each][0] == kind]
        assert all(max(abs(a - b) for a, b in zip(logits, o, strict=True)) > 1e-2 for o in others)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_such_a_model_is_run_only_if_asked_for(name, tmp_path):
    folder = build(tmp_path, name)
    with pytest.raises(UnsupportedCheckpointError, match="family='decoder'"):
        Reranker(str(folder), device="cpu")


@pytest.mark.parametrize("kind", ["dynamic", "longrope", ["yarn"]])
def test_other_rotary_positions_are_refused_by_name(kind, tmp_path):
    folder = build(tmp_path, "llama", rope_scaling={"rope_type": kind, "factor": 2.0})
    with pytest.raises(UnsupportedCheckpointError, match=re.escape(repr(kind))):
        Reranker(str(folder), family="decoder", device="cpu")


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ("llama", {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "low_freq_factor"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("qwen3", {"use_sliding_window": True, "layer_types": ["other"]}, "layer_types"),
        ("mistral", {"sliding_window": 0}, "sliding_window"),
    ],
)
def test_configs_that_cannot_be_run_are_named(name, config, message, tmp_path):
    folder = build(tmp_path, name, **config)
    with pytest.raises(CheckpointError, match=message):
        Reranker(str(folder), family="decoder", device="cpu")


def test_a_head_that_is_not_stored_is_missed(tmp_path):
    folder = build(tmp_path, "llama-tied")
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8")) | {"tie_word_embeddings": False}
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        Reranker(str(folder), family="decoder", device="cpu")


def test_a_query_is_computed_once_for_all_its_documents(tmp_path, monkeypatch):
    """Rows that a pack computes, and what comes out of it with each query computed anew."""
    computed = []
    run_layer = CausalModel._run_layer

    def counted(self, index, states, layout, *, last):
        computed.append(len(states))
        return run_layer(self, index, states, layout, last=last)

    monkeypatch.setattr(CausalModel, "_run_layer", counted)
    folder = build(tmp_path, "mistral-window")
    queries, sentences = family_texts()
    query, documents = " ".join(queries[:6]), [*sentences[:6], "", sentences[0]]
    with Reranker(str(folder), family="decoder", device="cpu", dtype="float32") as reranker:
        alone = [reranker.logits(query, [document])[0] for document in documents]
        computed.clear()
        shared = reranker.logits(query, documents)
        rows = computed[0]
        monkeypatch.setattr(CausalModel, "shares_queries", False)
        computed.clear()
        separate = reranker.logits(query, documents)
    assert shared == pytest.approx(separate, abs=1e-5)
    assert shared == pytest.approx(alone, abs=1e-5)
    assert rows < 0.6 * computed[0]
