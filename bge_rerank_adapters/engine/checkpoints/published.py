"""Scores that authors published for real checkpoints, to check an installation against.

The figures are in `published-scores.json`, each with its source.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PATH = Path(__file__).parent / "published-scores.json"


@dataclass(frozen=True, slots=True)
class PublishedScores:
    """The figures that one source gives for some pairs.

    Attributes:
        model: The checkpoint's name on the hub.
        source: Where the figures are published, and how they were computed if that is known.
        kind: `"score"` or `"logit"`.
        tolerance: How much a float32 result may differ, given how the figures were computed.
        pairs: n (query, document) tuples.
        expected: Figures by the index of their pair; some may be missing.
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
