"""Reads the files that sentence-transformers' `CrossEncoder` adds to a checkpoint.

It follows release 6.2 (`cross_encoder/model.py`, `base/model.py`, `base/modules/transformer.py`).
`modules.json` lists the modules, `config_sentence_transformers.json` has the prompts of queries,
and `sentence_bert_config.json` says how texts are read. Without `modules.json` the other two are
ignored.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bge_rerank_adapters.engine.json_files import read_json
from bge_rerank_adapters.errors import CheckpointError, UnsupportedCheckpointError

_MODULES, _CONFIG = "modules.json", "config_sentence_transformers.json"
# The first that exists is used; all but the first are from old releases.
_TRANSFORMER_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_ADVICE = "run it with sentence-transformers' own CrossEncoder"
# Torch's monotonic activations, which do not change the order of documents.
_MONOTONIC = (
    *("Sigmoid", "Identity", "Tanh", "LogSigmoid", "Softplus", "Softsign"),
    *("LeakyReLU", "ELU", "CELU", "SELU"),
)
# Entries of the transformer's config that change no score: padding, loading, and lengths for other
# tasks than a CrossEncoder's.
_HARMLESS = ("unpad_inputs", "query_length", "document_length", "query_expansion")
_HARMLESS_OF_TEXT = ("padding", "truncation", "max_length", "pad_to_multiple_of", "logits_to_keep")
_HARMLESS_OF_LOADING = (
    *("dtype", "torch_dtype", "attn_implementation", "device_map", "low_cpu_mem_usage"),
    *("use_safetensors", "use_fast", "trust_remote_code", "token", "revision", "cache_dir"),
    *("local_files_only", "model_max_length", "use_cache"),
)
# Names of the entries for loading; each second one is from old releases.
_LOADING = (
    *("model_kwargs", "model_args", "config_kwargs", "config_args"),
    *("processor_kwargs", "tokenizer_args"),
)
# Tokenizers without a limit have a larger number than this.
_NO_LIMIT = 10**6


@dataclass(frozen=True, slots=True)
class AuthorSettings:
    """What a checkpoint's author set for reading pairs.

    Attributes:
        query_prompt: Text before each query; may be empty.
        max_tokens: Maximum tokens of a pair; `None` if not set.
        lowercase: Whether texts are lower-cased first.
        prompts: All prompts, by name.
        default_prompt_name: The name of `query_prompt` among them.
        activation: Torch's class that turns logits into scores; `None` if not set.
    """

    query_prompt: str = ""
    max_tokens: int | None = None
    lowercase: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    activation: str | None = None


def read_author_settings(folder: Path, config: dict[str, Any]) -> AuthorSettings:
    """Return the author's settings in a folder of sentence-transformers; defaults for any other.

    Args:
        folder: Holds the checkpoint.
        config: Its `config.json`.

    Raises:
        CheckpointError: A file is damaged, or contradicts itself.
        UnsupportedCheckpointError: It needs something that is not supported; the message names it.
    """
    old = _check_activation(folder / "config.json", _old_activation(config))
    if not (folder / _MODULES).is_file():
        saved = "sentence_transformers" in config
        limit = tokenizer_limit(folder) if saved else None
        return AuthorSettings(max_tokens=limit, activation=old)
    _check_modules(folder / _MODULES)
    kind = read_json(folder / _CONFIG)
    if kind.get("model_type") != "CrossEncoder":
        # sentence-transformers then ignores these files.
        return AuthorSettings(activation=old)
    activation = _check_activation(folder / _CONFIG, kind.get("activation_fn"))
    path, entries = _transformer_config(folder)
    _check_transformer(path, entries)
    prompts, default = _read_prompts(folder / _CONFIG, kind), kind.get("default_prompt_name")
    return AuthorSettings(
        query_prompt=_default_prompt(folder / _CONFIG, default, prompts),
        max_tokens=_limit(folder, entries),
        lowercase=bool(entries.get("do_lower_case")),
        prompts=prompts,
        default_prompt_name=default,
        activation=activation or old,
    )


def _check_modules(path: Path) -> None:
    """Refuse all but a single Transformer in the folder's root."""
    modules = read_json(path, kind=list)
    try:
        names = [str(module["type"]).rpartition(".")[2] for module in modules]
        places = [module["path"] for module in modules]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}.") from error
    if names != ["Transformer"] or not str(modules[0]["type"]).startswith("sentence_transformers."):
        raise UnsupportedCheckpointError(
            f"{path} lists the modules {', '.join(names) or 'none'}, but only a "
            "single Transformer with its own head is supported here, and no embedding model; "
            f"{_ADVICE}."
        )
    if places[0]:
        raise UnsupportedCheckpointError(
            f"{path} says that the model is in the subfolder {places[0]!r}; give that folder, or "
            "save the model again with a newer sentence-transformers."
        )


