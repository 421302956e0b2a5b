"""Copies a host's objects, with an error that names what cannot be copied, and why."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from bge_rerank_adapters.errors import InputTypeError

T = TypeVar("T")


def copied(make_copy: Callable[[], T], *, name: str, metadata: Mapping[str, Any]) -> T:
    """Return what `make_copy` returns.

    Args:
        make_copy: Makes a deep copy of one object.
        name: The object's name in errors, such as `"documents[3]"`.
        metadata: The object's metadata.

    Raises:
        InputTypeError: It holds something that cannot be copied, such as a lock or a generator;
            the message names the metadata with it.
    """
    try:
        return make_copy()
    except Exception as error:
        causes = [repr(key) for key, value in metadata.items() if not _can_be_copied(value)]
        cause = f"its metadata {', '.join(causes)}" if causes else "something that it holds"
        raise InputTypeError(
            f"{name} cannot be copied, because {cause} cannot ({type(error).__name__}: {error}); "
            "results are copies, so remove it or put a plain value there."
        ) from error


def _can_be_copied(value: object) -> bool:
    try:
        copy.deepcopy(value)
    except Exception:  # noqa: BLE001 - the value's class may raise any
        return False
    return True
