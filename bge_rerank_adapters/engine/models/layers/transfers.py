"""How token ids reach a device and logits come back: one copy each way for each pack."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Integers = npt.NDArray[np.int64]
# Gives the numbers of a tensor as lists, once the device has them.
Coming = Callable[[], Any]

# What the check at load has the device do before the numbers come: a millisecond or more of
# products, so that numbers that are read too early are not there yet.
_CHECK_SIZE, _CHECK_PRODUCTS = 1024, 64

_log = logging.getLogger(__name__)


class Transfers:
    """Copies that wait for all that the device has been given before; right on any device.

    Attributes:
        overlap: Whether copies leave the device to its work, and the thread to its own.
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

    def download(self, values: Tensor) -> Coming:
        """Return what gives the values as lists of floats."""
        return values.tolist

    def _host_memory(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype)


class HostTransfers(Transfers):
    """For a CPU, where there is nothing to copy."""

    def upload(self, arrays: Sequence[Integers]) -> list[Tensor]:
        """Return int64 tensors that share the arrays' memory."""
        return [torch.from_numpy(array) for array in arrays]


class PinnedTransfers(Transfers):
    """Copies through pinned memory, in the order of the device's own queue; for CUDA.

    torch keeps a pinned block from being used again before the copies of it are done.
    """

    overlap = True

    def download(self, values: Tensor) -> Coming:
        """Copy the values once the device has them; what is returned waits for that alone."""
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
    """Return the fastest way to copy to and from a device that is right there.

    Only CUDA's pinned copies are tried: on MPS, copies that do not wait have read memory that was
    given back meanwhile (pytorch/pytorch#139550, #189690).
    """
    if device.type != "cuda":
        return waiting_transfers(device)
    pinned = PinnedTransfers(device)
    try:
        right = _is_right(pinned)
        reason = "numbers do not come back as they were"
    except RuntimeError as error:
        right, reason = False, str(error).partition("\n")[0]
    if right:
        return pinned
    _log.warning("%s is used without pinned memory: %s", device, reason)
    return waiting_transfers(device)


def waiting_transfers(device: torch.device) -> Transfers:
    """Return a way to copy to and from any device, which waits for it."""
    return HostTransfers(device) if device.type == "cpu" else Transfers(device)


@torch.inference_mode()
def _is_right(transfers: Transfers) -> bool:
    """Return whether numbers that go to the device and back, behind other work, are the same."""
    sent = [np.arange(start, start + 1000, dtype=np.int64) for start in (0, 7)]
    first, second = transfers.upload(sent)
    # Each row sums to 1, so the products stay what they are.
    mixing = torch.full((_CHECK_SIZE, _CHECK_SIZE), 1 / _CHECK_SIZE, device=transfers.device)
    busy = mixing
    for _ in range(_CHECK_PRODUCTS):
        busy = busy @ mixing
    still = (busy[0, 0] * _CHECK_SIZE).round().long()
    coming = transfers.download(first * still + second)
    # A second pack goes out before the first has come back.
    again = transfers.download(transfers.upload(sent)[1] * still)
    return bool(coming() == (sent[0] + sent[1]).tolist() and again() == sent[1].tolist())
