"""Reads and checks a checkpoint's safetensors files."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bge_rerank_adapters.engine.checkpoints.formats import describe_folder
from bge_rerank_adapters.engine.checkpoints.prefixes import leftover_hint, training_prefix
from bge_rerank_adapters.engine.checkpoints.quantised import check_tensors_plain
from bge_rerank_adapters.errors import CheckpointError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Names of a layer norm's tensors in checkpoints of 2019 and older.
_OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


class Weights:
    """The tensors of a checkpoint's safetensors files, each read on demand.

    Attributes:
        path: The file with all tensors, or the index of several.
        folder: The folder of this file.
        prefix: The prefix that training left before every name; methods take names without it.
    """

    def __init__(self, path: Path, tensors: dict[str, Any]) -> None:
        """Take the open file of each tensor.

        Args:
            path: The file with all tensors, or the index of several; errors name it.
            tensors: Open files by the stored names of their tensors.

        Raises:
            CheckpointError: Training left a prefix before only some names.
            UnsupportedCheckpointError: The weights are quantised.
        """
        self.path, self.folder = path, path.parent
        check_tensors_plain({name: _dtype(tensors, name) for name in tensors}, path)
        self.prefix = training_prefix(tensors, path=path)
        self._files = tensors
        self._read = set[str]()

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return [name.removeprefix(self.prefix) for name in self._files]

    def __contains__(self, name: str) -> bool:
        """Return whether there is a tensor of that name."""
        return self.prefix + name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        name = self._stored_name(name)
        return tuple(self._files[name].get_slice(name).get_shape())

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a tensor, in its stored dtype.

        Raises:
            CheckpointError: It is missing, has another shape, or is not of a floating-point dtype.
        """
        self._read.add(name)
        stored, name = self.shape(name), self._stored_name(name)
        if stored != shape:
            raise CheckpointError(
                f"{self.path}: the tensor {name} has shape {stored}, but config.json asks for "
                f"{shape}; config and weights are not of one checkpoint."
            )
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{self.path}: the tensor {name} is of dtype {str(tensor.dtype)[6:]}, not of a "
                "floating-point one, so it cannot be a weight."
            )
        return tensor

    def keeps_tied(self, words: str, head: str) -> bool:
        """Return whether no adapter changes one of two tied tensors alone."""
        del words, head
        return True

    def unread(self) -> list[str]:
        """Return the names of the tensors that were not read so far."""
        return [name for name in self.names() if name not in self._read]

    def check_absent(self, name: str, *, layers: int) -> None:
        """Refuse to leave layers out: the model would run, and give other numbers.

        Args:
            name: Name of a tensor of the layer after the last one.
            layers: Number of layers in the config.

        Raises:
            CheckpointError: The tensor is there.
        """
        if name in self:
            raise CheckpointError(
                f"{self.path} has the tensor {name}, but num_hidden_layers in config.json is "
                f"{layers}; config and weights are not of one checkpoint."
            )

    def _stored_name(self, name: str) -> str:
        if (full := self.prefix + name) in self._files:
            return full
        for new, old in _OLD_NAMES.items():
            if full.endswith(new) and (older := full.removesuffix(new) + old) in self._files:
                return older
        raise CheckpointError(
            f"{self.path}: the weights lack the tensor {name}, which a reranker with this "
            "config.json has; the files may be incomplete, of another model, or of one without "
            f"a reranker's head.{leftover_hint(self._files)}"
        )


def _dtype(tensors: dict[str, Any], name: str) -> str:
    return str(tensors[name].get_slice(name).get_dtype())


@contextmanager
def open_folder(folder: Path) -> Iterator[Weights]:
    """Open a checkpoint's safetensors, one file or several with an index.

    Raises:
        CheckpointError: There are none, or one is damaged or missing.
        UnsupportedCheckpointError: They are quantised.
    """
    with open_files(*_weight_files(folder)) as weights:
        yield weights


@contextmanager
def open_files(source: Path, files: list[Path]) -> Iterator[Weights]:
    """Open safetensors files as one.

    Args:
        source: The file to name in errors.
        files: The files with the tensors.

    Raises:
        CheckpointError: One is damaged.
        UnsupportedCheckpointError: They are quantised.
    """
    with ExitStack() as stack:
        tensors: dict[str, Any] = {}
        for path in files:
            try:
                file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path} is damaged or incomplete ({error}); copy or download it again."
                ) from error
            tensors.update(dict.fromkeys(file.keys(), file))
        yield Weights(source, tensors)


def _weight_files(folder: Path) -> tuple[Path, list[Path]]:
    """Return the file to name in errors, and the files with the tensors."""
    if (folder / _SINGLE).is_file():
        return folder / _SINGLE, [folder / _SINGLE]
    if (folder / _INDEX).is_file():
        return folder / _INDEX, _sharded_files(folder)
    found = describe_folder(folder)
    if found is None:
        found = f"has no weights: neither {_SINGLE} nor {_INDEX} is there"
    raise CheckpointError(f"{folder} {found}.")


def _sharded_files(folder: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads((folder / _INDEX).read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder / _INDEX} is damaged: {error!r}.") from error
    # A file in another folder is not part of the checkpoint.
    strange = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if strange:
        raise CheckpointError(
            f"{folder / _INDEX} names {strange[0]!r} as a file, which must be the name of one in "
            "the same folder."
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}, which {_INDEX} names.")
    return [folder / name for name in names]
