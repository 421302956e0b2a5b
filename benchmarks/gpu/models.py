"""The encoders that figures are of, with random weights."""

from pathlib import Path

import torch

from benchmarks.checkpoints import SHAPES, Shape, build
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
