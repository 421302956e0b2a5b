"""What a single call may choose of models with several heads: the layers it reads, and compression.

FlagEmbedding's layerwise and lightweight classes take both at every call. All of a call's layers
come from one pass, which ends after the last of them.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Self

import torch

from bge_rerank_adapters.engine.models.base import Coming
from bge_rerank_adapters.engine.models.causal.config import CausalConfig
from bge_rerank_adapters.engine.models.causal.model import CausalModel
from bge_rerank_adapters.engine.models.causal.tensors import CausalReader, HeadRow
from bge_rerank_adapters.engine.models.cpu.threads import ALONE, Helpers
from bge_rerank_adapters.engine.models.weights import Weights
from bge_rerank_adapters.engine.text.pairs import TokenPair


@dataclass(frozen=True, slots=True)
class Readout:
    """What one call reads, instead of what the engine's settings say.

    Attributes:
        cutoff_layers: After how many layers a logit is read; ascending, at least one.
        compress_ratio: How many of a document's tokens become one.
        compress_layers: Before which layers, counted from 0, they do.
    """

    cutoff_layers: tuple[int, ...]
    compress_ratio: int = 1
    compress_layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ReadPair(TokenPair):
    """A tokenised pair of a call that has a readout of its own.

    Attributes:
        readout: The call's.
    """

    readout: Readout = Readout(())

    @classmethod
    def of(cls, pair: TokenPair, readout: Readout) -> Self:
        """Return a pair with a readout."""
        values = {each.name: getattr(pair, each.name) for each in fields(TokenPair)}
        return cls(**values, readout=readout)


class LayerLogits(float):
    """The logit of the last layer that was read, which carries those of all of them.

    Queues move one number for each pair, and so need not know of layers.

    Attributes:
        layers: The logit of each layer, in order.
    """

    layers: tuple[float, ...]

    def __new__(cls, layers: Sequence[float]) -> Self:
        """Take the logits; where one of them is not finite, the number is that one."""
        made = super().__new__(cls, next((x for x in layers if not math.isfinite(x)), layers[-1]))
        made.layers = tuple(layers)
        return made


def readout_of(pair: TokenPair) -> Readout | None:
    """Return the readout of a pair's call; `None` for that of the engine's settings."""
    return pair.readout if isinstance(pair, ReadPair) else None


class SeveralHeadsModel(CausalModel):
    """A decoder with heads after several layers, of which each call may read its own."""

    def __init__(
        self,
        config: CausalConfig,
        weights: Weights,
        *,
        device: torch.device,
        dtype: torch.dtype,
        depth: int,
        heads: Sequence[str],
        usual: int,
    ) -> None:
        """Load the layers that are needed, and all heads.

        Args:
            config: The checkpoint's.
            weights: Its open files.
            device: Where to run.
            dtype: A floating-point dtype.
            depth: How many layers to load.
            heads: Names of the heads' tensors, as `head_place` counts them.
            usual: Which of them gives the logit where a call asks for no layers.

        Raises:
            CheckpointError: Tensors are missing, damaged or of the wrong shape.
        """
        head = HeadRow(heads[usual])
        super().__init__(config, weights, device=device, dtype=dtype, depth=depth, head=head)
        read = CausalReader(weights, config, device, dtype)
        self._heads = [read.row(name, 0, (1, config.hidden)) for name in heads]

    @abstractmethod
    def head_place(self, layer: int, place: int) -> int:
        """Return which head reads a layer.

        Args:
            layer: Number of layers run.
            place: Of this layer among those that the call reads.
        """

    def launch(self, pairs: Sequence[TokenPair], *, helpers: Helpers = ALONE) -> Coming:
        """Begin with a pack; its logits are `LayerLogits` where their call has a readout.

        Pairs of calls with different readouts may share a pack, and are run apart.
        """
        coming: list[tuple[list[int], Coming]] = []
        for readout, places in _by_readout(pairs).items():
            group = [pairs[place] for place in places]
            if readout is None:
                coming.append((places, super().launch(group, helpers=helpers)))
            else:
                coming.append((places, self._read(readout, group)))
        return partial(_gathered, coming)

    @torch.inference_mode()
    def _read(self, readout: Readout, pairs: Sequence[TokenPair]) -> Coming:
        states = self.states_after(readout.cutoff_layers, pairs)
        rows = []
        for place, (layer, state) in enumerate(zip(readout.cutoff_layers, states, strict=True)):
            head = self._heads[self.head_place(layer, place)]
            rows.append(self.after_head(state.float() @ head))
        layers = self.transfers.download(torch.stack(rows))
        return lambda: [LayerLogits(each) for each in zip(*layers(), strict=True)]


def _gathered(coming: Sequence[tuple[list[int], Coming]]) -> list[float]:
    """Return the logits of groups of pairs by the pairs' places, which are 0 to n - 1 in all."""
    found = dict[int, float]()
    for places, logits in coming:
        found |= zip(places, logits(), strict=True)
    return [found[place] for place in range(len(found))]


def _by_readout(pairs: Sequence[TokenPair]) -> dict[Readout | None, list[int]]:
    groups: dict[Readout | None, list[int]] = {}
    for place, pair in enumerate(pairs):
        groups.setdefault(readout_of(pair), []).append(place)
    return groups
