"""The interface between the engine and models."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from bge_rerank_adapters.engine.models.cpu.threads import ALONE, Helpers
from bge_rerank_adapters.engine.text.pairs import TokenPair

# Default tokens of a pack: enough to keep the device busy, few enough that a new call does not wait
# long. On a CPU, packs of 1,024 to 4,096 tokens are about equally fast.
_PACK_TOKENS = 2048
# On a GPU it follows from the number of multiprocessors, so it is the same at every start: 16,384
# tokens of bge-reranker-v2-m3 are 10 TFLOP, 25 ms at 400 TFLOP/s and seconds on a small GPU.
_TOKENS_PER_MULTIPROCESSOR = 128
_PACK_TOKENS_STEP = 1024
_PACK_TOKENS_MAX = 16_384
# On other accelerators, which report nothing comparable.
_PACK_TOKENS_OTHERS = 4096

# Waits for the logits of a pack that was launched, and returns them.
PendingLogits = Callable[[], list[float]]


class Model(Protocol):
    """What the engine needs of a model.

    Attributes:
        device: Device it runs on.
        dtype: Dtype of weights and activations.
        streams: Number of threads that run parts of a pack at the same time; 1 runs it as a whole.
        pack_tokens: Default token budget of a pack.
        runs_ahead: Whether `launch` returns before the device has finished.
    """

    device: torch.device
    dtype: torch.dtype
    streams: int
    pack_tokens: int
    runs_ahead: bool

    def logits(self, pairs: Sequence[TokenPair]) -> list[float]:
        """Return the logit of each pair of a pack.

        Args:
            pairs: n >= 1 pairs.

        Returns:
            n floats, which are NaN or infinite where the model gives that.
        """
        ...

    def launch(self, pairs: Sequence[TokenPair]) -> PendingLogits:
        """Start a pack and return a function that waits for its logits; see `logits`."""
        ...


class NativeModel(Model, Protocol):
    """A model of this package; thread-safe."""

    def logits(self, pairs: Sequence[TokenPair], *, helpers: Helpers = ALONE) -> list[float]:
        """Return the logit of each pair of a pack, as `Model.logits` does.

        Args:
            pairs: n >= 1 pairs.
            helpers: Threads that share the work of each layer, if its layers do not use torch's.
        """
        ...

    def launch(self, pairs: Sequence[TokenPair], *, helpers: Helpers = ALONE) -> PendingLogits:
        """Start a pack, as `Model.launch` does; arguments as of `logits`."""
        ...


def default_pack_tokens(device: torch.device) -> int:
    """Return the default token budget of a pack on a device."""
    if device.type == "cpu":
        return _PACK_TOKENS
    if device.type != "cuda":
        return _PACK_TOKENS_OTHERS
    gpu = torch.cuda.get_device_properties(device)
    tokens = gpu.multi_processor_count * _TOKENS_PER_MULTIPROCESSOR
    whole_steps = tokens // _PACK_TOKENS_STEP * _PACK_TOKENS_STEP
    return min(_PACK_TOKENS_MAX, max(_PACK_TOKENS, whole_steps))
