"""Reads the config of a LoRA adapter in peft's format.

It follows peft 0.21 (`tuners/lora/config.py` and `model.py`, `utils/other.py`).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bge_rerank_adapters.engine.json_files import read_json
from bge_rerank_adapters.errors import CheckpointError, UnsupportedCheckpointError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_WHOLE = ("model.safetensors", "model.safetensors.index.json")
_MERGE = "merge it with peft's merge_and_unload(), save_pretrained() that, and give its folder"
# Entries that are read here, or that only say what was trained and how.
_KNOWN = (
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "eva_config"),
    *("exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern"),
    *("layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save"),
    *("peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision"),
    *("target_modules", "task_type", "use_rslora"),
)
# Values of init_lora_weights that leave the base's weights unchanged.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter and its base model.

    Attributes:
        folder: Holds its config and weights.
        base: Folder or hub name of the base.
        revision: The base's revision on the hub.
        rank: Rank of modules that no pattern in `ranks` matches.
        alpha: Alpha of modules that no pattern in `alphas` matches.
        ranks: Ranks by regular expressions for module names.
        alphas: Alphas by regular expressions for module names.
        root_of_rank: Whether the scale is alpha / sqrt(rank) instead of alpha / rank.
        saved_modules: Names of modules that are stored whole.
    """

    folder: Path
    base: str
    revision: str | None
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    root_of_rank: bool
    saved_modules: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        """Return the rank for a module, given its full name."""
        return _by_pattern(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Return the factor of a module's low-rank product."""
        rank = self.rank_of(module)
        divisor = math.sqrt(rank) if self.root_of_rank else rank
        return _by_pattern(self.alphas, module, self.alpha) / divisor


def read_adapter(folder: Path) -> Adapter | None:
    """Return the adapter of a folder, or `None` for any other folder.

    Raises:
        CheckpointError: Its config is damaged, or the folder also holds a whole model.
        UnsupportedCheckpointError: It is not plain LoRA; the message says what it is.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    config = read_json(path)
    _check_supported(config, path)
    whole = next((name for name in _WHOLE if (folder / name).is_file()), None)
    if whole:
        raise CheckpointError(
            f"{folder} holds both an adapter ({ADAPTER_CONFIG}) and a whole model ({whole}); put "
            "the one that is meant into a folder of its own."
        )
    try:
        return _parse(config, folder)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"{path}: missing or unusable: {error!r}; copy the adapter's whole folder again, as "
            "peft has saved it."
        ) from error


def _parse(config: dict[str, Any], folder: Path) -> Adapter:
    adapter = Adapter(
        folder=folder,
        base=_text(config["base_model_name_or_path"]),
        revision=None if config.get("revision") is None else _text(config["revision"]),
        rank=_positive(config["r"]),
        alpha=float(config["lora_alpha"]),
        ranks={_pattern(k): _positive(v) for k, v in (config.get("rank_pattern") or {}).items()},
        alphas={_pattern(k): float(v) for k, v in (config.get("alpha_pattern") or {}).items()},
        root_of_rank=bool(config.get("use_rslora")),
        saved_modules=tuple(_text(each) for each in config.get("modules_to_save") or ()),
    )
    if not all(map(math.isfinite, (adapter.alpha, *adapter.alphas.values()))):
        raise ValueError("lora_alpha and alpha_pattern must be finite")
    return adapter


def _check_supported(config: dict[str, Any], path: Path) -> None:
    """Refuse options that go beyond plain LoRA."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedCheckpointError(
            f"{path}: peft_type {kind!r} is not LoRA, the only kind that is merged here; {_MERGE}."
        )
    extra = {name: value for name, value in config.items() if name not in _KNOWN}
    if config.get("bias", "none") != "none":
        extra["bias"] = config["bias"]
    init = config.get("init_lora_weights", True)
    if not any(init is each or init == each for each in _PLAIN_INITS):
        extra["init_lora_weights"] = init
    for name, value in extra.items():
        if value not in (None, False, "", [], {}):
            raise UnsupportedCheckpointError(
                f"{path}: {name} {value!r} goes beyond plain LoRA, the only kind that is merged "
                f"here; {_MERGE}."
            )


def _by_pattern(patterns: Mapping[str, _T], module: str, otherwise: _T) -> _T:
    """Return the value of the first pattern that matches a module's name or the end of it."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def _pattern(text: Any) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"the pattern {text!r}: {error}") from error
    return _text(text)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} must be a string that is not empty")
    return value


def _positive(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"the rank {value!r} must be a whole number of at least 1")
    return value
