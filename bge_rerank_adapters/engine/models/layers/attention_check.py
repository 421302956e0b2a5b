"""Checks attention when a model is loaded, on a small pack of random values.

Releases of torch differ in what their fast kernels support, and some give wrong values without an
error, on MPS for inputs that are not contiguous. So a fast kernel is compared with the plain one,
and attention on other devices with a CPU's in float32.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bge_rerank_adapters.errors import DeviceError

# Maps query, key and value, which are columns of one matrix, to the output.
AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]

# Wrong kernels are off by about one; half types, and float32 by TF32, by less than these.
_TOLERANCE = 0.05
_TOLERANCE_FLOAT32 = 0.01
# Numbers of tokens of the pairs on which attention is tried.
PROBE_LENGTHS = (40, 3)

_log = logging.getLogger(__name__)


def probe_states(width: int, device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> Tensor:
    """Return the random states of a pack of `PROBE_LENGTHS` for a seed; shape (43, width)."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    states = torch.randn(sum(PROBE_LENGTHS), width, generator=generator, dtype=torch.float32)
    return states.to(device, dtype)


@dataclass(frozen=True, slots=True)
class Trial:
    """A small pack on which attention is tried.

    Attributes:
        queries: Number of query heads.
        keys: Number of key and value heads.
        width: Width of a head.
        scale: Factor of the attention scores.
        causal: Whether a token attends only to itself and earlier ones.
        window: Number of tokens it then attends to, itself included; `None` is no limit.
    """

    queries: int
    keys: int
    width: int
    scale: float
    causal: bool = False
    window: int | None = None

    def states(self, dtype: torch.dtype) -> Tensor:
        """Return query, key and value as columns of one matrix, on the CPU."""
        width = (self.queries + 2 * self.keys) * self.width
        return probe_states(width, torch.device("cpu"), dtype)

    def cut(self, states: Tensor) -> Sequence[Tensor]:
        """Return query, key and value, none of them contiguous."""
        key = self.queries * self.width
        value = key + self.keys * self.width
        return states[:, :key], states[:, key:value], states[:, value:]

    def expected(self, states: Tensor) -> Tensor:
        """Return the correct output, by plain matrix products in float32."""
        query, key, value = self.cut(states.float())
        scores = self._heads(query) @ self._heads(key).transpose(1, 2) * self.scale
        scores = scores.masked_fill(~self._mask(), float("-inf"))
        return (scores.softmax(dim=-1) @ self._heads(value)).transpose(0, 1).flatten(1)

    def _heads(self, rows: Tensor) -> Tensor:
        split = rows.reshape(len(rows), -1, self.width).transpose(0, 1)
        return split.repeat_interleave(self.queries // len(split), dim=0)

    def _mask(self) -> Tensor:
        """Return which tokens each token attends to; bool, shape (tokens, tokens)."""
        counts = torch.tensor(PROBE_LENGTHS, dtype=torch.int64)
        pair = torch.arange(len(counts), dtype=torch.int64).repeat_interleave(counts)
        mask: Tensor = pair[:, None] == pair
        mask = mask.tril() if self.causal else mask
        return mask if self.window is None else mask.triu(1 - self.window)


def is_trusted(device: torch.device) -> bool:
    """Return whether attention on a device needs no check."""
    return device.type == "cpu"


def first_correct(
    candidates: Sequence[AttentionFunction],
    trial: Trial,
    *,
    single_rows: Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> int:
    """Return the index of the first attention that is correct on a device.

    Args:
        candidates: The preferred one first; later ones copy their inputs.
        trial: The pack to try them on.
        single_rows: One row of each pair, for the case of one query for each pair.
        device: Device of the model.
        dtype: Dtype of the activations.

    Raises:
        DeviceError: None is correct.
    """
    if is_trusted(device):
        return 0
    states = trial.states(dtype)
    expected = trial.expected(states)
    tolerance = _TOLERANCE_FLOAT32 if dtype == torch.float32 else _TOLERANCE
    errors = []
    for index, attend in enumerate(candidates):
        errors.append(_error(attend, trial.cut(states.to(device)), single_rows, expected))
        if errors[-1] <= tolerance:
            if index:
                _log.warning(
                    "attention on %s is off by %.2g unless its inputs are copied, as they are now",
                    device,
                    errors[0],
                )
            return index
    raise DeviceError(
        f"attention on device {str(device)!r} in {dtype} is off by {min(errors):.2g} from a CPU's "
        f"with torch {torch.__version__}, so rankings would be wrong; use another release of "
        'torch, another dtype, or device="cpu".'
    )


def _error(
    attend: AttentionFunction, inputs: Sequence[Tensor], single_rows: Tensor, expected: Tensor
) -> float:
    """Return the largest error, for all rows and for `single_rows` only; infinity for NaN."""
    query, key, value = inputs
    errors = torch.cat(
        (
            attend(query, key, value).float().cpu() - expected,
            attend(query[single_rows], key, value).float().cpu() - expected[single_rows.cpu()],
        )
    )
    return float(errors.abs().max()) if bool(errors.isfinite().all()) else float("inf")


def agree(
    fast: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], queries: Sequence[Tensor]
) -> bool:
    """Return whether a fast attention runs here and agrees with the plain one.

    Args:
        fast: Maps a query to the output.
        plain: The same by the plain attention.
        queries: The queries to try.
    """
    try:
        return all(
            torch.allclose(fast(query).float(), plain(query).float(), atol=0.05, rtol=0.05)
            for query in queries
        )
    except (ImportError, AttributeError, TypeError, RuntimeError, ValueError):
        return False
