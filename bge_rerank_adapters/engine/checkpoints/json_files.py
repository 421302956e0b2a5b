"""Reads the JSON files of a checkpoint's folder."""

import json
from pathlib import Path
from typing import Any

from bge_rerank_adapters.errors import CheckpointError


def read_json(path: Path, *, kind: type = dict) -> Any:
    """Return what a JSON file holds; an empty one of the kind where there is no file.

    Args:
        path: Of the file.
        kind: `dict` or `list`.

    Raises:
        CheckpointError: It is not JSON, or holds something else.
    """
    if not path.is_file():
        return kind()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(found, kind):
        wanted = "an object" if kind is dict else "a list"
        raise CheckpointError(f"{path} must hold {wanted}, got a {type(found).__name__}.")
    return found
