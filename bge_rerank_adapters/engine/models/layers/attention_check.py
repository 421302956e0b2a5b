"""Attention on devices that are no CPU, compared at load with a CPU's in float32.

Releases of torch have given wrong values in silence, on MPS for inputs that are not contiguous.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bge_rerank_adapters.engine.models.layers.attention import PROBE_LENGTHS, probe_states
from bge_rerank_adapters.errors import DeviceError

# From query, key and value, side by side in one matrix, to the attended values.
Way = Callable[[Tensor, Tensor, Tensor], Tensor]

# Wrong kernels are off by about one. Half types and float32 by TF32 come near these at most.
_WITHIN = 0.05
_WITHIN_FLOAT32 = 0.01
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trial:
    """What attention is tried with: a small pack.

    Attributes:
        queries: Number of query heads.
        keys: Number of key and value heads.
        width: Of a head.
        scale: Factor of the products of query and key.
        causal: Whether a token sees those before it alone.
        window: How many it sees then, itself included; `None` is all before it.
    """

    queries: int
    keys: int
    width: int
    scale: float
    causal: bool = False
    window: int | None = None

    def states(self, dtype: torch.dtype) -> Tensor:
        """Return query, key and value side by side, on the CPU."""
        width = (self.queries + 2 * self.keys) * self.width
        return probe_states(width, torch.device("cpu"), dtype)

    def cut(self, states: Tensor) -> Sequence[Tensor]:
        """Return query, key and value, none of them contiguous."""
        key = self.queries * self.width
        value = key + self.keys * self.width
        return states[:, :key], states[:, key:value], states[:, value:]

    def expected(self, states: Tensor) -> Tensor:
        """Return the attended values by plain products in float32, where no kernel is used."""
        query, key, value = self.cut(states.float())
        scores = self._heads(query) @ self._heads(key).transpose(1, 2) * self.scale
        scores = scores.masked_fill(~self._seen(), float("-inf"))
        return (scores.softmax(dim=-1) @ self._heads(value)).transpose(0, 1).flatten(1)

    def _heads(self, rows: Tensor) -> Tensor:
        split = rows.reshape(len(rows), -1, self.width).transpose(0, 1)
        return split.repeat_interleave(self.queries // len(split), dim=0)

    def _seen(self) -> Tensor:
        """Return which tokens each one sees, those of other pairs never."""
        counts = torch.tensor(PROBE_LENGTHS, dtype=torch.int64)
        pair = torch.arange(len(counts), dtype=torch.int64).repeat_interleave(counts)
        seen: Tensor = pair[:, None] == pair
        seen = seen.tril() if self.causal else seen
        return seen if self.window is None else seen.triu(1 - self.window)


def is_trusted(device: torch.device) -> bool:
    """Return whether attention on a device is what the others are compared with."""
    return device.type == "cpu"


def first_right(
    ways: Sequence[Way], trial: Trial, *, asked: Tensor, device: torch.device, dtype: torch.dtype
) -> int:
    """Return which of some ways to attend is the first that is right on a device.

    Args:
        ways: The first is the one wanted; later ones copy their inputs.
        trial: What they are tried with.
        asked: Rows that are asked for alone as well, one of each pair.
        device: Where they run.
        dtype: Of the activations.

    Raises:
        DeviceError: None is.
    """
    if is_trusted(device):
        return 0
    states = trial.states(dtype)
    expected = trial.expected(states)
    within = _WITHIN_FLOAT32 if dtype == torch.float32 else _WITHIN
    errors = []
    for place, attend in enumerate(ways):
        errors.append(_error(attend, trial.cut(states.to(device)), asked, expected))
        if errors[-1] <= within:
            if place:
                told = "attention on %s is off by %.2g unless its inputs are copied, which they are"
                _log.warning(told, device, errors[0])
            return place
    raise DeviceError(
        f"attention on device {str(device)!r} in {dtype} is off by {min(errors):.2g} from a CPU's "
        f"with torch {torch.__version__}, so rankings would be wrong; use another release of "
        'torch, another dtype, or device="cpu".'
    )


def _error(attend: Way, inputs: Sequence[Tensor], asked: Tensor, expected: Tensor) -> float:
    """Return the largest error, for all rows and for those of `asked` alone; infinity for NaN."""
    query, key, value = inputs
    every = attend(query, key, value).float().cpu() - expected
    alone = attend(query[asked], key, value).float().cpu() - expected[asked.cpu()]
    error = max(float(every.abs().max()), float(alone.abs().max()))
    finite = bool(every.isfinite().all() and alone.isfinite().all())
    return error if finite else float("inf")
