"""The layerwise family: MiniCPM with a head for each layer from `start_layer` on.

It follows FlagEmbedding 1.4.2 (`inference/reranker/decoder_only/layerwise.py` and
`models/modeling_minicpm_reranker.py`).
"""

from pathlib import Path
from typing import Any

from bge_rerank_adapters.engine.models.causal.config import parse_causal
from bge_rerank_adapters.engine.models.causal.cutoff import HeadLayers, check_head_layers
from bge_rerank_adapters.engine.models.causal.entries import Entries
from bge_rerank_adapters.engine.models.causal.readout import SeveralHeadsModel
from bge_rerank_adapters.engine.models.causal.tensors import CausalReader
from bge_rerank_adapters.engine.models.lora import open_weights
from bge_rerank_adapters.engine.models.source import ModelSource
from bge_rerank_adapters.errors import UnsupportedCheckpointError


class LayerwiseModel(SeveralHeadsModel):
    """A MiniCPM model on one device, run up to the layer whose logit is read."""

    def __init__(self, source: ModelSource) -> None:
        """Load the layers up to the cutoff layer.

        Raises:
            CheckpointError: Tensors are missing, damaged or of the wrong shape.
            UnsupportedCheckpointError: The config has an unsupported option.
            SettingsError: The cutoff layer has no head.
        """
        config = parse_causal(source.config, folder=source.folder)
        entries = Entries(source.config, source.folder / "config.json")
        _check_head_type(entries)
        heads = layerwise_heads(source.config, folder=source.folder)
        depth = heads.check(source.settings.cutoff_layers)
        self._first = heads.first if entries.flag("head_multi", True) else None
        with open_weights(source.folder, source.adapter) as weights:
            read = CausalReader(weights, config, source.device, source.dtype)
            default = self.head_index(depth, 0)
            super().__init__(read, depth=depth, heads=self._head_names(depth), default=default)
            read.check_all_read(depth, heads=self._head_names(config.layers))

    def head_index(self, layer: int, place: int) -> int:
        """Return the layer's own head, or the single one for all layers."""
        del place
        return 0 if self._first is None else layer - self._first

    def _head_names(self, depth: int) -> list[str]:
        if self._first is None:
            return ["lm_head.linear_head.weight"]
        heads = depth - self._first + 1
        return [f"lm_head.{place}.linear_head.weight" for place in range(heads)]


def layerwise_heads(config: dict[str, Any], *, folder: Path) -> HeadLayers:
    """Return the layers of a checkpoint that have a head.

    Raises:
        CheckpointError: Its config is damaged.
    """
    entries = Entries(config, folder / "config.json")
    layers = parse_causal(config, folder=folder).layers
    return check_head_layers(HeadLayers(entries.whole("start_layer", 8), layers), entries)


def _check_head_type(entries: Entries) -> None:
    """Refuse heads over the whole vocabulary: those of models not yet trained as rerankers."""
    kind = entries.values.get("head_type", "simple")
    if kind in ("raw", "complex"):
        raise UnsupportedCheckpointError(
            f"{entries.path}: head_type must be 'simple', a head of one logit, got "
            f"{kind!r}, a head over the vocabulary; fine-tune the model as a reranker first."
        )
