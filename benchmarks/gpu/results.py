"""What stages find, and how it is written: JSON for programs, Markdown for people."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One finding.

    Attributes:
        name: What was checked or measured.
        value: The figure; `None` for a check.
        unit: Of the value.
        passed: Whether a check passed, or a goal was reached; `None` where there is none.
        note: Tolerances, how it was measured, why there is no value.
    """

    name: str
    value: float | None = None
    unit: str = ""
    passed: bool | None = None
    note: str = ""

    def to_json(self) -> str:
        """Return the row as a line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> "Row":
        """Return the row of a line that `to_json` gave."""
        found = json.loads(line)
        return cls(**{each.name: found[each.name] for each in fields(cls)})


# What a stage does: yields rows as it finds them.
Rows = Iterator[Row]


def checked(name: str, check: Callable[[], str]) -> Row:
    """Return whether a check passes.

    Args:
        name: Of the row.
        check: Returns a note, or raises; `AssertionError` says what was found instead.
    """
    try:
        return Row(name, passed=True, note=check())
    except Exception as error:  # noqa: BLE001 - of whatever fails the next check should be run
        return Row(name, passed=False, note=f"{type(error).__name__}: {error}"[:400])


class Report:
    """The files of a run, complete after each row."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        """Begin with no rows.

        Args:
            folder: Made if it is not there.
            about: What the run was asked for.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._about = about
        self._stages: dict[str, list[Row]] = {}
        self._ends: dict[str, str] = {}
        self._write()

    def add(self, stage: str, row: Row) -> None:
        """Write a row of a stage."""
        self._stages.setdefault(stage, []).append(row)
        self._write()

    def end(self, stage: str, how: str) -> None:
        """Write how a stage ended."""
        self._stages.setdefault(stage, [])
        self._ends[stage] = how
        self._write()

    @property
    def failures(self) -> list[str]:
        """What failed: checks by their names, and stages that did not end well."""
        rows = [row for rows in self._stages.values() for row in rows]
        broken = [f"{stage}: {how}" for stage, how in self._ends.items() if not _is_well(how)]
        return [row.name for row in rows if row.passed is False and row.value is None] + broken

    def _write(self) -> None:
        stages = {
            stage: {"ended": self._ends.get(stage), "rows": [asdict(row) for row in rows]}
            for stage, rows in self._stages.items()
        }
        written = json.dumps({"about": self._about, "stages": stages}, indent=1)
        (self.folder / "gpu.json").write_text(written, encoding="utf-8")
        (self.folder / "gpu.md").write_text(self._markdown(), encoding="utf-8")

    def _markdown(self) -> str:
        lines = ["# A GPU", "", *(f"- {name}: {value}" for name, value in self._about.items())]
        for stage, rows in self._stages.items():
            lines += ["", f"## {stage}", "", "| what | result | note |", "|---|---:|---|"]
            lines += [_line(row) for row in rows]
            lines += ["", f"Ended: {self._ends.get(stage, 'no, it was cut off here')}"]
        return "\n".join(lines) + "\n"


def _is_well(how: str) -> bool:
    return how.startswith("after")


def _line(row: Row) -> str:
    verdict = {None: "", True: "yes", False: "**no**"}[row.passed]
    figure = "" if row.value is None else f"{row.value:,.4g} {row.unit}".strip()
    result = ", ".join(part for part in (figure, verdict) if part)
    return f"| {row.name} | {result} | {row.note.replace('|', '/')} |".replace("\n", " ")
