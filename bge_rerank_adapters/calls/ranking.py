"""Turns the scores of documents into rankings."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from bge_rerank_adapters.calls.display import to_html, to_records, to_text
from bge_rerank_adapters.calls.limits import Limits
from bge_rerank_adapters.calls.ranked_document import RankedDocument
from bge_rerank_adapters.calls.requests import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one call cost; of a call to a server the tokens alone are known.

    Attributes:
        tokens: Tokens of its pairs, special tokens included; identical pairs count once.
        tokenizing_s: Seconds spent on tokenising its texts.
        waiting_s: Seconds from then until the first of its pairs went into a pack.
        scoring_s: Seconds from then until the last of its pairs was scored.
    """

    tokens: int
    tokenizing_s: float = 0.0
    waiting_s: float = 0.0
    scoring_s: float = 0.0


class Ranking(list[RankedDocument]):
    """A list of ranked documents, best first.

    It is a table in a notebook, and plain columns where it is printed.

    Attributes:
        usage: What the call cost, if it had only this query; otherwise `None`.
    """

    usage: Usage | None = None

    def to_records(self) -> list[dict[str, Any]]:
        """Return a plain dict for each result: `pandas.DataFrame(ranking.to_records())`."""
        return to_records(self)

    def __str__(self) -> str:
        """Return rank, movement against the input order, score and text as plain columns."""
        return to_text(self)

    def _repr_html_(self) -> str:
        return to_html(self)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text("Ranking(...)" if cycle else str(self))


@runtime_checkable
class Scorer(Protocol):
    """The methods that an adapter calls; `Reranker` and `RemoteReranker` have them."""

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_k: int | None = None,
        score_threshold: float | None = None,
    ) -> list[RankedDocument]:
        """Return the documents ranked by how well they answer the query, best first."""
        ...

    async def arerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_k: int | None = None,
        score_threshold: float | None = None,
    ) -> list[RankedDocument]:
        """Return what `rerank` returns, without blocking the event loop."""
        ...


class PairScore(NamedTuple):
    """The result of scoring one pair, here or by a server.

    Attributes:
        score: In [0, 1].
        logit: Unbounded; `None` where a server gives scores alone.
        truncated: Whether the end of the document was cut off.
        span: Start and end of the document's best window; `None` without windows.
        query_truncated: Whether the query was cut.
    """

    score: float
    logit: float | None
    truncated: bool = False
    span: tuple[int, int] | None = None
    query_truncated: bool = False

    @property
    def order(self) -> float:
        """The value that rankings are ordered by."""
        return self.score if self.logit is None else self.logit


@dataclass(frozen=True, slots=True)
class ScoredRequest:
    """A request with the scores of its n documents.

    Attributes:
        request: The query and its documents.
        scores: n scores, in input order.
        order: The n indexes in the order that breaks ties; `None` is input order.
        usage: What the call cost, if it had only this request.
    """

    request: Request
    scores: list[PairScore]
    order: list[int] | None = None
    usage: Usage | None = None

    def rank(self, limits: Limits) -> Ranking:
        """Return the documents best first: the highest logit, or score where there are none."""
        order = range(len(self.scores)) if self.order is None else self.order
        best_first = sorted(order, key=lambda index: -self.scores[index].order)
        ranking = Ranking(limits.keep(map(self._ranked, best_first)))
        ranking.usage = self.usage
        return ranking

    def _ranked(self, index: int) -> RankedDocument:
        score = self.scores[index]
        return RankedDocument(
            index=index,
            score=score.score,
            text=self.request.texts[index],
            logit=score.logit,
            truncated=score.truncated,
            span=score.span,
            query_truncated=score.query_truncated,
            document=self.request.document(index),
        )


def sigmoid(logit: float) -> float:
    """Return the logistic function of a logit, in [0, 1], without overflow for any float."""
    if logit >= 0:
        return 1.0 / (1.0 + math.exp(-logit))
    power = math.exp(logit)
    return power / (1.0 + power)
