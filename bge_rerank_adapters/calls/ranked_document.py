"""One result of a reranking."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class RankedDocument:
    """One document of a ranking.

    Attributes:
        index: Position of the document in the input list, counted from 0.
        score: `sigmoid(logit)`, in [0, 1].
        text: The document as it was given.
        logit: The model's raw output for the pair, unbounded; what rankings are ordered by.
            `None` only where a remote server gives scores alone.
        truncated: Whether the end of the document was cut off to fit the model.
        span: With windows, start and end in `text` of the window that scored best; of a document
            that fits the model, the whole text. `None` without windows.
        query_truncated: Whether the query was cut; the same for all documents of a call.
        document: The object that was given: a text, or an object with one. Not compared.
    """

    index: int
    score: float
    text: str
    logit: float | None
    truncated: bool = False
    span: tuple[int, int] | None = None
    query_truncated: bool = False
    document: Any = field(default=None, compare=False, repr=False)