def _read_prompts(path: Path, config: dict[str, Any]) -> dict[str, str]:
    prompts = config.get("prompts") or {}
    if not isinstance(prompts, dict):
        raise CheckpointError(f"{path}: prompts must be an object of strings, got {prompts!r}.")
    for name, prompt in prompts.items():
        if not isinstance(prompt, str | None):
            raise CheckpointError(f"{path}: the prompt {name!r} must be a string, got {prompt!r}.")
    return {name: prompt or "" for name, prompt in prompts.items()}


def _default_prompt(path: Path, name: Any, prompts: dict[str, str]) -> str:
    if name is None:
        return ""
    if not isinstance(name, str) or name not in prompts:
        raise CheckpointError(
            f"{path}: default_prompt_name {name!r} is none of its prompts ({', '.join(prompts)}); "
            "name one of them, or null."
        )
    return prompts[name]


def _transformer_config(folder: Path) -> tuple[Path, dict[str, Any]]:
    for name in _TRANSFORMER_CONFIGS:
        if entries := read_json(folder / name):
            return folder / name, entries
    return folder / _TRANSFORMER_CONFIGS[0], {}


def _check_transformer(path: Path, entries: dict[str, Any]) -> None:
    """Refuse entries that would change scores and are not supported."""
    known: dict[str, Callable[[Any], bool]] = {
        "transformer_task": lambda task: task == "sequence-classification",
        "modality_config": _is_plain_text,
        "module_output_name": lambda name: name == "scores",
        "processing_kwargs": _reads_plainly,
        "max_seq_length": lambda length: length is None or _is_length(length),
        "do_lower_case": lambda value: isinstance(value, bool),
        **dict.fromkeys(_HARMLESS, lambda _: True),
        **dict.fromkeys(_LOADING, lambda options: _only(options, _HARMLESS_OF_LOADING)),
    }
    # The default of a file without this entry, with which it would be an embedding model.
    entries = {"transformer_task": "feature-extraction"} | entries
    for name, value in entries.items():
        if name in known and not known[name](value):
            raise _not_applied(path, name, value)
        if name not in known and value not in (None, False, "", [], {}):
            raise _not_applied(path, name, value)


def _is_plain_text(modalities: Any) -> bool:
    # "message" would put texts into a chat template.
    if not isinstance(modalities, dict) or "message" in modalities:
        return False
    text = modalities.get("text")
    return isinstance(text, dict) and (
        (text.get("method"), text.get("method_output_name")) == ("forward", "logits")
    )


def _reads_plainly(options: Any) -> bool:
    if not isinstance(options, dict | None):
        return False
    given = options or {}
    return _only(given.get("text"), _HARMLESS_OF_TEXT) and _only(
        given.get("common"), (*_HARMLESS_OF_TEXT, "return_tensors")
    )


def _only(options: Any, allowed: Iterable[str]) -> bool:
    return options is None or (isinstance(options, dict) and set(options) <= set(allowed))


def _not_applied(path: Path, name: str, value: object) -> UnsupportedCheckpointError:
    return UnsupportedCheckpointError(
        f"{path}: {name} {value!r} changes how sentence-transformers scores, and is not applied "
        f"here; {_ADVICE}."
    )


def _limit(folder: Path, entries: dict[str, Any]) -> int | None:
    """Return the maximum tokens of a pair, by sentence-transformers' order of precedence."""
    of_text = (entries.get("processing_kwargs") or {}).get("text") or {}
    of_loading = entries.get("processor_kwargs") or entries.get("tokenizer_args") or {}
    given = (
        of_text.get("max_length"),
        of_loading.get("model_max_length"),
        entries.get("max_seq_length"),
    )
    found = next((each for each in given if _is_length(each)), None)
    return tokenizer_limit(folder) if found is None else found


def tokenizer_limit(folder: Path) -> int | None:
    """Return the maximum tokens that a folder's tokenizer is set to; `None` for no limit."""
    limit = read_json(folder / "tokenizer_config.json").get("model_max_length")
    return limit if _is_length(limit) and limit < _NO_LIMIT else None


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _old_activation(config: dict[str, Any]) -> object:
    """Return the activation in `config.json`, where releases 3 to 5 wrote it."""
    saved = config.get("sentence_transformers")
    if isinstance(saved, dict) and "activation_fn" in saved:
        return saved["activation_fn"]
    return config.get("sbert_ce_default_activation_function")


def _check_activation(path: Path, name: object) -> str | None:
    """Return an activation's name; refuse those that change the order of documents."""
    # Others than torch's are code of the checkpoint, which sentence-transformers ignores too.
    if not isinstance(name, str) or not name.startswith("torch."):
        return None
    if name.rpartition(".")[2] not in _MONOTONIC:
        raise UnsupportedCheckpointError(
            f"{path}: the activation {name} does not keep the order of the logits, by which "
            f"documents are ranked here; {_ADVICE}."
        )
    return name
