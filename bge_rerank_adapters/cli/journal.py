"""Records a run's progress in a file next to its output, so that it can be continued."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bge_rerank_adapters.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Mark:
    """A consistent state of a run.

    Attributes:
        items: Number of items that are done.
        bytes: Length of the output then.
        bad_bytes: Length of the file with bad lines then.
    """

    items: int = 0
    bytes: int = 0
    bad_bytes: int = 0


class Journal:
    """Keeps the last mark of a run in a file that is replaced atomically.

    After the run, the file `output` + ".settings.json" has its options.

    Attributes:
        output: The file that the run writes.
        bad: The file for bad lines: `output` + ".bad.jsonl".
        mark: The last mark of an earlier run, or the beginning.
        begun: Whether the run has been begun.
        finished: Whether the output is complete.
    """

    def __init__(self, output: Path, *, options: dict[str, Any], resume: bool) -> None:
        """Look for an earlier run's mark; nothing is written before `begin`.

        Args:
            output: The file that the run writes; `output` + ".progress" is the journal.
            options: Must be the same for a run to be continued.
            resume: Whether to continue.

        Raises:
            SettingsError: The output cannot be written there, or there is an unfinished run, and
                `resume` is false or the options differ.
        """
        self.output = output
        self._check_folder()
        self.bad = output.with_name(output.name + ".bad.jsonl")
        self._made_with = output.with_name(output.name + ".settings.json")
        self._path = output.with_name(output.name + ".progress")
        self._following = output.with_name(output.name + ".progress.new")
        self._options = json.loads(json.dumps(options))
        self.begun = self._path.exists()
        self.finished = resume and output.exists() and not self.begun
        self.mark = self._kept(resume=resume) if self.begun else Mark()

    def refuse_inputs(self, inputs: Iterable[os.stat_result]) -> None:
        """Refuse to overwrite input files.

        Args:
            inputs: The `os.stat` of each file that is read.

        Raises:
            SettingsError: The run would write, truncate or delete one of them.
        """
        read = list(inputs)
        for path in (self.output, self.bad, self._path, self._following):
            if path.exists() and any(os.path.samestat(path.stat(), each) for each in read):
                raise SettingsError(
                    f"{path} is read by this run, which would overwrite it; give --output another "
                    "name."
                )

    def begin(self) -> None:
        """Empty the output, or truncate it to the last mark of an earlier run.

        Raises:
            SettingsError: A file cannot be written, or is shorter than the mark says.
        """
        try:
            if self.begun:
                _cut(self.output, self.mark.bytes)
                _cut(self.bad, self.mark.bad_bytes)
                return
            # The journal first: an output without a journal counts as finished.
            self.set(self.mark)
            self.begun = True
            self.output.write_bytes(b"")
            self.bad.unlink(missing_ok=True)
            self._made_with.unlink(missing_ok=True)
        except OSError as error:
            raise SettingsError(
                f"{error.filename} cannot be written ({error.strerror}); give --output a file in a "
                "folder where you may write."
            ) from error

    def set(self, mark: Mark) -> None:
        """Store a mark; everything before it must have been written."""
        self.mark = mark
        kept = {
            "asked": self._options,
            "mark": asdict(mark),
        }
        self._following.write_text(json.dumps(kept), encoding="utf-8")
        self._following.replace(self._path)

    def finish(self) -> None:
        """Remove the journal of a complete output, and store the options."""
        self._made_with.write_text(json.dumps(self._options, indent=1) + "\n", encoding="utf-8")
        self._path.unlink(missing_ok=True)

    def same_settings(self) -> str:
        """Return a clause about the options of a complete output.

        Raises:
            SettingsError: The options differ.
        """
        try:
            made_with = dict(json.loads(self._made_with.read_bytes()))
        except (OSError, ValueError, TypeError):
            return ", whatever its options were"
        changed = _differences(made_with, self._options)
        if changed:
            raise SettingsError(
                f"{self.output} is complete, but was made with another {', '.join(changed)}; "
                "delete it to rerank anew, or give --output another name."
            )
        return ", with the same options"

    def _check_folder(self) -> None:
        if not self.output.parent.is_dir():
            raise SettingsError(
                f"{self.output} cannot be written: there is no folder {self.output.parent}; make "
                "it first."
            )
        if self.output.is_dir():
            raise SettingsError(f"{self.output} is a folder; give --output the name of a file.")

    def _kept(self, *, resume: bool) -> Mark:
        if not resume:
            raise SettingsError(
                f"{self.output} is of an unfinished run; continue it with --resume, or delete "
                f"{self._path} to begin anew."
            )
        try:
            kept = json.loads(self._path.read_bytes())
            mark, options = Mark(**kept["mark"]), dict(kept["asked"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise SettingsError(
                f"{self._path} is damaged ({type(error).__name__}: {error}), so the run cannot be "
                "continued; delete it to begin anew."
            ) from error
        changed = _differences(options, self._options)
        if changed:
            raise SettingsError(
                f"{self.output} is of a run that differs in {', '.join(changed)}; give the same "
                f"options, or delete {self._path} to begin anew."
            )
        return mark


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the names of options that differ, with each of the engine's settings."""
    before, now = _flat(before), _flat(now)
    return sorted(name for name in {*before, *now} if before.get(name) != now.get(name))


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    settings = options.get("settings")
    return {**options, "settings": None, **(settings if isinstance(settings, dict) else {})}


def _cut(path: Path, length: int) -> None:
    if not path.exists() and not length:
        path.touch()
    if not path.exists() or path.stat().st_size < length:
        raise SettingsError(
            f"{path} is shorter than when it was written; it cannot be continued. Delete the "
            "files of the run to begin anew."
        )
    os.truncate(path, length)
