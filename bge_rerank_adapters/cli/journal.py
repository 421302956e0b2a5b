"""How far a run has come, in a file beside its output, so that a killed run can continue."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bge_rerank_adapters.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment when output and input were in step.

    Attributes:
        items: How many of the input are done.
        bytes: How long the output was then.
        bad_bytes: How long the file of what was put aside was.
    """

    items: int = 0
    bytes: int = 0
    bad_bytes: int = 0


class Journal:
    """Keeps the last mark of a run in a file that is replaced as a whole."""

    def __init__(self, output: Path, *, asked: dict[str, Any], resume: bool) -> None:
        """Look for an earlier run's mark, and cut what it wrote after that.

        Args:
            output: What the run writes; `output` with ".progress" is the journal, and with
                ".bad.jsonl" what is put aside.
            asked: What must be the same for a run to be continued.
            resume: Whether to continue.

        Raises:
            SettingsError: There is an unfinished run, and it is not to be continued, or was asked
                for otherwise.
        """
        self.output = output
        self.bad = output.with_name(output.name + ".bad.jsonl")
        self._path = output.with_name(output.name + ".progress")
        self._asked = json.loads(json.dumps(asked))
        self.finished = resume and output.exists() and not self._path.exists()
        if self.finished:
            self.mark = Mark()
            return
        if not self._path.exists():
            self._begin()
            return
        kept = json.loads(self._path.read_text(encoding="utf-8"))
        if not resume:
            raise SettingsError(
                f"{output} is of an unfinished run; continue it with --resume, or delete "
                f"{self._path} to begin anew."
            )
        if kept["asked"] != self._asked:
            changed = sorted(n for n in self._asked if kept["asked"].get(n) != self._asked[n])
            raise SettingsError(
                f"{output} is of a run that differs in {', '.join(changed)}; give the same "
                f"options, or delete {self._path} to begin anew."
            )
        self.mark = Mark(**kept["mark"])
        _cut(output, self.mark.bytes)
        _cut(self.bad, self.mark.bad_bytes)

    def _begin(self) -> None:
        # The journal first: an output without one is that of a finished run.
        self.set(Mark())
        self.output.write_bytes(b"")
        self.bad.unlink(missing_ok=True)

    def set(self, mark: Mark) -> None:
        """Keep a mark; what it speaks of must have been written before."""
        self.mark = mark
        kept = {
            "asked": self._asked,
            "mark": {"items": mark.items, "bytes": mark.bytes, "bad_bytes": mark.bad_bytes},
        }
        following = self._path.with_name(self._path.name + ".new")
        following.write_text(json.dumps(kept), encoding="utf-8")
        following.replace(self._path)

    def finish(self) -> None:
        """Forget the journal: the output is complete."""
        self._path.unlink(missing_ok=True)


def _cut(path: Path, length: int) -> None:
    if not path.exists() and not length:
        path.touch()
    if not path.exists() or path.stat().st_size < length:
        raise SettingsError(
            f"{path} is shorter than when it was written; it cannot be continued. Delete the "
            "files of the run to begin anew."
        )
    os.truncate(path, length)
