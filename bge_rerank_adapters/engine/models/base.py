"""What the engine needs of a model, and what this package's own models offer beyond that."""

from collections.abc import Sequence
from typing import Protocol

import torch

from bge_rerank_adapters.engine.models.cpu.threads import ALONE, Helpers
from bge_rerank_adapters.engine.text.pairs import TokenPair

# Tokens of a pack where the user leaves it open: enough to keep the device busy, few enough that
# a call that comes meanwhile does not wait long. On a CPU packs of 1,024 to 4,096 tokens are about
# as fast as each other.
_PACK_TOKENS = 2048
_PACK_TOKENS_ACCELERATOR = 16_384


class Model(Protocol):
    """What the engine needs of a model.

    Attributes:
        device: Where it runs.
        dtype: Of weights and activations.
        streams: How many threads run pairs of a pack side by side; 1 runs the pack as a whole.
        pack_tokens: Token budget of a pack that suits it on this device.
    """

    device: torch.device
    dtype: torch.dtype
    streams: int
    pack_tokens: int

    def logits(self, pairs: Sequence[TokenPair]) -> list[float]:
        """Return the logit of each pair of a pack.

        Args:
            pairs: n >= 1 pairs.

        Returns:
            n floats, which are NaN or infinite where the model gives that.
        """
        ...


class NativeModel(Model, Protocol):
    """A model of this package, which several threads may use at once."""

    def logits(self, pairs: Sequence[TokenPair], *, helpers: Helpers = ALONE) -> list[float]:
        """Return the logit of each pair of a pack, as `Model.logits` does.

        Args:
            pairs: n >= 1 pairs.
            helpers: Threads that take a share of each layer, where its layers do not use torch's.
        """
        ...


def default_pack_tokens(device: torch.device) -> int:
    """Return the token budget of a pack that suits a device."""
    return _PACK_TOKENS if device.type == "cpu" else _PACK_TOKENS_ACCELERATOR
