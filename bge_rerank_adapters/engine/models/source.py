"""What a model is loaded from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bge_rerank_adapters.engine.checkpoints.adapter import Adapter
from bge_rerank_adapters.engine.text.tokenizer import PairTokenizer
from bge_rerank_adapters.settings import EngineSettings


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A checkpoint, and how to run it.

    Attributes:
        config: The checkpoint's `config.json`.
        folder: Folder of its safetensors.
        adapter: LoRA adapter to merge with them, if any.
        settings: The engine's settings.
        tokenizer: The checkpoint's tokenizer.
        device: The model's device.
        dtype: The dtype of weights and activations, or int8.
    """

    config: dict[str, Any]
    folder: Path
    adapter: Adapter | None
    settings: EngineSettings
    tokenizer: PairTokenizer
    device: torch.device
    dtype: torch.dtype
