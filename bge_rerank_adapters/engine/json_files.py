"""Reads the JSON files of a checkpoint's folder."""

import json
from pathlib import Path
from typing import Any

from bge_rerank_adapters.errors import CheckpointError


def read_json(path: Path, *, kind: type = dict) -> Any:
    """Return the value in a JSON file; an empty `kind()` if there is no file.

    Args:
        path: The file.
        kind: The expected type, `dict` or `list`.

    Raises:
        CheckpointError: It is not JSON, or holds another type.
    """
    if not path.is_file():
        return kind()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(found, kind):
        wanted = "a JSON object" if kind is dict else "a JSON list"
        raise CheckpointError(f"{path} must hold {wanted}, got a {type(found).__name__}.")
    return found
