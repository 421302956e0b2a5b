"""Merges LoRA adapters with their base in float32, as tensors are read."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

from bge_rerank_adapters.engine.checkpoints.adapter import ADAPTER_WEIGHTS, Adapter
from bge_rerank_adapters.engine.checkpoints.formats import describe_folder
from bge_rerank_adapters.engine.models.weights import Weights, open_files, open_folder
from bge_rerank_adapters.errors import CheckpointError, UnsupportedCheckpointError

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
# Prefixes that a base lacks if it was saved without its head.
_INNER_MODELS = ("roberta.", "bert.", "model.")
# Stored whole with an adapter if the vocabulary has grown.
_EMBEDDINGS = ("embed_tokens", "lm_head", "word_embeddings")


class AdaptedWeights(Weights):
    """The tensors of a base merged with an adapter: W + scale * B A, in float32."""

    def __init__(self, base: Weights, changes: Weights, adapter: Adapter) -> None:
        """Take both open files.

        Args:
            base: Weights of the base.
            changes: Weights of the adapter.
            adapter: The adapter's config.

        Raises:
            CheckpointError: The adapter changes a tensor that the base does not have.
            UnsupportedCheckpointError: It has tensors that are not plain LoRA.
        """
        self.path, self.folder, self.prefix = changes.path, adapter.folder, base.prefix
        self._base, self._changes, self._adapter = base, changes, adapter
        self._read = set[str]()
        names = [_plain_name(name) for name in changes.names()]
        self._stored = dict(zip(names, changes.names(), strict=True))
        self._modules = {name.removesuffix(_DOWN) for name in names if name.endswith(_DOWN)}
        if not names:
            raise CheckpointError(f"{self.path} holds no tensors; save the adapter again.")
        for name in names:
            self._check(name)

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        whole = [name for name in self._stored if not name.endswith((_DOWN, _UP))]
        return list(dict.fromkeys([*self._base.names(), *whole]))

    def __contains__(self, name: str) -> bool:
        """Return whether there is a tensor of that name."""
        return name in self._stored or self._base_name(name) in self._base

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        if name in self._stored:
            return self._changes.shape(self._stored[name])
        return self._base.shape(self._base_name(name))

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a tensor: merged in float32 if the adapter changes it, otherwise as stored.

        Raises:
            CheckpointError: As for `Weights.tensor`.
        """
        self._read |= {name, self._base_name(name)}
        if name in self._stored:
            weight = self._changes.tensor(self._stored[name], shape)
        else:
            weight = self._base.tensor(self._base_name(name), shape)
        module = name.removesuffix(".weight")
        return weight if module not in self._modules else self._merged(module, weight)

    def keeps_tied(self, words: str, head: str) -> bool:
        """Return whether word embeddings that are the head too are changed as one, or whole."""
        merged = head.removesuffix(".weight") in self._modules
        return not merged and (words not in self._stored or head in self._stored)

    def _merged(self, module: str, weight: torch.Tensor) -> torch.Tensor:
        rank, (outputs, inputs) = self._adapter.rank_of(module), weight.shape
        down = self._changes.tensor(self._stored[module + _DOWN], (rank, inputs)).float()
        up = self._changes.tensor(self._stored[module + _UP], (outputs, rank)).float()
        return weight.float() + self._adapter.scale_of(module) * (up @ down)

    def _base_name(self, name: str) -> str:
        """Return the base's name of a tensor, which may lack the prefix of the inner model."""
        if name in self._base:
            return name
        inner = next((each for each in _INNER_MODELS if name.startswith(each)), "")
        shorter = name.removeprefix(inner)
        return shorter if shorter in self._base else name

    def _check(self, name: str) -> None:
        if name.endswith((_DOWN, _UP)):
            module = name.removesuffix(_DOWN).removesuffix(_UP)
            weight = f"{module}.weight"
            if not {module + _DOWN, module + _UP} <= self._stored.keys():
                raise CheckpointError(
                    f"{self.path} has only one of lora_A and lora_B of {module}; save it again."
                )
            if weight not in self:
                raise CheckpointError(
                    f"{self.path} changes {weight}, which its base {self._base.path} lacks; the "
                    "adapter is of another model. Merge it with peft where it was trained."
                )
            if len(self.shape(weight)) != 2 or "embeddings" in module:
                raise self._not_plain(name)
        elif "lora_" in name or not self._is_saved_whole(name):
            raise self._not_plain(name)

    def _is_saved_whole(self, name: str) -> bool:
        return bool(set(name.split(".")) & {*self._adapter.saved_modules, *_EMBEDDINGS})

    def _not_plain(self, name: str) -> UnsupportedCheckpointError:
        return UnsupportedCheckpointError(
            f"{self.path}: the tensor {name} belongs neither to a linear layer's LoRA nor to a "
            "module in modules_to_save, and others are not merged here; merge the adapter with "
            "peft's merge_and_unload(), save_pretrained() that, and give its folder."
        )


def open_weights(folder: Path, adapter: Adapter | None = None) -> AbstractContextManager[Weights]:
    """Open a checkpoint's weights, merged with those of an adapter if there is one.

    Args:
        folder: Holds the safetensors of the model, or of the adapter's base.
        adapter: The adapter to merge.

    Raises:
        CheckpointError: Either is missing or damaged, or they do not fit each other.
        UnsupportedCheckpointError: One is quantised, or the adapter is not plain LoRA.
    """
    return open_folder(folder) if adapter is None else _open_adapted(folder, adapter)


@contextmanager
def _open_adapted(base: Path, adapter: Adapter) -> Iterator[Weights]:
    path = adapter.folder / ADAPTER_WEIGHTS
    if not path.is_file():
        found = describe_folder(adapter.folder) or f"has no {ADAPTER_WEIGHTS}"
        raise CheckpointError(f"{adapter.folder} is a LoRA adapter and {found}.")
    with open_folder(base) as weights, open_files(path, [path]) as changes:
        yield AdaptedWeights(weights, changes, adapter)


def _plain_name(name: str) -> str:
    """Return the base's name of a stored tensor, without what peft adds to it."""
    for added in (".modules_to_save.", ".default.", ".base_layer."):
        name = name.replace(added, ".")
    return name
