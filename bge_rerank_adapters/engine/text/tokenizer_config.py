"""Applies `tokenizer_config.json` to the tokenizer of an encoder, or refuses it.

`tokenizer_config.json` names a class of transformers. That class replaces parts of the tokenizer in
`tokenizer.json` when it loads it; the same parts are replaced here. Sources: transformers 5.23,
`models/*/tokenization_*.py`; 4.44, `tokenization_*_fast.py`.
"""

from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, normalizers, pre_tokenizers

from bge_rerank_adapters.engine.json_files import read_json
from bge_rerank_adapters.engine.text.added_tokens import CONFIG, add_tokens, content_of
from bge_rerank_adapters.engine.text.tokenizer import read_template
from bge_rerank_adapters.errors import CheckpointError, UnsupportedCheckpointError


class _SpecialTokens(NamedTuple):
    """The special tokens that a class of transformers puts around a pair by default.

    Attributes:
        first: The token before the query.
        separator: The token after the query and after the document.
        between: How many separators follow the query.
    """

    first: str
    separator: str
    between: int


_BERT = _SpecialTokens("[CLS]", "[SEP]", 1)
_ROBERTA = _SpecialTokens("<s>", "</s>", 2)
# By class, without the "Fast" of transformers 4.
_CLASSES = {
    **dict.fromkeys(
        ("BertTokenizer", "ElectraTokenizer", "MobileBertTokenizer", "ConvBertTokenizer"), _BERT
    ),
    **dict.fromkeys(("RobertaTokenizer", "XLMRobertaTokenizer", "CamembertTokenizer"), _ROBERTA),
}
# Classes that change nothing in tokenizer.json.
_GENERIC = ("PreTrainedTokenizer", "TokenizersBackend")
# The class that transformers uses where the config names none, by model type.
_CLASS_OF_MODEL = {
    "bert": "BertTokenizer",
    "roberta": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "camembert": "CamembertTokenizer",
}
_FLAG = 'backend="flagembedding" runs it'


def check_truncation_side(folder: Path) -> None:
    """Refuse a tokenizer that cuts off the beginning of documents.

    Raises:
        UnsupportedCheckpointError: It does.
    """
    path = folder / CONFIG
    side = read_json(path).get("truncation_side", "right")
    if side != "right":
        raise UnsupportedCheckpointError(
            f"{path}: truncation_side {side!r} cuts off the beginning of long documents, which is "
            f'not done here; {_FLAG}. Write "right" there to have their end cut off.'
        )


def apply_config(tokenizer: Tokenizer, folder: Path, *, model_type: str) -> None:
    """Change a tokenizer as transformers' class for it does.

    Args:
        tokenizer: The content of `tokenizer.json`; changed in place.
        folder: Holds the config. If it names no class, it is the one of the model type.
        model_type: The encoder's `model_type`.

    Raises:
        CheckpointError: The config is damaged, or contradicts `tokenizer.json`.
        UnsupportedCheckpointError: It needs something that is not supported.
    """
    path = folder / CONFIG
    config = read_json(path)
    try:
        _apply(tokenizer, config, path, model_type=model_type)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"{path} is damaged, or does not fit tokenizer.json ({error}); copy both files of one "
            "checkpoint."
        ) from error


def _apply(tokenizer: Tokenizer, config: dict[str, Any], path: Path, *, model_type: str) -> None:
    named = config.get("tokenizer_class") or _CLASS_OF_MODEL[model_type]
    name = str(named).removesuffix("Fast")
    if name not in _CLASSES and name not in _GENERIC:
        raise UnsupportedCheckpointError(
            f"{path}: tokenizer_class {named!r} is not supported; supported are "
            f"{', '.join((*_CLASSES, *_GENERIC))}. {_FLAG}."
        )
    add_tokens(tokenizer, path.parent)
    if _CLASSES.get(name) is _BERT:
        _replace_bert_normalizer(tokenizer, config)
    if name == "RobertaTokenizer":
        _replace_byte_level(tokenizer, config)
    if name in _CLASSES:
        _check_special_tokens(tokenizer, _CLASSES[name], config, path)
    if model_type == "bert":
        _check_token_types(config, path, generic=name in _GENERIC)


def _replace_bert_normalizer(tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    found = tokenizer.normalizer
    if isinstance(found, normalizers.BertNormalizer):
        accents = config.get("strip_accents")
        tokenizer.normalizer = normalizers.BertNormalizer(
            clean_text=found.clean_text,
            handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
            strip_accents=None if accents is None else bool(accents),
            lowercase=bool(config.get("do_lower_case", True)),
        )


def _replace_byte_level(tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    found = tokenizer.pre_tokenizer
    if isinstance(found, pre_tokenizers.ByteLevel):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=bool(config.get("add_prefix_space", False)),
            use_regex=found.use_regex,
        )


def _check_special_tokens(
    tokenizer: Tokenizer, default: _SpecialTokens, config: dict[str, Any], path: Path
) -> None:
    """Refuse a tokenizer whose special tokens around a pair are not those of its class."""
    first = content_of(config.get("cls_token") or default.first)
    separator = content_of(config.get("sep_token") or default.separator)
    try:
        template = read_template(tokenizer)
    except CheckpointError:
        return  # `load_tokenizer` reads the template again, and adds the file's name to the error
    found = [
        [tokenizer.id_to_token(int(each)) or "?" for each in part]
        for part in (template.before, template.between, template.after)
    ]
    wanted = [[first], [separator] * default.between, [separator]]
    if found != wanted:
        raise CheckpointError(
            f"{path} has {_shown(wanted)} around a pair, by its tokenizer_class, cls_token and "
            f"sep_token, but tokenizer.json has {_shown(found)}; copy both files of one checkpoint."
        )


def _shown(template: list[list[str]]) -> str:
    before, between, after = (" ".join(part) for part in template)
    return f"{before!r}, {between!r}, {after!r}"


def _check_token_types(config: dict[str, Any], path: Path, *, generic: bool) -> None:
    """Refuse a BERT model that gets no token types: its documents would have that of a query."""
    names = config.get("model_input_names")
    if names is None and generic:
        raise UnsupportedCheckpointError(
            f"{path} has no model_input_names, so it is not known whether the model gets "
            "token_type_ids: releases of transformers differ. Add model_input_names with "
            '["input_ids", "token_type_ids", "attention_mask"] if it was trained with them.'
        )
    if names is not None and "token_type_ids" not in names:
        raise UnsupportedCheckpointError(
            f"{path}: model_input_names {names!r} leaves token_type_ids out, so a document would "
            f"have the type of a query; {_FLAG}."
        )
