"""Builds the tiny cross-encoder out of a BERT encoder and writes it as a checkpoint folder."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

PAD_ID = 0
CLS_ID = 101
SEP_ID = 102
MAX_TOKENS = 512


def tiny_config(bert: dict[str, object]) -> XLMRobertaConfig:
    """Returns the XLM-RoBERTa shape that holds a BERT encoder.

    Args:
        bert: The BERT encoder's own config.json.
    """
    return XLMRobertaConfig(
        vocab_size=bert["vocab_size"],
        hidden_size=bert["hidden_size"],
        num_hidden_layers=bert["num_hidden_layers"],
        num_attention_heads=bert["num_attention_heads"],
        intermediate_size=bert["intermediate_size"],
        hidden_act="gelu",
        # Training is short and sees most pairs once, so dropout would only cost time.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        # Positions are counted from pad_id + 1, so the table has one row that no token uses.
        max_position_embeddings=MAX_TOKENS + PAD_ID + 1,
        type_vocab_size=1,
        layer_norm_eps=1e-12,
        pad_token_id=PAD_ID,
        bos_token_id=CLS_ID,
        eos_token_id=SEP_ID,
        num_labels=1,
    )


def build_model(bert_folder: Path) -> XLMRobertaForSequenceClassification:
    """Moves a BERT encoder into an XLM-RoBERTa classifier with a new head.

    Args:
        bert_folder: Folder with the encoder's config.json and model.safetensors.
    """
    bert = json.loads((bert_folder / "config.json").read_text(encoding="utf-8"))
    model = XLMRobertaForSequenceClassification(tiny_config(bert))
    weights = load_file(bert_folder / "model.safetensors")
    state = {
        name.removeprefix("bert."): value.float()
        for name, value in weights.items()
        if "pooler" not in name and "position_ids" not in name
    }
    positions = state["embeddings.position_embeddings.weight"]
    unused_row = torch.zeros(PAD_ID + 1, positions.shape[1])
    state["embeddings.position_embeddings.weight"] = torch.cat([unused_row, positions])
    types = state["embeddings.token_type_embeddings.weight"]
    state["embeddings.token_type_embeddings.weight"] = types[:1].clone()
    model.roberta.load_state_dict(state)
    return model


def build_tokenizer(bert_folder: Path) -> Tokenizer:
    """Gives the encoder's tokenizer XLM-RoBERTa's pair template.

    Args:
        bert_folder: Folder with the encoder's tokenizer.json.
    """
    tokenizer = Tokenizer.from_file(str(bert_folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 [SEP]:0 $B:0 [SEP]:0",
        special_tokens=[("[CLS]", CLS_ID), ("[SEP]", SEP_ID)],
    )
    return tokenizer


def tokenizer_config() -> dict[str, object]:
    """Returns tokenizer_config.json, readable by transformers 4 and 5."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_TOKENS,
        "padding_side": "right",
        "truncation_side": "right",
        "clean_up_tokenization_spaces": True,
        "model_input_names": ["input_ids", "attention_mask"],
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "bos_token": "[CLS]",
        "eos_token": "[SEP]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "mask_token": "[MASK]",
    }


def half_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns a copy of the weights in float16, without buffers that are rebuilt on loading."""
    return {
        name: value.detach().to(torch.float16).contiguous()
        for name, value in state.items()
        if not name.endswith(("position_ids", "token_type_ids"))
    }


def export(
    config: XLMRobertaConfig,
    state: dict[str, torch.Tensor],
    tokenizer: Tokenizer,
    out: Path,
) -> None:
    """Writes a checkpoint folder, each file replaced in one step.

    Args:
        config: The model's config.
        state: The model's weights, of any float type.
        tokenizer: The tokenizer with the pair template.
        out: The folder; files of other names in it are left alone.
    """
    out.mkdir(parents=True, exist_ok=True)
    settings = config.to_dict() | {
        "architectures": ["XLMRobertaForSequenceClassification"],
        "dtype": "float16",
        # The name that transformers 4 reads.
        "torch_dtype": "float16",
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }
    settings.pop("_name_or_path", None)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        folder = Path(scratch)
        save_file(half_state(state), folder / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save(str(folder / "tokenizer.json"))
        for name, content in {
            "config.json": settings,
            "tokenizer_config.json": tokenizer_config(),
        }.items():
            text = json.dumps(content, indent=2, sort_keys=True) + "\n"
            (folder / name).write_text(text, encoding="utf-8")
        for path in sorted(folder.iterdir()):
            path.chmod(0o644)
            path.replace(out / path.name)
