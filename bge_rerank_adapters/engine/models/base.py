"""What the engine needs of a model, and what this package's own models offer beyond that."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from bge_rerank_adapters.engine.models.cpu.threads import ALONE, Helpers
from bge_rerank_adapters.engine.text.pairs import TokenPair

# Tokens of a pack where the user leaves it open: enough to keep the device busy, few enough that
# a call that comes meanwhile does not wait long. On a CPU packs of 1,024 to 4,096 tokens are about
# as fast as each other.
_PACK_TOKENS = 2048
# On a GPU by the number of its multiprocessors, which is the same at every start: 16,384 tokens of
# bge-reranker-v2-m3 are 10 TFLOP, 25 ms at 400 TFLOP/s and seconds on a small card.
_TOKENS_PER_MULTIPROCESSOR = 128
_PACK_TOKENS_STEP = 1024
_PACK_TOKENS_MOST = 16_384
# On other accelerators, which tell no number that compares.
_PACK_TOKENS_OTHERS = 4096


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


# Waits for the logits of a pack that was launched, and returns them.
Coming = Callable[[], list[float]]
Launch = Callable[[Sequence[TokenPair]], Coming]


class NativeModel(Model, Protocol):
    """A model of this package, which several threads may use at once.

    Attributes:
        runs_ahead: Whether `launch` leaves the work to the device and returns.
    """

    runs_ahead: bool

    def logits(self, pairs: Sequence[TokenPair], *, helpers: Helpers = ALONE) -> list[float]:
        """Return the logit of each pair of a pack, as `Model.logits` does.

        Args:
            pairs: n >= 1 pairs.
            helpers: Threads that take a share of each layer, where its layers do not use torch's.
        """
        ...

    def launch(self, pairs: Sequence[TokenPair], *, helpers: Helpers = ALONE) -> Coming:
        """Begin with a pack, and return what gives its logits; arguments as of `logits`."""
        ...


def launch_of(model: Model) -> Launch | None:
    """Return what launches a pack on the model's device and does not wait for it.

    `None` where a pack is done as soon as it is launched, as on a CPU.
    """
    launch: Launch | None = getattr(model, "launch", None)
    return launch if getattr(model, "runs_ahead", False) else None


def default_pack_tokens(device: torch.device) -> int:
    """Return the token budget of a pack that suits a device."""
    if device.type == "cpu":
        return _PACK_TOKENS
    if device.type != "cuda":
        return _PACK_TOKENS_OTHERS
    card = torch.cuda.get_device_properties(device)
    tokens = card.multi_processor_count * _TOKENS_PER_MULTIPROCESSOR
    whole_steps = tokens // _PACK_TOKENS_STEP * _PACK_TOKENS_STEP
    return min(_PACK_TOKENS_MOST, max(_PACK_TOKENS, whole_steps))
