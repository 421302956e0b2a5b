"""Small random-weight checkpoints of the exact BGE architectures, made from nothing but a seed.

Every weight and every vocabulary is the same on every machine and with every version of torch,
transformers and tokenizers, so that reference numbers made with one version hold for another:
weights come from numpy's frozen `RandomState`, one stream per parameter name, and vocabularies
are counted here instead of trained by a library. (RoBERTa's merges are the exception.)
"""

import json
import math
import zlib
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

XQUAD = Path(__file__).parent / "data" / "xquad-r-en"
CHARSMAP = Path(__file__).parent / "reference" / "nfkc.charsmap"

VOCABULARY_SIZE = 2000
_LONGEST_PIECE = 10
_XLM_R_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
_BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_XLM_R_ROLES = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "cls_token": "<s>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
_BERT_ROLES = {
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "mask_token": "[MASK]",
}
_WIDTHS = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "hidden_act": "gelu",
}


def read_queries() -> dict[str, str]:
    """Return the 260 questions of the English XQuAD-R subset by id, in file order."""
    return _read_texts("queries.jsonl")


def read_sentences() -> dict[str, str]:
    """Return the 600 sentences of the English XQuAD-R subset by id, in file order."""
    return _read_texts("corpus.jsonl")


def read_answers() -> dict[str, str]:
    """Return the id of the sentence that answers each question, by the question's id."""
    rows = (XQUAD / "qrels.tsv").read_text(encoding="utf-8").splitlines()[1:]
    return {query: sentence for query, sentence, _ in (row.split("\t") for row in rows)}


