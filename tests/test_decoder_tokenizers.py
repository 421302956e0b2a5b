"""The files beside a decoder's `tokenizer.json`: as transformers reads them, or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models

from bge_rerank_adapters import CheckpointError, Reranker, ScoringError
from bge_rerank_adapters.engine.text.decoder_classes import QWEN_WORDS
from bge_rerank_adapters.engine.text.prompts import YES_OR_NO
from tests.family_checkpoints import VOCABULARY, build_family, family_texts
from tests.test_decoder_bases import build, theirs

transformers = pytest.importorskip("transformers", minversion="5.0")

QUERIES, SENTENCES = family_texts()
PAIRS = [
    (QUERIES[0], SENTENCES[0]),
    ("It's 1234?", "a lead  of two\n\n e\u0301te\u0301"),
    ("", " <bos> here"),
]
CONFIG = "tokenizer_config.json"
WORDS, SPECIALS = "Qwen2Tokenizer", ["<|endoftext|>", "<|im_end|>"]


def make(folder: Path, base: str, *, tokenizer: dict[str, Any] | None = None, **config) -> Path:
    """Build a checkpoint with entries of `tokenizer.json` and of the tokenizer's config changed."""
    build_family(folder, "decoder") if base == "gemma" else build(folder, base)
    edit(folder / "tokenizer.json", tokenizer or {})
    edit(folder / CONFIG, config)
    return folder


def edit(path: Path, entries: dict[str, Any]) -> None:
    found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    kept = {name: value for name, value in (found | entries).items() if value != "left out"}
    path.write_text(json.dumps(kept, ensure_ascii=False), "utf-8")


