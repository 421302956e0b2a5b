"""What `tokenizer_config.json` says beside `tokenizer.json`: as transformers has it, or refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bge_rerank_adapters import CheckpointError, Reranker, UnsupportedCheckpointError
from tests.checkpoints import build_bert, build_roberta, build_xlm_roberta, read_sentences

transformers = pytest.importorskip("transformers", minversion="5.0")

PARITY = 1e-4
SENTENCES = list(read_sentences().values())
PAIRS = [
    ("Who coached the Panthers?", SENTENCES[3]),
    ("HELLO World", "ÀÉ hello WORLD naïve 北京 zzz"),
    ("A zzz word?", "zzz is a word."),
]
BUILDERS = {"bert": build_bert, "roberta": build_roberta, "xlm-roberta": build_xlm_roberta}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in BUILDERS.items()}


@pytest.fixture
def folder(plain, tmp_path) -> Callable[..., Path]:
    """Copies a checkpoint and writes entries into its tokenizer's config."""

    def change(kind: str, **entries) -> Path:
        copied = Path(shutil.copytree(plain[kind], tmp_path / "checkpoint"))
        path = copied / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | entries), "utf-8")
        return copied

    return change


def edit_tokenizer(folder: Path, edit: Callable[[dict], None]) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    edit(content)
    path.write_text(json.dumps(content), "utf-8")


def ours(folder: Path) -> list[float]:
    with Reranker(str(folder), device="cpu", dtype="float32") as reranker:
        return [reranker.logits(query, [text])[0] for query, text in PAIRS]


def theirs(folder: Path) -> list[float]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32
    ).eval()
    with torch.inference_mode():
        return [
            model(**tokenizer(*pair, return_tensors="pt")).logits[0, 0].item() for pair in PAIRS
        ]


@pytest.mark.parametrize(
    ("kind", "entries"),
    [
        ("bert", {"do_lower_case": False}),
        ("bert", {"strip_accents": False}),
        ("bert", {"tokenize_chinese_chars": False}),
        ("bert", {"tokenizer_class": "BertTokenizerFast", "do_lower_case": False}),
        ("roberta", {"add_prefix_space": True}),
    ],
)
def test_entries_that_change_tokens_are_applied(folder, plain, kind, entries):
    changed = folder(kind, **entries)
    found = ours(changed)
    assert found == pytest.approx(theirs(changed), abs=PARITY)
    assert max(abs(a - b) for a, b in zip(found, ours(plain[kind]), strict=True)) > 0.01


def test_a_class_puts_texts_into_lower_case_where_the_config_is_silent(folder, plain):
    silent = folder("bert")
    edit_tokenizer(silent, lambda content: content["normalizer"].update(lowercase=False))
    found = ours(silent)
    assert found == pytest.approx(theirs(silent), abs=PARITY)
    assert found == pytest.approx(ours(plain["bert"]), abs=1e-6)


@pytest.mark.parametrize(
    "entries",
    [
        {"extra_special_tokens": ["zzz"]},
        {
            "added_tokens_decoder": {
                "2000": {
                    "content": "zzz",
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "single_word": False,
                    "special": True,
                }
            }
        },
    ],
)
@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_tokens_of_the_config_alone_are_added(folder, plain, kind, entries):
    added = folder(kind, **entries)
    with_room_for_tokens(added)
    found = ours(added)
    assert found == pytest.approx(theirs(added), abs=PARITY)
    assert found[2] != pytest.approx(ours(plain[kind])[2], abs=0.01)


def with_room_for_tokens(folder: Path) -> None:
    """Give a checkpoint ten more embeddings than its tokenizer has ids."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["vocab_size"] += 10
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    weights = load_file(folder / "model.safetensors")
    (name,) = [each for each in weights if each.endswith("word_embeddings.weight")]
    weights[name] = torch.cat([weights[name], weights[name][100:110]])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def one_separator(content: dict) -> None:
    pair = content["post_processor"]["pair"]
    content["post_processor"]["pair"] = [*pair[:2], *pair[3:]]


@pytest.mark.parametrize(
    ("kind", "entries", "message"),
    [
        ("xlm-roberta", {"truncation_side": "left"}, "truncation_side 'left' cuts off the begin"),
        (
            "xlm-roberta",
            {"tokenizer_class": "T5Tokenizer"},
            "tokenizer_class 'T5Tokenizer' is not supported",
        ),
        ("bert", {"model_input_names": ["input_ids"]}, "leaves token_type_ids out"),
        ("bert", {"tokenizer_class": "PreTrainedTokenizerFast"}, "has no model_input_names"),
    ],
)
def test_what_is_not_done_here_is_refused_by_name(folder, kind, entries, message):
    with pytest.raises(UnsupportedCheckpointError, match=message):
        ours(folder(kind, **entries))


@pytest.mark.parametrize(
    ("kind", "entries", "message"),
    [
        ("bert", {"sep_token": "[PAD]"}, r"'\[CLS\]', '\[PAD\]', '\[PAD\]' around a pair"),
        ("xlm-roberta", {"cls_token": {"content": "<mask>"}}, "'<mask>', '</s> </s>', '</s>'"),
        ("bert", {"cls_token": 7}, "is damaged, or does not fit"),
        ("bert", {"model_input_names": 3}, "is damaged, or does not fit"),
        (
            "bert",
            {"extra_special_tokens": [7]},
            "does not fit tokenizer.json .a token must be a text",
        ),
        (
            "xlm-roberta",
            {"added_tokens_decoder": {"1500": {"content": "zzz"}}},
            "the token 'zzz' has the id 2000, not 1500",
        ),
    ],
)
def test_a_config_that_contradicts_the_tokenizer_is_refused(folder, kind, entries, message):
    with pytest.raises(CheckpointError, match=message):
        ours(folder(kind, **entries))


def test_another_frame_around_pairs_than_the_class_has_is_refused(folder):
    changed = folder("xlm-roberta")
    edit_tokenizer(changed, one_separator)
    with pytest.raises(CheckpointError, match=re.escape("'<s>', '</s> </s>', '</s>' around")):
        ours(changed)


def test_a_bert_without_a_class_of_its_own_is_run_once_its_inputs_are_named(folder, plain):
    names = ["input_ids", "token_type_ids", "attention_mask"]
    generic = folder("bert", tokenizer_class="PreTrainedTokenizerFast", model_input_names=names)
    assert ours(generic) == pytest.approx(theirs(generic), abs=PARITY)
    assert ours(generic) == pytest.approx(ours(plain["bert"]), abs=1e-6)