def build_xlm_roberta(
    folder: Path,
    *,
    positions: int = 514,
    labels: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Write a checkpoint like bge-reranker-base and -large (514 positions) or -v2-m3 (8194).

    Args:
        folder: Made if it is not there.
        positions: Rows of the position embedding, two of which no token can use.
        labels: Outputs of the classifier; a reranker has 1.
        dtype: What the weights are stored in.
        seed: Another seed gives other weights.

    Returns:
        The folder.
    """
    config = XLMRobertaConfig(**_roberta_settings(positions, labels), vocab_size=VOCABULARY_SIZE)
    _save_model(XLMRobertaForSequenceClassification(config), folder, dtype=dtype, seed=seed)
    _save_tokenizer(_unigram_tokenizer(), folder, "XLMRobertaTokenizer", positions - 2)
    return folder


def build_roberta(
    folder: Path,
    *,
    positions: int = 514,
    labels: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Write a RoBERTa cross-encoder with a byte-level tokenizer; arguments as for XLM-RoBERTa."""
    tokenizer = _byte_level_tokenizer()
    config = RobertaConfig(
        **_roberta_settings(positions, labels), vocab_size=tokenizer.get_vocab_size()
    )
    _save_model(RobertaForSequenceClassification(config), folder, dtype=dtype, seed=seed)
    _save_tokenizer(tokenizer, folder, "RobertaTokenizer", positions - 2)
    return folder


def build_bert(
    folder: Path,
    *,
    positions: int = 512,
    labels: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Write a BERT cross-encoder: two token types, `[CLS] q [SEP] d [SEP]`, pooled classifier.

    Arguments as for XLM-RoBERTa, but for `positions`, all of which tokens can use.
    """
    config = BertConfig(
        **_WIDTHS,
        vocab_size=VOCABULARY_SIZE,
        max_position_embeddings=positions,
        type_vocab_size=2,
        pad_token_id=0,
        num_labels=labels,
    )
    _save_model(BertForSequenceClassification(config), folder, dtype=dtype, seed=seed)
    _save_tokenizer(_word_piece_tokenizer(), folder, "BertTokenizer", positions)
    return folder


def _read_texts(name: str) -> dict[str, str]:
    lines = (XQUAD / name).read_text(encoding="utf-8").splitlines()
    return {record["_id"]: record["text"] for record in map(json.loads, lines)}


def _all_texts() -> list[str]:
    return [*read_queries().values(), *read_sentences().values()]


def _roberta_settings(positions: int, labels: int) -> dict[str, int | float | str]:
    """Return what the config files of BAAI's XLM-RoBERTa rerankers say, at a small width."""
    return {
        **_WIDTHS,
        "max_position_embeddings": positions,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "num_labels": labels,
    }


# Weights


def _save_model(model: PreTrainedModel, folder: Path, *, dtype: torch.dtype, seed: int) -> None:
    state = {
        name: _random_weights(name, tuple(tensor.shape), seed)
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }
    model.load_state_dict(state, strict=False)
    model.to(dtype).save_pretrained(folder, safe_serialization=True)


def _random_weights(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return float32 weights for a parameter, from a stream that only its name and `seed` set.

    They are spread widely enough that documents differ by whole units of logit, and that every
    part (positions, token types, biases, attention) shows in it; at the customary 0.02 all logits
    are nearly equal and a comparison of them proves nothing.
    """
    stream = np.random.RandomState(zlib.crc32(name.encode()) ^ seed)
    uniform = stream.uniform(-math.sqrt(3.0), math.sqrt(3.0), size=shape)
    centre = 1.0 if "LayerNorm.weight" in name else 0.0
    return torch.from_numpy((centre + _spread(name, shape) * uniform).astype(np.float32))


def _spread(name: str, shape: tuple[int, ...]) -> float:
    """Return the standard deviation for a parameter."""
    if "LayerNorm" in name or name.endswith("bias"):
        return 0.1
    if "embeddings" in name:
        return 1.0 if "word" in name else 0.3
    is_output = name in ("classifier.weight", "classifier.out_proj.weight")
    return (4.0 if is_output else 1.5) / math.sqrt(shape[-1])


# Tokenizers


def _save_tokenizer(
    tokenizer: Tokenizer, folder: Path, tokenizer_class: str, max_tokens: int
) -> None:
    """Write `tokenizer.json` and the config that AutoTokenizer reads, as BAAI's folders have."""
    tokenizer.save(str(folder / "tokenizer.json"))
    special_tokens = _BERT_ROLES if tokenizer_class == "BertTokenizer" else _XLM_R_ROLES
    config = {
        "tokenizer_class": tokenizer_class,
        "model_max_length": max_tokens,
        **special_tokens,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _unigram_tokenizer() -> Tokenizer:
    """Return a tokenizer like XLM-RoBERTa's: NFKC, Metaspace, Unigram, `<s> q </s></s> d </s>`."""
    normalizer = normalizers.Precompiled(CHARSMAP.read_bytes())
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
        ]
    )
    tokenizer = Tokenizer(models.Unigram(_unigram_vocabulary(normalizer, pre_tokenizer), unk_id=3))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    tokenizer.add_special_tokens(
        [
            *(AddedToken(token, normalized=False) for token in _XLM_R_SPECIALS),
            AddedToken("<mask>", lstrip=True, normalized=False),
        ]
    )
    return tokenizer


def _unigram_vocabulary(
    normalizer: normalizers.Normalizer, pre_tokenizer: pre_tokenizers.PreTokenizer
) -> list[tuple[str, float]]:
    """Return pieces with their log frequencies, special tokens where XLM-RoBERTa has them."""
    words = _count_words(normalizer, pre_tokenizer)
    counts = _count_pieces(words)
    room = VOCABULARY_SIZE - len(_XLM_R_SPECIALS) - 1
    total = sum(counts.values())
    pieces = _most_useful(counts, room, always={letter for word in words for letter in word})
    return [
        *((token, 0.0) for token in _XLM_R_SPECIALS),
        *((piece, math.log(counts[piece] / total)) for piece in pieces),
        ("<mask>", 0.0),
    ]


def _word_piece_tokenizer() -> Tokenizer:
    """Return a tokenizer like uncased BERT's."""
    normalizer = normalizers.BertNormalizer(lowercase=True)
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    vocabulary = _word_piece_vocabulary(normalizer, pre_tokenizer)
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=_BERT_SPECIALS[1]))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.add_special_tokens(list(_BERT_SPECIALS))
    return tokenizer


