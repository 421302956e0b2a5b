"""Full-size checkpoints with random weights: the exact shapes of BGE rerankers, made in seconds."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

VOCABULARY = 250_002
_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
# Pieces of the built-in tokenizer, about as long as those of XLM-RoBERTa's on English text.
_PIECES = 12_000


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes in a published `config.json`.

    Attributes:
        layers: Number of layers.
        hidden: Width of a token's vector.
        heads: Number of attention heads.
        intermediate: Width inside a feed-forward block.
        positions: Rows of the position embeddings.
    """

    layers: int
    hidden: int
    heads: int
    intermediate: int
    positions: int

    def gigaflops(self, lengths: Iterable[int]) -> float:
        """Return the arithmetic of all layers for pairs of these lengths, without any padding."""
        hidden, wide = self.hidden, self.intermediate
        per_token = 2 * (4 * hidden * hidden + 2 * hidden * wide)
        total = sum(tokens * per_token + 4 * tokens * tokens * hidden for tokens in lengths)
        return self.layers * total / 1e9


# From the config.json of BAAI/bge-reranker-base, -large and -v2-m3 on the hub; "small" is for
# trying the benchmark out.
SHAPES = {
    "small": Shape(4, 256, 4, 1024, 514),
    "base": Shape(12, 768, 12, 3072, 514),
    "large": Shape(24, 1024, 16, 4096, 514),
    "v2-m3": Shape(24, 1024, 16, 4096, 8194),
}


def build(
    folder: Path,
    shape: Shape,
    *,
    texts: Iterable[str],
    tokenizer: Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a checkpoint unless it is there already.

    Args:
        folder: Where it goes.
        shape: Its sizes.
        texts: What the built-in tokenizer takes its pieces from.
        tokenizer: A folder with the tokenizer.json and tokenizer_config.json to use instead.
        dtype: What the weights are stored in.

    Returns:
        The folder.
    """
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = XLMRobertaConfig(
        architectures=["XLMRobertaForSequenceClassification"],
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate,
        max_position_embeddings=shape.positions,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        num_labels=1,
    )
    save_file(_weights(config, dtype), folder / "model.safetensors", metadata={"format": "pt"})
    if tokenizer is None:
        _save_tokenizer(folder, texts, shape.positions - 2)
    else:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            copyfile(tokenizer / name, folder / name)
    # Last, since it says that the folder is complete.
    plain = config.to_dict() | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(plain, indent=2), encoding="utf-8")
    return folder


def _weights(config: XLMRobertaConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = XLMRobertaForSequenceClassification(config)
    generator = torch.Generator().manual_seed(1)
    made: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if "LayerNorm.weight" in name:
            made[name] = torch.ones(parameter.shape, dtype=dtype)
        elif name.endswith("bias"):
            made[name] = torch.zeros(parameter.shape, dtype=dtype)
        else:
            # A head this large spreads the logits as a trained one does.
            spread = 0.5 if name == "classifier.out_proj.weight" else 0.04
            values = torch.randn(parameter.shape, generator=generator).mul_(spread)
            made[name] = values.to(dtype)
    return made


def _save_tokenizer(folder: Path, texts: Iterable[str], max_tokens: int) -> None:
    words = Counter(f"▁{word}" for text in texts for word in text.split())
    characters = sorted({letter for word in words for letter in word})
    pieces = [word for word, _ in words.most_common(_PIECES) if len(word) > 1]
    vocabulary = [(special, 0.0) for special in _SPECIALS]
    vocabulary += [(piece, -5.0 - rank / 2000) for rank, piece in enumerate(pieces)]
    vocabulary += [(letter, -14.0) for letter in characters]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=3, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(list(_SPECIALS))
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_tokens,
        "bos_token": "<s>",
        "cls_token": "<s>",
        "eos_token": "</s>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
