"""Applies the tokenizer config of a decoder, or refuses it.

Releases of transformers differ. Release 5 builds the tokenizers of some classes from the vocabulary
alone (`models/{llama,gemma,qwen2}/tokenization_*.py` of 5.23), and for some model types it uses
another class than the one that is named (`models/auto/tokenization_auto.py`). Older releases use
`tokenizer.json` as it is. So a tokenizer is accepted only if both ways divide texts alike.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from bge_rerank_adapters.engine.json_files import read_json
from bge_rerank_adapters.engine.text.added_tokens import CONFIG, add_tokens
from bge_rerank_adapters.errors import CheckpointError, UnsupportedCheckpointError

_LLAMA, _GEMMA, _QWEN = "LlamaTokenizer", "GemmaTokenizer", "Qwen2Tokenizer"
# Classes that change nothing in tokenizer.json.
GENERIC = ("PreTrainedTokenizer", "TokenizersBackend")
# The class that transformers uses where the files name none, by model type.
_CLASS_OF_MODEL = {"gemma": _GEMMA, "qwen2": _QWEN, "qwen3": _QWEN}
# The model types whose tokenizers release 5 builds from the vocabulary.
_REMADE = ("gemma", "llama", "qwen2", "qwen3")
_PREFIX = "add_prefix_space"
# None begins with a space, nor has a special token: after these, tokenizer.json is followed.
_PROBES = ("A: a  b", "It's 1234 ñ-x\n\n y", "e\u0301te\u0301 北京, ﬁ!", "\n")
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_FLAG = 'backend="flagembedding" runs it as the installed transformers does'

Split = Callable[[str], list[str]]
"""Returns what a text is divided into before its tokens are found."""


def tokenizer_class(folder: Path, model_config: Mapping[str, Any]) -> str:
    """Return the name of transformers' class, without the "Fast" of release 4.

    Args:
        folder: Holds the tokenizer.
        model_config: The model's `config.json`.

    Raises:
        CheckpointError: The name is no text.
    """
    named = read_json(folder / CONFIG).get("tokenizer_class") or model_config.get("tokenizer_class")
    named = named or _CLASS_OF_MODEL.get(model_config["model_type"], GENERIC[0])
    if not isinstance(named, str):
        raise CheckpointError(
            f"{folder / CONFIG}: tokenizer_class must be a string, got {named!r}."
        )
    return named.removesuffix("Fast")


def apply_decoder_config(
    tokenizer: Tokenizer, folder: Path, *, model_config: Mapping[str, Any]
) -> None:
    """Add tokens as transformers would, and refuse what it would read in another way.

    Args:
        tokenizer: The content of `tokenizer.json`; changed in place.
        folder: Holds that and its config.
        model_config: The model's `config.json`.

    Raises:
        CheckpointError: A file is damaged, or contradicts another.
        UnsupportedCheckpointError: The tokenizer's class reads texts in another way.
    """
    path = folder / CONFIG
    name, kind = tokenizer_class(folder, model_config), model_config["model_type"]
    if name not in (*GENERIC, _LLAMA, _GEMMA, _QWEN):
        raise UnsupportedCheckpointError(
            f"{path}: tokenizer_class {name!r} may read texts in a way of its own; supported are "
            f"{', '.join((*GENERIC, _LLAMA, _GEMMA, _QWEN))}. {_advice()}"
        )
    try:
        add_tokens(tokenizer, folder)
        expected = _expected(tokenizer, name, kind, read_json(path))
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"{path} is damaged, or does not fit tokenizer.json ({error}); copy both files of one "
            "checkpoint."
        ) from error
    _check_fixed(tokenizer, folder)
    if expected is not None:
        _check_read_alike(tokenizer, expected, path, name=name)


def _advice() -> str:
    return (
        'If the model was trained with tokenizer.json as it is, write "PreTrainedTokenizerFast" '
        f"as tokenizer_class; {_FLAG}."
    )


def _check_fixed(tokenizer: Tokenizer, folder: Path) -> None:
    """Refuse BPE dropout, which divides a text in another way each time."""
    dropout = getattr(tokenizer.model, "dropout", None)
    if dropout:
        raise UnsupportedCheckpointError(
            f"{folder / 'tokenizer.json'}: its model has the dropout {dropout:g}, with which a "
            "text has other tokens each time; write null there."
        )


def _expected(
    tokenizer: Tokenizer, name: str, kind: str, config: Mapping[str, Any]
) -> Split | None:
    """Return how the class divides texts; `None` if it takes `tokenizer.json` as it is."""
    asked = config.get(_PREFIX)
    if not isinstance(asked, bool | None):
        raise TypeError(f"{_PREFIX} must be true, false or null, got {asked!r}")
    if name in GENERIC or (kind not in _REMADE and asked is None):
        return None
    if kind == "qwen2" or name == _QWEN:
        return _qwen_split(prefix=bool(asked))
    if name == _LLAMA and _has_byte_level(tokenizer):
        return None
    prefix = "▁" if name == _LLAMA and asked is not False else ""
    return lambda text: [prefix + text.replace(" ", "▁")]


def _qwen_split(*, prefix: bool) -> Split:
    normalize, split = normalizers.NFC(), _qwen_words(prefix=prefix)
    return lambda text: [part for part, _ in split.pre_tokenize_str(normalize.normalize_str(text))]


def _qwen_words(*, prefix: bool) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    return pre_tokenizers.Sequence([words, byte_level])


def _check_read_alike(tokenizer: Tokenizer, expected: Split, path: Path, *, name: str) -> None:
    for text in _PROBES:
        wanted, found = expected(text), _parts(tokenizer, text)
        if found != wanted:
            raise UnsupportedCheckpointError(
                f"{path}: the class {name} reads {text!r} as {wanted!r}, but tokenizer.json as "
                f"{found!r}, and releases of transformers differ in which one counts. {_advice()}"
            )
    if name in (_LLAMA, _GEMMA) and not _reads_unknown_as_bytes(tokenizer):
        raise UnsupportedCheckpointError(
            f"{path}: the class {name} reads characters that are not in the vocabulary as bytes "
            "(byte_fallback, fuse_unk), but tokenizer.json does not, and releases of transformers "
            f"differ in which one counts. {_advice()}"
        )


def _reads_unknown_as_bytes(tokenizer: Tokenizer) -> bool:
    model = tokenizer.model
    if _has_byte_level(tokenizer):
        return True  # which knows every character
    return isinstance(model, models.BPE) and bool(model.byte_fallback and model.fuse_unk)


def _has_byte_level(tokenizer: Tokenizer) -> bool:
    return "Ġ" in "".join(_parts(tokenizer, "a b"))


def _parts(tokenizer: Tokenizer, text: str) -> list[str]:
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is None:
        return [text]
    return [part for part, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
