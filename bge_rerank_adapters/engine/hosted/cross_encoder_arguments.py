"""The arguments of sentence-transformers' `CrossEncoder`, checked and converted."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from bge_rerank_adapters.calls.requests import Request
from bge_rerank_adapters.errors import InputTypeError, SettingsError
from bge_rerank_adapters.settings import EngineSettings
from bge_rerank_adapters.settings.checkpoints import family_setting

USE_THEIRS = "use sentence_transformers' own CrossEncoder for that"
# Names of arguments in old releases, which sentence-transformers still takes.
_OLD_NAMES = {
    "model_name": "model_name_or_path",
    "automodel_args": "model_kwargs",
    "tokenizer_args": "processor_kwargs",
    "tokenizer_kwargs": "processor_kwargs",
    "config_args": "config_kwargs",
    "cache_dir": "cache_folder",
    "default_activation_function": "activation_fn",
    "sentences": "inputs",
    "activation_fct": "activation_fn",
}
# Methods and attributes for training, saving and moving, and those of the torch module.
UNSUPPORTED_NAMES = frozenset(
    (
        *("fit", "old_fit", "train", "half", "compile", "merge", "evaluate", "forward"),
        *("save", "save_pretrained", "save_to_hub", "push_to_hub", "to", "cpu", "cuda"),
        *("start_multi_process_pool", "stop_multi_process_pool", "smart_batching_collate"),
        *("model", "transformers_model", "tokenizer", "config", "parameters"),
    )
)


def is_single(inputs: Any) -> bool:
    """Return whether inputs are one pair, by sentence-transformers' rule."""
    if isinstance(inputs, list | tuple):
        first = inputs[0] if inputs else ()
        return not isinstance(first, list | tuple) and getattr(first, "shape", ()) == ()
    return getattr(inputs, "ndim", None) == 1 and len(inputs) > 0


def pairs(inputs: Any) -> list[tuple[str, str]]:
    """Return inputs of `predict` as (query, document) tuples.

    Raises:
        InputTypeError: A pair is not two `str`; the message names which.
    """
    if hasattr(inputs, "tolist"):
        inputs = inputs.tolist()
    if not isinstance(inputs, str | bytes) and isinstance(inputs, Iterable):
        inputs = [each.tolist() if hasattr(each, "tolist") else each for each in inputs]
    try:
        return [(request.query, request.texts[0]) for request in Request.checked_pairs(inputs)]
    except InputTypeError as error:
        raise InputTypeError(str(error).replace("pairs", "inputs")) from None


def as_numpy(scores: Any, pairs: int) -> Any:
    """Return a tensor of scores as a numpy array; without pairs as sentence-transformers does."""
    import numpy as np

    return scores.numpy() if pairs else np.array([])


def choose_prompt(prompts: Mapping[str, str], name: str | None) -> str:
    """Return the prompt of a name, or an empty one for `None`.

    Raises:
        SettingsError: There is no prompt of that name.
    """
    if name is None:
        return ""
    if name not in prompts:
        raise SettingsError(
            f"The prompt name {name!r} is none of the prompts "
            f"({', '.join(map(repr, prompts)) or 'there are none'}); name one of them, or "
            "give prompt=."
        )
    return prompts[name]


def check_labels(num_labels: object, config_kwargs: Mapping[str, Any] | None) -> None:
    """Refuse any number of labels but 1.

    Raises:
        SettingsError: There are several, or `config_kwargs` has other entries.
    """
    config = only(config_kwargs, "config_kwargs", "num_labels", "classifier_dropout")
    for labels in (num_labels, config.get("num_labels")):
        if labels not in (None, 1):
            raise SettingsError(f"num_labels must be 1, got {labels!r}; {USE_THEIRS}.")


def encoder_settings(
    model: str | None,
    *,
    device: Any,
    model_kwargs: Mapping[str, Any] | None,
    revision: str | None,
    cache_folder: str | None,
    local_files_only: bool,
    token: bool | str | None,
) -> EngineSettings:
    """Return the engine's settings for arguments of `CrossEncoder`.

    Raises:
        SettingsError: An argument has a value that is not allowed or not supported.
    """
    if model is None:
        raise SettingsError("model_name_or_path must name a checkpoint, got None.")
    loading = only(
        model_kwargs,
        "model_kwargs",
        *("dtype", "torch_dtype", "device_map", "attn_implementation"),
    )
    return EngineSettings(
        model=model,
        family=family_setting(
            model,
            "encoder",
            instead="CrossEncoder scores such models by yes minus no, which is not supported here; "
            "use Reranker",
        ),
        device=_device(loading.get("device_map") or device),
        dtype=loading.get("dtype") or loading.get("torch_dtype") or "auto",
        revision=revision,
        cache_dir=cache_folder or os.environ.get("SENTENCE_TRANSFORMERS_HOME") or None,
        local_files_only=local_files_only,
        token=_token(token),
    )


def _device(device: Any) -> str:
    if isinstance(device, Mapping | list | tuple):
        raise SettingsError(
            f"device must name one device, got {device!r}; use Reranker, which takes a list."
        )
    return "auto" if device is None else str(device)


def _token(token: bool | str | None) -> str | None:
    if token is False:
        raise SettingsError("token must be a str, True or None, got False; leave it out.")
    return None if token is True else token


def only(given: Mapping[str, Any] | None, name: str, *allowed: str) -> Mapping[str, Any]:
    """Return the entries of a `..._kwargs` argument; refuse all that are not allowed.

    Raises:
        SettingsError: There is one.
    """
    entries = given or {}
    for key in entries:
        if key not in allowed:
            raise SettingsError(
                f"{name} takes {', '.join(allowed)} here, got {key!r}; leave it out, or "
                f"{USE_THEIRS}."
            )
    return entries


def refuse_given(**arguments: object) -> None:
    """Raise `SettingsError` for an argument that is not `None`: those are not supported."""
    for name, value in arguments.items():
        if value is not None:
            raise SettingsError(f"{name} is not supported here, got {value!r}; {USE_THEIRS}.")


def refuse_unknown(function: str, arguments: Mapping[str, Any]) -> None:
    """Raise `TypeError` for arguments that do not exist; it names those that were renamed."""
    for name in arguments:
        now = _OLD_NAMES.get(name)
        action = f"it is called {now!r} now" if now else f"leave it out, or {USE_THEIRS}"
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}; {action}.")
