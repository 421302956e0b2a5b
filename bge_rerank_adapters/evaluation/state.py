"""Keeps the rows of an experiment in a file, so that an interrupted run can continue."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bge_rerank_adapters.errors import SettingsError


class State:
    """A file of JSON lines: a header that identifies the experiment, then a row for each query."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        """Open the file to continue it, or create it.

        Args:
            path: The file; its folder exists.
            header: Must be equal for the rows to be used.

        Raises:
            SettingsError: The file is of an experiment with another header, is damaged, or cannot
                be written.
        """
        self._path = path
        self.rows: list[dict[str, Any]] = []
        try:
            self._open(header)
        except OSError as error:
            raise SettingsError(
                f"{path} cannot be used for scores ({error.strerror}); choose another folder."
            ) from error

    def _open(self, header: dict[str, Any]) -> None:
        path = self._path
        whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
        lines = self._parsed(whole)
        if not lines:
            path.write_bytes(b"")
            self._append(header)
            return
        if lines[0] != json.loads(json.dumps(header)):
            changed = sorted(name for name in header if lines[0].get(name) != header[name])
            raise SettingsError(
                f"{path} is of an experiment that differs in {', '.join(changed) or 'its layout'}; "
                "choose another folder, or delete the file to begin anew."
            )
        self.rows = lines[1:]
        # Drop a line that an interrupted run did not finish.
        os.truncate(path, len(whole) + 1)

    def add(self, row: dict[str, Any]) -> None:
        """Add a row to the file."""
        self.rows.append(row)
        self._append(row)

    def _append(self, row: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _parsed(self, whole: bytes) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = []
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                # Raises ValueError if it is not JSON, TypeError if it is not an object.
                lines.append({**json.loads(line)})
            except (ValueError, TypeError) as error:
                raise SettingsError(
                    f"{self._path}, line {number}: damaged ({type(error).__name__}: {error}); "
                    "delete the file to begin anew."
                ) from error
        return lines


def weights_stamp(model: str) -> Iterator[tuple[str, int, int]]:
    """Yield name, size and time of the weights in a folder, which identify them."""
    for path in sorted(Path(model).expanduser().glob("*.safetensors")):
        status = path.stat()
        yield path.name, status.st_size, status.st_mtime_ns
