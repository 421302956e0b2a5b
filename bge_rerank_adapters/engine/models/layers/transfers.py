"""Copies token ids to a device and logits back: one copy each way for each pack."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Integers = npt.NDArray[np.int64]
# Waits for the device, and returns the values of a tensor as lists.
Pending = Callable[[], Any]

# Work for the device in the check at load: a millisecond or more of matrix products, so that
# values that are read too early are not there yet.
_CHECK_SIZE, _CHECK_PRODUCTS = 1024, 64

_log = logging.getLogger(__name__)


class Transfers:
    """Copies that wait for all earlier work of the device; correct on any device.

    Attributes:
        overlap: Whether copies run while the device and the thread go on working.
    """

    overlap = False

    def __init__(self, device: torch.device) -> None:
        """Copy to and from a device."""
        self.device = device

    def upload(self, arrays: Sequence[Integers]) -> list[Tensor]:
        """Return int64 tensors of the arrays, of shape (n,) each, on the device, by one copy."""
        joined = self._host_memory(sum(map(len, arrays)), torch.int64)
        np.concatenate(arrays, out=joined.numpy())
        uploaded = joined.to(self.device, non_blocking=self.overlap)
        return list(torch.split(uploaded, [len(array) for array in arrays]))

    def download(self, values: Tensor) -> Pending:
        """Return a function that waits for the values and returns them as lists of floats."""
        return values.tolist

    def _host_memory(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype)


class HostTransfers(Transfers):
    """For a CPU, where there is nothing to copy."""

    def upload(self, arrays: Sequence[Integers]) -> list[Tensor]:
        """Return int64 tensors that share the arrays' memory."""
        return [torch.from_numpy(array) for array in arrays]


class PinnedTransfers(Transfers):
    """Copies through pinned memory, in the order of the CUDA stream.

    torch does not reuse a pinned block before its copies have finished.
    """

    overlap = True

    def download(self, values: Tensor) -> Pending:
        """Queue a copy of the values; the function returned waits for that copy only."""
        host = self._host_memory(values.numel(), values.dtype).view(values.shape)
        host.copy_(values, non_blocking=True)
        done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self.device))

        def numbers() -> Any:
            done.synchronize()
            return host.tolist()

        return numbers

    def _host_memory(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, pin_memory=True)


def transfers_for(device: torch.device) -> Transfers:
    """Return the fastest correct way to copy to and from a device.

    Only CUDA's pinned copies are tried: on MPS, copies that do not wait have read memory that was
    already freed (pytorch/pytorch#139550, #189690).
    """
    if device.type != "cuda":
        return waiting_transfers(device)
    pinned = PinnedTransfers(device)
    try:
        correct = _is_correct(pinned)
        reason = "values change on the way"
    except RuntimeError as error:
        correct, reason = False, str(error).partition("\n")[0]
    if correct:
        return pinned
    _log.warning("%s is used without pinned memory: %s", device, reason)
    return waiting_transfers(device)


def waiting_transfers(device: torch.device) -> Transfers:
    """Return a way to copy to and from any device that waits for the device."""
    return HostTransfers(device) if device.type == "cpu" else Transfers(device)


@torch.inference_mode()
def _is_correct(transfers: Transfers) -> bool:
    """Return whether values survive the way to the device and back behind other work."""
    sent = [np.arange(start, start + 1000, dtype=np.int64) for start in (0, 7)]
    first, second = transfers.upload(sent)
    # Each row sums to 1, so the products keep their values.
    average = torch.full((_CHECK_SIZE, _CHECK_SIZE), 1 / _CHECK_SIZE, device=transfers.device)
    busy = average
    for _ in range(_CHECK_PRODUCTS):
        busy = busy @ average
    still = (busy[0, 0] * _CHECK_SIZE).round().long()
    pending = transfers.download(first * still + second)
    # A second pack is sent before the first has returned.
    again = transfers.download(transfers.upload(sent)[1] * still)
    return bool(pending() == (sent[0] + sent[1]).tolist() and again() == sent[1].tolist())
