"""TREC runs: the documents found for each query, and their file format."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from bge_rerank_adapters.errors import SettingsError

Run = dict[str, dict[str, float]]
"""For each query its documents with their scores, best first."""


def read_run(path: str | Path) -> Run:
    """Return the run of a TREC file, each query's documents ordered by score, best first.

    Raises:
        SettingsError: The file cannot be read, or a line of it is not query, Q0, document, rank,
            score and tag; the message names the line.
    """
    run: Run = {}
    try:
        # A byte order mark, which some editors write, would be taken for part of a query's id.
        with Path(path).open(encoding="utf-8-sig") as lines:
            for query, document, score in parse_run(lines, name=str(path)):
                run.setdefault(query, {})[document] = score
    except OSError as error:
        raise SettingsError(f"The run {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"The run {path} is not UTF-8: {error}; convert it.") from error
    return {query: best_first(found) for query, found in run.items()}


def parse_run(lines: Iterable[str], *, name: str) -> Iterator[tuple[str, str, float]]:
    """Yield query, document and score of each line of a run; errors as of `read_run`."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            query, _, document, _, number_text, _ = line.split()
            score = float(number_text)
        except ValueError as error:
            raise SettingsError(
                f"{name}, line {number}: must be query, Q0, document, rank, score and tag, "
                f"got {line.strip()[:80]!r}."
            ) from error
        if math.isnan(score):
            raise SettingsError(f"{name}, line {number}: the score must be a number, got {score}.")
        yield query, document, score


def best_first(found: dict[str, float]) -> dict[str, float]:
    """Return the documents by score, highest first, equal ones as they came."""
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def run_lines(query: str, found: Iterable[tuple[str, float]], *, tag: str) -> Iterator[str]:
    """Yield the lines for one query's documents, given best first."""
    for rank, (document, score) in enumerate(found, start=1):
        yield f"{query} Q0 {document} {rank} {score!r} {tag}\n"


def write_run(path: str | Path, run: Run, *, tag: str) -> None:
    """Write a TREC run.

    Args:
        path: The file to write or replace.
        run: Each query's documents, best first.
        tag: The run's name; one word.
    """
    with Path(path).open("w", encoding="utf-8") as file:
        for query, found in run.items():
            file.writelines(run_lines(query, found.items(), tag=tag))
