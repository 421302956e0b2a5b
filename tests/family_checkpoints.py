"""Small random-weight checkpoints of BGE's three decoder families, made from nothing but a seed.

Config, weights and tokenizer are written by hand, so that they are the same whatever version of
transformers is there: reference scores made with an old one hold for all. Weights come from numpy's
frozen `RandomState`, one stream per tensor name.

Config keys and tensor names are those of BAAI's repositories on the hub, as FlagEmbedding 1.4.2
reads them (`inference/reranker/decoder_only/models/`).
"""

import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

TOKENIZER = Path(__file__).parent / "reference" / "decoder-tokenizer.json"
VOCABULARY = 1000
_SPECIALS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "torch_dtype": "float32",
}
# Where they differ from a plain Llama, as the hub's config files have it; sizes are small.
_GEMMA = {
    "architectures": ["GemmaForCausalLM"],
    "model_type": "gemma",
    "num_hidden_layers": 3,
    "head_dim": 16,
    "hidden_act": "gelu",
    "hidden_activation": None,
    "tie_word_embeddings": True,
}
_MINICPM = {
    "architectures": ["LayerWiseMiniCPMForCausalLM"],
    "model_type": "minicpm",
    "num_hidden_layers": 6,
    "hidden_act": "silu",
    "scale_emb": 2,
    "scale_depth": 2.8,
    "dim_model_base": 16,
    "start_layer": 2,
    "head_multi": True,
    "head_type": "simple",
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
_GEMMA2 = {
    "architectures": ["CostWiseGemmaForCausalLM"],
    "model_type": "cost_wise_gemma",
    "num_hidden_layers": 6,
    "head_dim": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 24,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "start_layer": 2,
    "layer_sep": 1,
    "layer_wise": True,
    "tie_word_embeddings": False,
}
_CONFIGS = {"decoder": _GEMMA, "layerwise": _MINICPM, "lightweight": _GEMMA2}


def build_family(
    folder: Path,
    family: str,
    *,
    seed: int = 0,
    config: dict[str, Any] | None = None,
    bos: bool = True,
    spaces: str = "gemma",
    padding_side: str = "right",
) -> Path:
    """Write a checkpoint of a family.

    Args:
        folder: Made if it is not there.
        family: `"decoder"`, `"layerwise"` or `"lightweight"`.
        seed: Another seed gives other weights.
        config: Keys of `config.json` to change.
        bos: Whether the tokenizer has a token for the beginning.
        spaces: `"gemma"` turns spaces into "▁"; `"llama"` puts one before each text as well.
        padding_side: For FlagEmbedding, which pads.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = _SIZES | _CONFIGS[family] | (config or {})
    (folder / "config.json").write_text(json.dumps(written, indent=1), encoding="utf-8")
    weights = {name: _random_weights(name, shape, seed) for name, shape in _shapes(written).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder, bos=bos, spaces=spaces, padding_side=padding_side)
    return folder


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor by its name."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    norms = ["input_layernorm", "post_attention_layernorm"]
    if config["model_type"] == "cost_wise_gemma":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}"
        shapes |= {f"{prefix}.{norm}.weight": (hidden,) for norm in norms}
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (queries, hidden),
            f"{prefix}.self_attn.k_proj.weight": (keys, hidden),
            f"{prefix}.self_attn.v_proj.weight": (keys, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, queries),
            f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}.mlp.up_proj.weight": (inner, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, inner),
        }
        shapes |= {f"{prefix}.{part}.bias": (size,) for part, size in _biases(config, shapes)}
        if config["model_type"] == "qwen3":
            shapes |= {f"{prefix}.self_attn.{part}_norm.weight": (head,) for part in "qk"}
    return shapes | _head_shapes(config)


def _biases(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> list[tuple[str, int]]:
    """Return which linear layers of a block have a bias, and its size."""
    parts: list[str] = []
    if config["attention_bias"] or config["model_type"] == "qwen2":
        parts += [f"self_attn.{name}_proj" for name in "qkv"]
    if config["attention_bias"]:
        parts.append("self_attn.o_proj")
    if config.get("mlp_bias"):
        parts += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    return [(part, shapes[f"model.layers.0.{part}.weight"][0]) for part in parts]


def _head_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden = config["hidden_size"]
    if "start_layer" not in config:
        return {} if config["tie_word_embeddings"] else {"lm_head.weight": (VOCABULARY, hidden)}
    if not config.get("head_multi", True):
        return {"lm_head.linear_head.weight": (1, hidden)}
    layers = range(
        config["start_layer"], config["num_hidden_layers"] + 1, config.get("layer_sep", 1)
    )
    return {f"lm_head.{place}.linear_head.weight": (1, hidden) for place in range(len(layers))}


def _random_weights(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Return float32 weights spread so widely that every part of the model shows in the logits."""
    stream = np.random.RandomState(zlib.crc32(name.encode()) ^ seed)
    uniform = stream.uniform(-math.sqrt(3.0), math.sqrt(3.0), size=shape)
    if name.endswith(".bias"):
        return (0.3 * uniform).astype(np.float32)
    if name.endswith("norm.weight"):
        # Gemma adds 1 to what is stored and Llama does not: both are near enough to theirs.
        return (0.5 + 0.2 * uniform).astype(np.float32)
    spread = 0.5 if "embed" in name else (3.0 if "lm_head" in name else 1.2) / math.sqrt(shape[-1])
    return (spread * uniform).astype(np.float32)


def _write_tokenizer(folder: Path, *, bos: bool, spaces: str, padding_side: str) -> None:
    tokenizer = json.loads(TOKENIZER.read_text(encoding="utf-8"))
    if spaces == "llama":
        tokenizer["normalizer"] = {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, tokenizer["normalizer"]],
        }
    if not bos:
        tokenizer["post_processor"] = None
    written = json.dumps(tokenizer, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(written, encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2048,
        "padding_side": padding_side,
        **{name: token for name, token in _SPECIALS.items() if bos or name != "bos_token"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


# What the reference scores are about


@dataclass(frozen=True)
class Case:
    """A checkpoint, and the settings under which its pairs are scored.

    Attributes:
        name: Unique among the cases.
        family: The checkpoint's.
        build: Further arguments of `build_family`.
        settings: Of `Reranker`, by its own names.
    """

    name: str
    family: str
    build: dict[str, Any]
    settings: dict[str, Any]


def _cases() -> list[Case]:
    long_prompt = "Say whether passage B answers query A: 'Yes' or 'No'."
    decoder = [
        ("plain", {}, {}),
        ("left", {"seed": 1, "padding_side": "left"}, {"max_length": 64}),
        ("no-bos", {"seed": 2, "bos": False}, {"max_length": 48, "query_max_length": 20}),
        ("bos-is-pad", {"seed": 2, "spaces": "llama"}, {"max_length": 40, "prompt": long_prompt}),
        ("one-key-head", {"seed": 3, "config": {"num_key_value_heads": 1}}, {"prompt": "Yes?"}),
        (
            "own-head",
            {
                "seed": 4,
                "config": {"tie_word_embeddings": False, "hidden_activation": "gelu_pytorch_tanh"},
            },
            {"query_instruction": "Query: ", "passage_instruction": "Passage: "},
        ),
        ("no-instructions", {"seed": 4}, {"query_instruction": "", "passage_instruction": ""}),
    ]
    layerwise = [
        ("plain", {}, {}),
        ("first", {"padding_side": "left"}, {"cutoff_layers": 2, "max_length": 64}),
        ("middle", {"seed": 1, "spaces": "llama"}, {"cutoff_layers": 4, "prompt": long_prompt}),
        ("last", {"seed": 1}, {"cutoff_layers": 6, "query_instruction": "Q: "}),
        ("one-head", {"seed": 2, "config": {"head_multi": False}}, {"cutoff_layers": 3}),
        (
            "all-key-heads",
            {"seed": 3, "config": {"num_key_value_heads": 4, "rope_theta": 500.0}},
            {"max_length": 32, "cutoff_layers": 5},
        ),
        (
            "stretched",
            {
                "seed": 4,
                "config": {
                    "rope_scaling": {"type": "linear", "factor": 2.0},
                    "scale_emb": 12,
                    "scale_depth": 1.4,
                },
            },
            {"query_max_length": 10},
        ),
    ]
    lightweight = [
        ("plain", {}, {}),
        ("ratio-2", {}, {"compress_ratio": 2, "compress_layers": [2]}),
        ("ratio-4", {"seed": 1}, {"compress_ratio": 4, "compress_layers": [3], "max_length": 64}),
        ("ratio-8", {"seed": 1}, {"compress_ratio": 8, "compress_layers": [1], "cutoff_layers": 5}),
        ("twice", {"seed": 2}, {"compress_ratio": 2, "compress_layers": [1, 4]}),
        ("too-late", {"seed": 2}, {"compress_ratio": 2, "cutoff_layers": 3, "max_length": 48}),
        (
            "at-the-cutoff",
            {"seed": 2},
            {"compress_ratio": 4, "compress_layers": [2, 4], "cutoff_layers": 4},
        ),
        (
            "windows",
            {"seed": 3, "config": {"sliding_window": 24}},
            {"compress_ratio": 2, "compress_layers": [3], "prompt": long_prompt},
        ),
        (
            "every-second",
            {"seed": 4, "config": {"layer_sep": 2, "final_logit_softcapping": None}},
            {"cutoff_layers": 4, "query_instruction": "Q: ", "passage_instruction": ""},
        ),
        ("small-caps", {"seed": 4, "config": {"attn_logit_softcapping": 2.0}}, {"max_length": 40}),
    ]
    named = {"decoder": decoder, "layerwise": layerwise, "lightweight": lightweight}
    return [
        Case(f"{family}-{name}", family, build, settings)
        for family, cases in named.items()
        for name, build, settings in cases
    ]


CASES = {case.name: case for case in _cases()}


def family_texts() -> tuple[list[str], list[str]]:
    """Return the questions and the sentences of the English XQuAD-R subset, in file order."""
    xquad = Path(__file__).parent / "data" / "xquad-r-en"
    queries, sentences = (
        [json.loads(line)["text"] for line in (xquad / name).read_text("utf-8").splitlines()]
        for name in ("queries.jsonl", "corpus.jsonl")
    )
    return queries, sentences


def case_pairs() -> list[tuple[str, str]]:
    """Return the pairs that every case scores: short, cut, empty, and with unknown characters."""
    queries, sentences = family_texts()
    pairs = [(queries[i * 7], sentences[i * 11]) for i in range(12)]
    pairs += [(queries[5], " ".join(sentences[:12])), (" ".join(queries[:30]), sentences[5])]
    pairs += [(" ".join(queries[:9]), " ".join(sentences[:30])), ("", sentences[9])]
    pairs += [(queries[9], ""), ("", ""), ("Where is 北京?", "北京 ☃ is the capital.")]
    return [*pairs, (queries[3], "Yes.")]
