"""Prefixes that training wrappers leave in the names of tensors."""

from collections.abc import Collection

from bge_rerank_adapters.errors import CheckpointError

# DistributedDataParallel, torch.compile, and peft's wrapper.
_PREFIXES = ("module.", "_orig_mod.", "base_model.model.")


def training_prefix(names: Collection[str], *, path: object) -> str:
    """Return the prefix that training put before every tensor's name, `""` if there is none.

    Args:
        names: The names of all tensors.
        path: The file, for the error.

    Raises:
        CheckpointError: Only some names have such a prefix.
    """
    prefix = ""
    while found := next((each for each in _PREFIXES if _any_has(names, prefix + each)), None):
        prefix += found
        bare = next((name for name in names if not name.startswith(prefix)), None)
        if bare is not None:
            raise CheckpointError(
                f"{path}: some tensors' names begin with {prefix!r}, which training left there, "
                f"and others, such as {bare}, do not; save the model again without the wrapper."
            )
    return prefix


def leftover_hint(names: Collection[str]) -> str:
    """Return a hint for the error of a missing tensor, from the names that are there."""
    if any(".base_layer." in name or ".lora_A." in name for name in names):
        return (
            " They have LoRA layers that were never merged: call merge_and_unload() on the model "
            "and save that, or give the folder with adapter_config.json."
        )
    inner = next((each for each in _PREFIXES if any(f".{each}" in name for name in names)), None)
    if inner is None:
        return ""
    return f" Training left {inner!r} in names; save the model again without the wrapper."


def _any_has(names: Collection[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)
