"""What a folder of peft's says of its LoRA adapter: the base, and how much of it is added.

By the rules of peft 0.21 (`tuners/lora/config.py` and `model.py`, `utils/other.py`).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bge_rerank_adapters.engine.checkpoints.json_files import read_json
from bge_rerank_adapters.errors import CheckpointError, UnsupportedCheckpointError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MERGE = "merge it with peft's merge_and_unload(), save_pretrained() that, and give its folder"
# Entries that choose what was trained or how, which the stored tensors show, or that are read here.
_KNOWN = (
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "eva_config"),
    *("exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern"),
    *("layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save"),
    *("peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision"),
    *("target_modules", "task_type", "use_rslora"),
)
# Ways to begin that leave the base as it is; all others change its weights too.
_PLAIN_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter of some base.

    Attributes:
        folder: Holds its config and weights.
        base: The folder or the name on the hub of what it was trained on.
        revision: Of the base on the hub.
        rank: Of the products that are added, where no pattern says another.
        alpha: What they are multiplied by and divided by the rank, likewise.
        ranks: By a regular expression for the names of modules.
        alphas: By another.
        root_of_rank: Whether they are divided by the root of the rank instead.
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
        """Return the rank of a module's product, by the module's whole name."""
        return _by_pattern(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Return the factor of a module's product."""
        rank = self.rank_of(module)
        divisor = math.sqrt(rank) if self.root_of_rank else rank
        return _by_pattern(self.alphas, module, self.alpha) / divisor


def read_adapter(folder: Path) -> Adapter | None:
    """Return the adapter of a folder, or `None` for any other folder.

    Raises:
        CheckpointError: Its config is damaged, or a whole model is there as well.
        UnsupportedCheckpointError: It is of another kind than plain LoRA; the message names it.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    config = read_json(path)
    _check_supported(config, path)
    whole = next((name for name in _WHOLE if (folder / name).is_file()), None)
    if whole:
        raise CheckpointError(
            f"{folder} holds an adapter ({ADAPTER_CONFIG}) and a whole model ({whole}), so which "
            "of the two is meant cannot be known; put one of them into a folder of its own."
        )
    try:
        return _parse(config, folder)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path}: missing or unusable: {error!r}.") from error


_WHOLE = ("model.safetensors", "model.safetensors.index.json")


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
    """Refuse by name whatever changes more than plain LoRA does."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedCheckpointError(
            f"{path}: peft_type {kind!r} is no plain LoRA adapter, which alone is merged here; "
            f"{_MERGE}."
        )
    asked = {name: value for name, value in config.items() if name not in _KNOWN}
    if config.get("bias", "none") != "none":
        asked["bias"] = config["bias"]
    begun = config.get("init_lora_weights", True)
    if not any(begun is each or begun == each for each in _PLAIN_BEGINNINGS):
        asked["init_lora_weights"] = begun
    for name, value in asked.items():
        if value not in (None, False, "", [], {}):
            raise UnsupportedCheckpointError(
                f"{path}: {name} {value!r} goes beyond plain LoRA, which alone is merged here; "
                f"{_MERGE}."
            )


def _by_pattern(patterns: Mapping[str, _T], module: str, otherwise: _T) -> _T:
    """Return the value of the first pattern that a module's name, or the end of it, matches."""
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
