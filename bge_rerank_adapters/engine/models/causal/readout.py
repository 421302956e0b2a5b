"""Options of a single call for models with several heads: the layers to read, and compression.

FlagEmbedding's layerwise and lightweight classes take them at every call. All layers of a call are
read in one pass.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Self

import torch

from bge_rerank_adapters.engine.models.base import PendingLogits
from bge_rerank_adapters.engine.models.causal.model import CausalModel
from bge_rerank_adapters.engine.models.causal.tensors import CausalReader, HeadRow
from bge_rerank_adapters.engine.models.cpu.threads import ALONE, Helpers
from bge_rerank_adapters.engine.text.pairs import TokenPair


@dataclass(frozen=True, slots=True)
class Readout:
    """The options of one call, which replace the engine's settings.

    Attributes:
        cutoff_layers: Numbers of layers after which a logit is read; ascending, at least one.
        compress_ratio: Number of document tokens that are averaged into one.
        compress_layers: Layers before which this happens, counted from 0.
    """

    cutoff_layers: tuple[int, ...]
    compress_ratio: int = 1
    compress_layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ReadPair(TokenPair):
    """A tokenised pair of a call with its own readout.

    Attributes:
        readout: The call's readout.
    """

    readout: Readout = Readout(())

    @classmethod
    def of(cls, pair: TokenPair, readout: Readout) -> Self:
        """Return a pair with a readout."""
        values = {each.name: getattr(pair, each.name) for each in fields(TokenPair)}
        return cls(**values, readout=readout)


class LayerLogits(float):
    """The logit of the last layer that was read, with those of all layers as an attribute.

    It is a float, since the queue handles one number for each pair.

    Attributes:
        layers: The logit of each layer, in order.
    """

    layers: tuple[float, ...]

    def __new__(cls, layers: Sequence[float]) -> Self:
        """Take the logits; the float is the first that is not finite, or else the last."""
        made = super().__new__(cls, next((x for x in layers if not math.isfinite(x)), layers[-1]))
        made.layers = tuple(layers)
        return made


def readout_of(pair: TokenPair) -> Readout | None:
    """Return the readout of a pair's call; `None` if the engine's settings apply."""
    return pair.readout if isinstance(pair, ReadPair) else None


class SeveralHeadsModel(CausalModel):
    """A decoder with a head after each of several layers; each call may choose its layers."""

    def __init__(
        self, read: CausalReader, *, depth: int, heads: Sequence[str], default: int
    ) -> None:
        """Load the first `depth` layers, and all heads.

        Args:
            read: Reads the checkpoint.
            depth: Number of layers to load.
            heads: Names of the heads' tensors, in the order of `head_index`.
            default: Index of the head that gives the logit if a call chooses no layers.

        Raises:
            CheckpointError: Tensors are missing, damaged or of the wrong shape.
        """
        super().__init__(read, depth=depth, head=HeadRow(heads[default]))
        self._heads = [read.row(name, 0, (1, read.config.hidden)) for name in heads]

    @abstractmethod
    def head_index(self, layer: int, place: int) -> int:
        """Return the index of the head that reads a layer.

        Args:
            layer: Number of layers run.
            place: Index of the layer among those that the call reads.
        """

    def launch(self, pairs: Sequence[TokenPair], *, helpers: Helpers = ALONE) -> PendingLogits:
        """Start a pack; its logits are `LayerLogits` if their call has a readout.

        Pairs of calls with different readouts may share a pack, and run one after another.
        """
        pending: list[tuple[list[int], PendingLogits]] = []
        for readout, places in _by_readout(pairs).items():
            group = [pairs[place] for place in places]
            if readout is None:
                pending.append((places, super().launch(group, helpers=helpers)))
            else:
                pending.append((places, self._read(readout, group)))
        return partial(_gathered, pending)

    @torch.inference_mode()
    def _read(self, readout: Readout, pairs: Sequence[TokenPair]) -> PendingLogits:
        states = self.states_after(readout.cutoff_layers, pairs)
        rows = []
        for place, (layer, state) in enumerate(zip(readout.cutoff_layers, states, strict=True)):
            head = self._heads[self.head_index(layer, place)]
            rows.append(self.after_head(state.float() @ head))
        layers = self.transfers.download(torch.stack(rows))
        return lambda: [LayerLogits(each) for each in zip(*layers(), strict=True)]


def _gathered(pending: Sequence[tuple[list[int], PendingLogits]]) -> list[float]:
    """Return the logits of all groups in the order of the pack."""
    found = dict[int, float]()
    for places, logits in pending:
        found |= zip(places, logits(), strict=True)
    return [found[place] for place in range(len(found))]


def _by_readout(pairs: Sequence[TokenPair]) -> dict[Readout | None, list[int]]:
    groups: dict[Readout | None, list[int]] = {}
    for place, pair in enumerate(pairs):
        groups.setdefault(readout_of(pair), []).append(place)
    return groups
