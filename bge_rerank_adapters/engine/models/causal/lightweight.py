"""The lightweight family: Gemma 2 that compresses the tokens of documents between layers.

It follows FlagEmbedding 1.4.2 (`inference/reranker/decoder_only/lightweight.py` and
`models/gemma_model.py`), including two details that the published scores depend on:

- The k-th layer that is read uses the k-th head, not the head of its own number. So a single layer
  always uses the first head, and a layer's logits depend on which other layers are read.
- Attention scores are not capped, although the config has `attn_logit_softcapping`, because
  torch's attention function does not support it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bge_rerank_adapters.engine.models.causal.attention import CausalLayout
from bge_rerank_adapters.engine.models.causal.config import parse_causal
from bge_rerank_adapters.engine.models.causal.cutoff import HeadLayers, check_head_layers
from bge_rerank_adapters.engine.models.causal.entries import Entries
from bge_rerank_adapters.engine.models.causal.readout import SeveralHeadsModel, readout_of
from bge_rerank_adapters.engine.models.causal.tensors import CausalReader
from bge_rerank_adapters.engine.models.lora import open_weights
from bge_rerank_adapters.engine.models.source import ModelSource
from bge_rerank_adapters.engine.text.pairs import TokenPair
from bge_rerank_adapters.errors import CheckpointError, SettingsError, UnsupportedCheckpointError

_DEFAULT_COMPRESS_LAYERS = (8,)


class LightweightModel(SeveralHeadsModel):
    """A Gemma 2 model on one device, run up to the layer whose logit is read."""

    # Averaging needs every row of a document, so rows are not shared.
    shares_queries = False

    def __init__(self, source: ModelSource) -> None:
        """Load the layers up to the cutoff layer.

        Raises:
            CheckpointError: Tensors are missing, damaged or of the wrong shape.
            UnsupportedCheckpointError: The config has an unsupported option.
            SettingsError: A layer of the settings does not exist, or has no head.
        """
        folder, settings = source.folder, source.settings
        config = parse_causal(source.config, folder=folder)
        if not Entries(source.config, folder / "config.json").flag("layer_wise", False):
            raise UnsupportedCheckpointError(
                f"{folder / 'config.json'}: layer_wise must be true for a reranker of the "
                f"lightweight family, got {source.config.get('layer_wise')!r}."
            )
        heads = lightweight_heads(source.config, folder=folder)
        depth = heads.check(settings.cutoff_layers)
        self._ratio = settings.compress_ratio or 1
        self._compress_layers = check_compress_layers(settings.compress_layers, config.layers)
        self._cap = _cap(source.config, folder)
        every = [f"lm_head.{place}.linear_head.weight" for place in range(len(heads.layers))]
        with open_weights(folder, source.adapter) as weights:
            read = CausalReader(weights, config, source.device, source.dtype)
            loaded = every[: len(heads.up_to(depth))]
            super().__init__(read, depth=depth, heads=loaded, default=0)
            read.check_all_read(depth, heads=every)

    def head_index(self, layer: int, place: int) -> int:
        """Return the head of the k-th layer that is read: the k-th."""
        del layer
        return place

    def after_head(self, raw: Tensor) -> Tensor:
        """Return the logits after soft capping."""
        return raw if self._cap is None else torch.tanh(raw / self._cap) * self._cap

    def before_layer(
        self, index: int, states: Tensor, layout: CausalLayout, pairs: Sequence[TokenPair]
    ) -> tuple[Tensor, CausalLayout]:
        """Return the compressed tokens before the layers that compress."""
        readout = readout_of(pairs[0])
        ratio = readout.compress_ratio if readout else self._ratio
        layers = readout.compress_layers if readout else self._compress_layers
        if ratio == 1 or index not in layers:
            return states, layout
        times = sum(each < index for each in layers)
        places = Compression.of(pairs, ratio=ratio, times=times)
        groups = [places.sources.reshape(-1), places.sizes]
        needed = [*groups, *CausalLayout.indices(places.lengths)]
        sources, sizes, *on_device = self.transfers.upload(needed)
        states = averaged(states, sources.view(ratio, -1), sizes)
        return states, CausalLayout(places.lengths, self.device, on_device=on_device)


@dataclass(frozen=True, slots=True)
class Compression:
    """The groups of rows that are averaged into one row each.

    Attributes:
        lengths: Number of tokens of each pair afterwards.
        sources: Row of the k-th member of each group, or of the first if the group is smaller;
            int64, shape (ratio, new rows).
        sizes: Number of members of each group; int64, shape (new rows,).
    """

    lengths: list[int]
    sources: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]

    @classmethod
    def of(cls, pairs: Sequence[TokenPair], *, ratio: int, times: int = 0) -> Self:
        """Return the compression of a pack.

        Args:
            pairs: The pairs of the pack, uncompressed.
            ratio: Number of document tokens in a group; the last group may be smaller.
            times: How many times the pack has been compressed already.
        """
        sources, group_sizes, lengths, start = [], [], [], 0
        for pair in pairs:
            before, after = pair.document_start, pair.tokens_after
            document = len(pair) - before - after
            for _ in range(times):
                document = -(-document // ratio)
            sizes = np.ones(before + -(-document // ratio) + after, dtype=np.int64)
            sizes[before : len(sizes) - after] = ratio
            if document % ratio:
                sizes[len(sizes) - after - 1] = document % ratio
            begins = start + np.cumsum(sizes) - sizes
            members = np.arange(ratio)[:, None]
            sources.append(np.where(members < sizes, begins + members, begins))
            group_sizes.append(sizes)
            lengths.append(len(sizes))
            start += before + document + after
        return cls(lengths, np.concatenate(sources, axis=1), np.concatenate(group_sizes))


def averaged(states: Tensor, sources: Tensor, sizes: Tensor) -> Tensor:
    """Return the average of each group of rows, shape (new rows, hidden).

    Args:
        states: Shape (rows, hidden).
        sources: `Compression.sources`.
        sizes: `Compression.sizes`.
    """
    members = torch.arange(len(sources), device=sizes.device)
    weights = (members[:, None] < sizes).float() / sizes.float()
    weights = weights.to(states.dtype)[:, :, None]
    means = states[sources[0]] * weights[0]
    for rows, share in zip(sources[1:], weights[1:], strict=True):
        means += states[rows] * share
    return means


def lightweight_heads(config: dict[str, Any], *, folder: Path) -> HeadLayers:
    """Return the layers of a checkpoint that have a head.

    Raises:
        CheckpointError: Its config is damaged.
    """
    entries = Entries(config, folder / "config.json")
    layers = parse_causal(config, folder=folder).layers
    first, step = (entries.whole(name, 28) for name in ("start_layer", "layer_sep"))
    return check_head_layers(HeadLayers(first, layers, step), entries)


def check_compress_layers(given: Sequence[int] | None, layers: int) -> tuple[int, ...]:
    """Return the layers before which tokens are compressed.

    Raises:
        SettingsError: The model does not have one of them.
    """
    if given is None:
        return _DEFAULT_COMPRESS_LAYERS
    for each in given:
        if each >= layers:
            raise SettingsError(
                f"compress_layers must be from 1 to {layers - 1}, the last layer of this "
                f"checkpoint counted from 0, got {each}."
            )
    return tuple(given)


def _cap(config: dict[str, Any], folder: Path) -> float | None:
    """Return the maximum of a logit, or `None` if there is none."""
    cap = config.get("final_logit_softcapping", 30.0)
    if cap is None:
        return None
    if isinstance(cap, bool) or not isinstance(cap, int | float) or cap <= 0:
        raise CheckpointError(
            f"{folder / 'config.json'}: final_logit_softcapping must be a number above 0 or null, "
            f"got {cap!r}."
        )
    return float(cap)
