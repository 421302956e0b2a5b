"""Faults of a device: out of memory, lost until the process ends, or unusable after a fork."""

import errno
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bge_rerank_adapters.errors import DeviceError

# Messages of torch's allocators, CUDA's and ROCm's libraries, Level Zero and C.
_OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "_status_alloc_failed",
    "out_of_device_memory",
    "out_of_host_memory",
)
# Messages of errors after which "the process must be terminated and relaunched" (reference of the
# CUDA runtime API); ROCm's have the same text. "Unknown error" is the error of a GPU that has
# fallen off the bus. The last two are Level Zero's and its runtime's in torch.
_LOST = (
    "device-side assert",
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "invalid program counter",
    "operation not supported on global/shared address space",
    "unspecified launch failure",
    "launch timed out",
    "hardware stack error",
    "uncorrectable ecc error",
    "uncorrectable nvlink error",
    "peer gpu memory over nvlink or a hardware error",
    "cuda error: unknown error",
    "hip error: unknown error",
    "device lost",
    "device_lost",
)

_log = logging.getLogger(__name__)
# Why each lost device is lost, by its name.
_lost: dict[str, str] = {}


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that a device, or the machine, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _says(error, _OUT_OF_MEMORY)


def is_lost(error: BaseException, device: torch.device) -> bool:
    """Return whether this process cannot use a device any more after an error.

    If the error does not say so, the device is synchronised to find out: some libraries only report
    that an operation failed.
    """
    if device.type == "cpu" or not isinstance(error, RuntimeError):
        return False
    return _says(error, _LOST) or (not is_out_of_memory(error) and _is_lost_when_asked(device))


def remember_lost(device: torch.device, error: BaseException) -> str:
    """Record that a device is lost until the process ends; return the message for users."""
    reason = str(error).partition("\n")[0] or type(error).__name__
    _lost.setdefault(str(device), reason)
    return _lost_message(device)


def check_usable(device: torch.device) -> None:
    """Refuse a device that this process has lost.

    Raises:
        DeviceError: It is lost; the message says to start the process again.
    """
    if str(device) in _lost:
        raise DeviceError(_lost_message(device))


def check_not_forked(kind: str) -> None:
    """Refuse devices of a kind that this process cannot use because it was forked.

    Raises:
        DeviceError: The parent process has used devices of this kind.
    """
    in_bad_fork = getattr(getattr(torch, kind, None), "_is_in_bad_fork", None)
    if in_bad_fork is not None and in_bad_fork():
        raise DeviceError(
            f"This process was forked from one that had used {kind} already, so it cannot use "
            f'{kind} itself. Start processes with "spawn": '
            'multiprocessing.get_context("spawn"), or use device="cpu" here.'
        )


@contextmanager
def as_device_errors(device: torch.device) -> Iterator[None]:
    """Turn errors of a device while a model is loaded on it into `DeviceError`."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            # Its frames hold the tensors loaded so far.
            traceback.clear_frames(error.__traceback__)
            release_memory(device)
            raise DeviceError(
                f"device {str(device)!r} has too little memory to load the model "
                f"({type(error).__name__}: {_first_line(error)}); free some of it, use a smaller "
                "model or dtype, or another device."
            ) from error
        if is_lost(error, device):
            raise DeviceError(remember_lost(device, error)) from error
        raise


def release_memory(device: torch.device) -> None:
    """Free the device's cached memory; errors are logged, not raised."""
    empty_cache = _function(device, "empty_cache")
    if empty_cache is None:
        return
    try:
        empty_cache()
    except Exception as error:  # noqa: BLE001 - the device fails; nothing depends on this
        _log.warning("%s frees no memory: %s", device, _first_line(error))


def _is_lost_when_asked(device: torch.device) -> bool:
    synchronize = _function(device, "synchronize")
    if synchronize is None:
        return False
    try:
        synchronize(*([] if device.index is None else [device]))
    except Exception as error:  # noqa: BLE001 - torch without this kind of device raises any
        return isinstance(error, RuntimeError) and _says(error, _LOST)
    return False


def _function(device: torch.device, name: str) -> Any:
    """Return a function of torch's module for this kind of device; `None` if it has none."""
    return None if device.type == "cpu" else getattr(getattr(torch, device.type, None), name, None)


def _says(error: BaseException, messages: tuple[str, ...]) -> bool:
    text = str(error).lower()
    return any(message in text for message in messages)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _lost_message(device: torch.device) -> str:
    return (
        f"device {str(device)!r} failed and cannot be used again by this process "
        f"({_lost[str(device)]}); start the process again."
    )