def make_byte_level(folder: Path, base: str, *, words: str = QWEN_WORDS, **config) -> Path:
    """Build a checkpoint with a tokenizer like Qwen's."""
    build(folder, base)
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(QUERIES + SENTENCES, trainer)
    tokenizer.add_special_tokens([AddedToken(each, normalized=False) for each in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    plain = {"tokenizer_class": WORDS, "bos_token": None, "pad_token": SPECIALS[0]}
    (folder / CONFIG).unlink()
    edit(folder / CONFIG, plain | {"eos_token": SPECIALS[1]} | config)
    return folder


def with_room(folder: Path) -> Path:
    """Give a checkpoint eight more embeddings than its tokenizer has ids."""
    edit(folder / "config.json", {"vocab_size": VOCABULARY + 8})
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "embed_tokens" in name or "lm_head" in name:
            tensors[name] = torch.cat([tensors[name], tensors[name][100:108]])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def ours(folder: Path) -> list[float]:
    with Reranker(str(folder), family="decoder", device="cpu", dtype="float32") as reranker:
        return [reranker.logits(query, [text])[0] for query, text in PAIRS]


def expected(folder: Path) -> list[float]:
    """Return the logits of FlagEmbedding's rule with transformers' tokenizer and model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    bos = tokenizer.bos_token_id
    first = [] if bos is None or bos == tokenizer.pad_token_id else [bos]
    end = [*ids("\n"), *ids(YES_OR_NO)]
    rows = [
        [*first, *ids(f"A: {query}"), *ids("\n"), *ids(f"B: {text}"), *end] for query, text in PAIRS
    ]
    return theirs(folder, rows, ids("Yes")[0])


def refusal(folder: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as info:
        ours(folder)
    for part in (str(folder), *parts):
        assert part in str(info.value)
    assert len(str(info.value)) < 1000


# Pipelines of tokenizers

PREPEND = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
}
FIRST = {
    "normalizer": None,
    "pre_tokenizer": {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "first",
        "split": False,
    },
}


@pytest.mark.parametrize(
    ("base", "tokenizer", "config"),
    [
        ("llama", FIRST, {"tokenizer_class": "LlamaTokenizer"}),
        ("llama", {}, {"tokenizer_class": "LlamaTokenizerFast", "add_prefix_space": False}),
        ("llama", PREPEND, {"tokenizer_class": "left out"}),
        ("llama", {}, {"tokenizer_class": "GemmaTokenizer"}),
        ("mistral", PREPEND, {"tokenizer_class": "LlamaTokenizer"}),
        ("mistral", {}, {"tokenizer_class": "LlamaTokenizer"}),
        ("gemma", {}, {"tokenizer_class": "GemmaTokenizerFast"}),
        ("gemma", PREPEND, {"tokenizer_class": "TokenizersBackend"}),
        ("llama", {}, {"padding_side": "left", "add_eos_token": True, "chat_template": "{{x}}"}),
    ],
    ids=str,
)
def test_files_that_agree_are_read_as_in_transformers(tmp_path, base, tokenizer, config):
    folder = make(tmp_path, base, tokenizer=tokenizer, **config)
    assert ours(folder) == pytest.approx(expected(folder), abs=1e-4)


@pytest.mark.parametrize(
    ("base", "config"),
    [
        ("qwen2", {}),
        ("qwen3", {"tokenizer_class": "Qwen2TokenizerFast"}),
        ("qwen2", {"tokenizer_class": "left out", "bos_token": "left out"}),
        ("llama", {"tokenizer_class": "LlamaTokenizer"}),
        ("llama", {}),
    ],
    ids=str,
)
def test_byte_level_tokenizers_are_read_as_in_transformers(tmp_path, base, config):
    folder = make_byte_level(tmp_path, base, **config)
    assert ours(folder) == pytest.approx(expected(folder), abs=1e-4)


def test_the_words_of_qwens_tokenizers_are_those_of_transformers():
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert QWEN_WORDS == PRETOKENIZE_REGEX


@pytest.mark.parametrize(
    ("base", "tokenizer", "config", "parts"),
    [
        ("llama", {}, {"tokenizer_class": "LlamaTokenizer"}, ("['▁A:▁a▁▁b']", "as ['A:▁a▁▁b']")),
        (
            "llama",
            PREPEND,
            {"tokenizer_class": "LlamaTokenizerFast", "add_prefix_space": False},
            ("as ['A:▁a▁▁b']", "as ['▁A:▁a▁▁b']", '"PreTrainedTokenizerFast"'),
        ),
        (
            "mistral",
            PREPEND,
            {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False},
            ("as ['A:▁a▁▁b']",),
        ),
        ("gemma", PREPEND, {"tokenizer_class": "left out"}, ("the class GemmaTokenizer reads",)),
        ("qwen2", {}, {"tokenizer_class": "LlamaTokenizer"}, ("'Ġa'", 'backend="flagembedding"')),
        ("llama", {}, {"tokenizer_class": "T5Tokenizer"}, ("tokenizer_class 'T5Tokenizer'",)),
        ("llama", {}, {"tokenizer_class": 5}, ("tokenizer_class must be a string, got 5",)),
        ("llama", {}, {"add_prefix_space": "no"}, ("add_prefix_space must be true, false or",)),
        ("llama", {}, {"split_special_tokens": "no"}, ("split_special_tokens must be true or",)),
    ],
    ids=str,
)
def test_files_that_disagree_are_refused(tmp_path, base, tokenizer, config, parts):
    refusal(make(tmp_path, base, tokenizer=tokenizer, **config), *parts)


@pytest.mark.parametrize("entry", [{"byte_fallback": False}, {"fuse_unk": False}], ids=str)
def test_another_way_with_unknown_characters_is_refused(tmp_path, entry):
    folder = make(tmp_path, "gemma", tokenizer_class="GemmaTokenizer")
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    edit(folder / "tokenizer.json", {"model": content["model"] | entry})
    refusal(folder, "byte_fallback, fuse_unk", '"PreTrainedTokenizerFast"')


def test_other_words_than_qwens_are_refused(tmp_path):
    folder = make_byte_level(tmp_path, "qwen2", words=r"\p{N}{1,3}| ?\p{L}+|[^\s\p{L}\p{N}]+|\s+")
    refusal(folder, "the class Qwen2Tokenizer reads", "releases of transformers differ")


def test_merges_that_are_left_out_at_random_are_refused(tmp_path):
    folder = make(tmp_path, "llama")
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    edit(folder / "tokenizer.json", {"model": content["model"] | {"dropout": 0.5}})
    refusal(folder, "dropout 0.5", "write null there")


# Added tokens


def declared(number: int, content: str, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {str(number): {"content": content, "special": True} | plain | flags}


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": declared(VOCABULARY, "lead")},
        {"additional_special_tokens": ["lead"]},
        {"extra_special_tokens": {"a_token": "lead"}},
        {"sep_token": "lead"},
    ],
    ids=str,
)
@pytest.mark.parametrize("base", ["llama", "gemma"])
def test_tokens_that_the_config_alone_has_are_added(tmp_path, base, config):
    plain = ours(with_room(make(tmp_path / "plain", base)))
    folder = with_room(make(tmp_path / "added", base, **config))
    found = ours(folder)
    assert found == pytest.approx(expected(folder), abs=1e-4)
    assert abs(found[1] - plain[1]) > 0.001


def test_tokens_of_the_file_of_added_tokens_are_added(tmp_path):
    folder = with_room(make(tmp_path, "llama"))
    edit(folder / "added_tokens.json", {"lead": VOCABULARY})
    assert ours(folder) == pytest.approx(expected(folder), abs=1e-4)


def test_an_added_token_takes_spaces_as_the_config_says(tmp_path):
    token = {"id": VOCABULARY, **declared(VOCABULARY, "lead")[str(VOCABULARY)]}

    def with_flags(name: str, config: dict[str, Any]) -> Path:
        folder = with_room(make(tmp_path / name, "llama", **config))
        content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        added = [*content["added_tokens"], token]
        edit(folder / "tokenizer.json", {"added_tokens": added})
        return folder

    folder = with_flags("rstrip", {"added_tokens_decoder": declared(1000, "lead", rstrip=True)})
    found = ours(folder)
    assert found == pytest.approx(expected(folder), abs=1e-4)
    assert abs(found[1] - ours(with_flags("plain", {}))[1]) > 0.001


def test_special_tokens_of_a_text_may_be_split(tmp_path):
    folder = make(tmp_path / "split", "llama", split_special_tokens=True)
    found = ours(folder)
    assert found == pytest.approx(expected(folder), abs=1e-4)
    assert abs(found[2] - ours(make(tmp_path / "plain", "llama"))[2]) > 0.001


def test_an_added_token_with_another_id_is_refused(tmp_path):
    folder = with_room(make(tmp_path, "llama", added_tokens_decoder=declared(1005, "lead")))
    refusal(folder, "the token 'lead' has the id 1000, not 1005")


def test_a_token_without_an_embedding_is_refused_at_use(tmp_path):
    folder = make(tmp_path, "llama", additional_special_tokens=["lead"])
    with pytest.raises(ScoringError, match=r"'lead' of id 1000"):
        ours(folder)


# The beginning


def no_config(folder: Path) -> None:
    (folder / CONFIG).unlink()


def class_in_model_config(folder: Path) -> None:
    edit(folder / CONFIG, {"tokenizer_class": "left out", "bos_token": "left out"})
    edit(folder / "config.json", {"tokenizer_class": "GemmaTokenizer"})


def new_bos(folder: Path) -> None:
    with_room(folder)
    edit(folder / CONFIG, {"bos_token": "<begin>"})


@pytest.mark.parametrize(
    ("base", "change"),
    [("gemma", no_config), ("llama", no_config), ("llama", class_in_model_config)],
)
def test_the_beginning_is_that_of_the_class(tmp_path, base, change):
    folder = make(tmp_path, base)
    change(folder)
    assert ours(folder) == pytest.approx(expected(folder), abs=1e-4)


def test_a_beginning_that_is_not_in_the_vocabulary_is_added(tmp_path):
    folder = make(tmp_path / "new", "llama")
    new_bos(folder)
    found = ours(folder)
    assert found == pytest.approx(expected(folder), abs=1e-4)
    assert found != pytest.approx(ours(make(tmp_path / "plain", "llama")), abs=0.001)


@pytest.mark.parametrize("given", [None, "<eos>"])
def test_two_files_with_other_beginnings_are_refused(tmp_path, given):
    folder = make(tmp_path, "llama", bos_token=given)
    edit(folder / "special_tokens_map.json", {"bos_token": "<bos>"})
    refusal(folder, f"tokenizer_config.json says {given!r}", "special_tokens_map.json says '<bos>'")


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"bos_token": "<begin>"}, "has ids up to 1000"),
        ({"bos_token": 7}, "a token must be a text that is not empty, got 7"),
        (
            {"bos_token": "left out", "tokenizer_class": "LlamaTokenizer"},
            "the bos_token '<s>', which every pair begins with, is not in the vocabulary",
        ),
    ],
)
def test_a_beginning_that_the_model_does_not_have_is_refused(tmp_path, config, part):
    refusal(make(tmp_path, "llama", tokenizer=FIRST, **config), part)


def test_a_folder_that_leaves_the_beginning_open_is_refused(tmp_path):
    """Transformers 4 has "<s>" there, and 5 has none."""
    folder = make(tmp_path, "llama")
    text = (folder / "tokenizer.json").read_text("utf-8").replace('"<bos>"', '"<s>"')
    (folder / "tokenizer.json").write_text(text, "utf-8")
    no_config(folder)
    refusal(folder, "no file says whether the bos_token '<s>' begins every pair")
    edit(folder / CONFIG, {"bos_token": "<s>"})
    named = ours(make(tmp_path / "named", "llama"))
    assert ours(folder)[:2] == pytest.approx(named[:2], abs=1e-6)
