"""Scores that authors published for real checkpoints, to check an installation against.

The figures live in `published-scores.json`, each with its source.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PATH = Path(__file__).parent / "published-scores.json"


@dataclass(frozen=True, slots=True)
class PublishedScores:
    """What one source says that a checkpoint gives for some pairs.

    Attributes:
        model: The checkpoint's name on the hub.
        source: Where the figures stand, and how they were computed if it says so.
        kind: `"score"` or `"logit"`.
        tolerance: How far a float32 result may be away, given how the figures were made.
        pairs: n (query, document) tuples.
        expected: The figure for each pair's index; a source need not tell all of them.
    """

    model: str
    source: str
    kind: str
    tolerance: float
    pairs: tuple[tuple[str, str], ...]
    expected: dict[int, float]


def _parse(row: dict[str, Any]) -> PublishedScores:
    if "query" in row:
        pairs = tuple((row["query"], document) for document in row["documents"])
        expected = {int(index): figure for index, figure in row["expected"].items()}
    else:
        pairs = tuple((query, document) for query, document in row["pairs"])
        expected = dict(enumerate(row["expected"]))
    return PublishedScores(
        row["model"], row["source"], row["kind"], row["tolerance"], pairs, expected
    )


PUBLISHED_SCORES = tuple(
    _parse(row) for row in json.loads(_PATH.read_text(encoding="utf-8"))["checks"]
)
