"""The encoders that figures are of, with random weights."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from benchmarks.checkpoints import SHAPES, Shape, build
from benchmarks.contenders import MAX_LENGTH
from benchmarks.gpu.setting import Setting
from benchmarks.texts import read_collection


def shape_of(setting: Setting, name: str) -> Shape:
    """Return the shape of this name, or the small one."""
    return SHAPES[setting.shape_name(name)]


def checkpoint(setting: Setting, name: str) -> Path:
    """Return the folder of a checkpoint of a shape, made where it is not there."""
    query, texts = read_collection(None)
    path = setting.folder / f"bge-reranker-{setting.shape_name(name)}"
    shape = shape_of(setting, name)
    return build(path, shape, texts=[query, *texts], dtype=torch.float16)


def pair_lengths(folder: Path, pairs: Sequence[tuple[str, str]]) -> list[int]:
    """Return the number of tokens of each pair as the model sees it."""
    encodings = Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(list(pairs))
    return [min(MAX_LENGTH, len(each.ids)) for each in encodings]
