"""Keeps the rows of an experiment in a file, so that an interrupted run can continue."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bge_rerank_adapters.errors import SettingsError


class State:
    """The rows of an experiment, one for each query, and the file that keeps them.

    The file has JSON lines: a header that identifies the experiment, then the rows.
    """

    def __init__(self, path: Path | None = None, header: Mapping[str, Any] | None = None) -> None:
        """Open the file to continue it, or create it.

        Args:
            path: The file; its folder exists. `None` keeps the rows in memory only.
            header: Must be equal for the rows of the file to be used.

        Raises:
            SettingsError: The file is of an experiment with another header, is damaged, or cannot
                be written.
        """
        self._path = path
        self.rows: list[dict[str, Any]] = []
        if path is None:
            return
        try:
            self._open(path, header or {})
        except OSError as error:
            raise SettingsError(
                f"{path} cannot be used for scores ({error.strerror}); choose another folder."
            ) from error

    def missing(self, queries: Iterable[str]) -> list[str]:
        """Return the queries that have no row."""
        done = {row["query"] for row in self.rows}
        return [query for query in queries if query not in done]

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, also to the file."""
        self.rows.append(row)
        if self._path is not None:
            _append(self._path, row)

    def _open(self, path: Path, header: Mapping[str, Any]) -> None:
        whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
        lines = _parsed(path, whole)
        if not lines:
            path.write_bytes(b"")
            _append(path, header)
            return
        if lines[0] != json.loads(json.dumps(dict(header))):
            changed = sorted(name for name in header if lines[0].get(name) != header[name])
            raise SettingsError(
                f"{path} is of an experiment that differs in {', '.join(changed) or 'its layout'}; "
                "choose another folder, or delete the file to begin anew."
            )
        self.rows = lines[1:]
        # Drop a line that an interrupted run did not finish.
        os.truncate(path, len(whole) + 1)


def _append(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dict(row)) + "\n")


def _parsed(path: Path, whole: bytes) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            # Raises ValueError if it is not JSON, TypeError if it is not an object.
            lines.append({**json.loads(line)})
        except (ValueError, TypeError) as error:
            raise SettingsError(
                f"{path}, line {number}: damaged ({type(error).__name__}: {error}); delete the "
                "file to begin anew."
            ) from error
    return lines


def weights_stamp(model: str) -> Iterator[tuple[str, int, int]]:
    """Yield name, size and time of the weights in a folder, which identify them."""
    for path in sorted(Path(model).expanduser().glob("*.safetensors")):
        status = path.stat()
        yield path.name, status.st_size, status.st_mtime_ns
