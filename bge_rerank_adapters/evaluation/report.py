"""An experiment's report: a sentence, a table and files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bge_rerank_adapters.calls.trec import write_run
from bge_rerank_adapters.evaluation.measurements import Measurements
from bge_rerank_adapters.evaluation.result_files import (
    FIRST_STAGE,
    check_file_names,
    file_name,
    make_folder,
)
from bge_rerank_adapters.evaluation.view import answer, to_html, to_text


class Report(Measurements):
    """What reranking changed on a collection, shown as text, HTML and files.

    The attributes are those of `Measurements`.
    """

    def answer(self, name: str) -> str:
        """Return a sentence that says whether an engine helps, with a confidence interval."""
        return answer(self, name)

    def __str__(self) -> str:
        """Return the answers and the table in plain columns."""
        return to_text(self)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text("Report(...)" if cycle else str(self))

    def _repr_html_(self) -> str:
        return to_html(self)

    def save(self, folder: str | Path) -> list[Path]:
        """Write `report.json`, `per-query.jsonl` and TREC runs of first stage and engines.

        Args:
            folder: The folder, created if it is missing; files of the same names are replaced.

        Returns:
            The files written.

        Raises:
            SettingsError: The folder cannot be created, or two engines' files would be the same.
        """
        check_file_names(each.name for each in self.scored)
        target = make_folder(folder)
        report = target / "report.json"
        report.write_text(json.dumps(self.to_records(), indent=1) + "\n", encoding="utf-8")
        queries = target / "per-query.jsonl"
        lines = [json.dumps(record) + "\n" for record in self.per_query()]
        queries.write_text("".join(lines), encoding="utf-8")
        runs = {FIRST_STAGE: self.first_stage}
        runs |= {each.name: each.run(self.first_stage) for each in self.scored}
        paths = []
        for name, run in runs.items():
            paths.append(target / f"{file_name(name)}.trec")
            write_run(paths[-1], run, tag=file_name(name))
        return [report, queries, *paths]


def best_threshold(relevant: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Return the score threshold with the highest F1, and that F1.

    Args:
        relevant: Scores of relevant documents.
        other: Scores of all others.

    Returns:
        The threshold, inclusive, and F1 in [0, 1]; if several are equal, the highest threshold.
        `(1.0, 0.0)` if nothing is relevant.
    """
    best, best_f1 = 1.0, 0.0
    kept = right = 0
    labelled = sorted([(-score, False) for score in other] + [(-score, True) for score in relevant])
    for place, (negative, is_relevant) in enumerate(labelled):
        kept += 1
        right += is_relevant
        if place + 1 < len(labelled) and labelled[place + 1][0] == negative:
            continue  # equal scores are kept together
        f1 = 2 * right / (kept + len(relevant))
        if f1 > best_f1:
            best, best_f1 = -negative, f1
    return best, best_f1