def _word_piece_vocabulary(
    normalizer: normalizers.Normalizer, pre_tokenizer: pre_tokenizers.PreTokenizer
) -> dict[str, int]:
    """Return pieces and their ids, those within a word marked with `##`."""
    words = _count_words(normalizer, pre_tokenizer)
    letters = {letter for word in words for letter in word}
    counts = _count_pieces(words, mark="##")
    always = letters | {f"##{letter}" for letter in letters}
    pieces = _most_useful(counts, VOCABULARY_SIZE - len(_BERT_SPECIALS), always=always)
    return {piece: index for index, piece in enumerate([*_BERT_SPECIALS, *pieces])}


def _byte_level_tokenizer() -> Tokenizer:
    """Return a tokenizer like RoBERTa's: byte-level BPE, `<s> q </s></s> d </s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[*_XLM_R_SPECIALS, "<mask>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_all_texts(), trainer)
    # By position: releases of tokenizers call these two by different names.
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), True, False)
    return tokenizer


def _count_words(
    normalizer: normalizers.Normalizer, pre_tokenizer: pre_tokenizers.PreTokenizer
) -> Counter[str]:
    """Return how often each word of the test data occurs, as a tokenizer would see it."""
    return Counter(
        word
        for text in _all_texts()
        for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text))
    )


def _count_pieces(words: Counter[str], *, mark: str = "") -> Counter[str]:
    """Return how often each short part of the words occurs, `mark` before those within a word."""
    counts: Counter[str] = Counter()
    for word, times in words.items():
        for start in range(len(word)):
            for end in range(start + 1, min(len(word), start + _LONGEST_PIECE) + 1):
                counts[(mark if start else "") + word[start:end]] += times
    return counts


def _most_useful(counts: Counter[str], number: int, *, always: Iterable[str]) -> list[str]:
    """Return `always` and the pieces that save most tokens, `number` in all, in a fixed order."""
    letters = sorted(always)
    longer = sorted(
        (piece for piece in counts if piece not in set(letters)),
        key=lambda piece: (-counts[piece] * (len(piece.removeprefix("##")) - 1), piece),
    )
    return [*letters, *longer[: number - len(letters)]]


# What the reference numbers are about

# Name, as of the files in `reference/`: how the checkpoint is built, and the longest pairs in them.
CHECKPOINTS = {
    "xlm-roberta-514": (build_xlm_roberta, 512),
    "xlm-roberta-8194": (partial(build_xlm_roberta, positions=8194, seed=1), 1500),
    "bert-512": (build_bert, 512),
}

# Snowman, Chinese, Hebrew, an emoji beyond the first plane, a private-use character: the test
# data has none of them. The fractions, ligatures and full-width letters are known to XLM-RoBERTa's
# tokenizer, which normalises them, and not to BERT's.
_UNKNOWN = (
    ("Is it cold? ☃", "A ☃ stands in the ☃☃ garden ☃."),
    ("Where is 北京?", "北京 is the capital of China, 上海 is larger."),
    ("What does שלום mean?", "שלום means peace."),
    ("😀", "😀"),
    ("How many sacks?", "Fellow lineman Mario Addison added 6½ sacks \ue000."),
    ("What was ﬁrst?", "\uff21\uff22\uff23 was the ﬁrst ☃ of the 1½ ﬁrms."),
)


def difficult_pairs(*, max_tokens: int) -> list[tuple[str, str, int]]:
    """Return (query, document, max_length): cut pairs, and pairs with unknown characters.

    The first six are not cut; all others are, by `max_length`s from 24 to `max_tokens`.
    """
    queries, sentences = list(read_queries().values()), list(read_sentences().values())
    article, questions = " ".join(sentences[:60]), " ".join(queries[:120])
    pairs = [(*pair, 512) for pair in _UNKNOWN]
    for max_length in (32, 77, 128, 512, max_tokens):
        short, medium = queries[7], " ".join(queries[7 : 7 + max_length // 24])
        pairs += [
            (short, article, max_length),
            (questions, sentences[3], max_length),
            (questions, article, max_length),
            (medium, article, max_length),
            (f"☃ {short}", f"北京 {article}", max_length),
        ]
    pairs += [(queries[i], sentences[i], 24 + i // 3) for i in range(0, 60, 3)]
    return list(dict.fromkeys(pairs))
