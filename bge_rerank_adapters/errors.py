"""The errors of this package.

```text
RerankError
├── SettingsError (also ValueError)       a setting or an argument has a value that is not allowed
├── InputTypeError (also TypeError)       a query, document or pair is not text
├── CheckpointError                       a checkpoint cannot be used as it is
│   ├── CheckpointNotFoundError (also FileNotFoundError)
│   │                                     neither a folder, nor in the cache, nor on the hub
│   └── UnsupportedCheckpointError        readable, but not a reranker that can be run here
├── DeviceError                           the device is not there, full, or lost
├── ScoringError                          the model failed while it was scoring
│   ├── NonFiniteLogitError               the model gave NaN or infinity for a pair
│   └── RemoteError                       a server was not reached, refused, or answered wrongly
├── WorkerDiedError                       the scoring thread ended with pairs still waiting
├── Overloaded                            too many pairs wait, here or on a server
├── RerankTimeoutError (also TimeoutError) a call's timeout_s ran out
└── ClosedError                           the engine has been closed
```

A missing optional package raises the built-in `ImportError`, with the pip command to install it.
"""

from typing import Self


class RerankError(Exception):
    """Base of all errors of this package."""


class SettingsError(RerankError, ValueError):
    """A setting or an argument has a value that is not allowed."""


class InputTypeError(RerankError, TypeError):
    """A query, a document or a pair is not text."""


class CheckpointError(RerankError):
    """A checkpoint cannot be used as it is: files missing, damaged or contradictory."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A checkpoint is neither a folder, nor in the local cache, nor can it be downloaded.

    Attributes:
        cause: What the hub's library raised; `None` if it was not called, and after pickling. It
            is not chained, so that a traceback stays short.
    """

    def __init__(self, message: str, cause: Exception | None = None) -> None:
        super().__init__(message)
        self.cause = cause

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        """Pickle the message alone: a cause may hold connections."""
        return type(self), (str(self),)


class UnsupportedCheckpointError(CheckpointError):
    """A checkpoint is readable, but it is not a reranker that this package can run."""


class DeviceError(RerankError):
    """The device is not present, cannot run the dtype, is full, or cannot be used any more."""


class ScoringError(RerankError):
    """The model failed while it was scoring; the cause is chained."""


class NonFiniteLogitError(ScoringError):
    """The model gave NaN or infinity for a pair, so the pair has no score."""


class RemoteError(ScoringError):
    """A server could not be reached, refused a request, or gave an answer that cannot be right.

    Attributes:
        status_code: The HTTP status, if it was the reason; otherwise `None`.
        cause: What the HTTP library raised, if that was the reason; `None` otherwise, and after
            pickling. The message names it. It is not chained, since it has dozens of lines.
    """

    def __init__(
        self, message: str, *, status_code: int | None = None, cause: Exception | None = None
    ) -> None:
        super().__init__(message)
        self.status_code, self.cause = status_code, cause

    def __reduce__(self) -> tuple[type[Self], tuple[object, ...], dict[str, object]]:
        """Pickle all but the cause, which may hold connections."""
        return type(self), self.args, {**self.__dict__, "cause": None}


class WorkerDiedError(RerankError):
    """The scoring thread ended while pairs were waiting; the cause is chained."""


class Overloaded(RerankError):  # noqa: N818 - the name is part of the public contract
    """More pairs wait than `max_queued_pairs` allows, or than a server takes (429).

    Nothing of the call was queued here.
    """


class RerankTimeoutError(RerankError, TimeoutError):
    """The call's `timeout_s` ran out; its unscored pairs were dropped from the queue."""


class ClosedError(RerankError):
    """The engine has been closed and can score no more."""
