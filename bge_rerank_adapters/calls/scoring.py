"""What a reranker implements for `calls.base`: how pairs are scored, and how a call is run."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from bge_rerank_adapters.calls.ranking import PairScore, ScoredRequest
from bge_rerank_adapters.calls.requests import Request
from bge_rerank_adapters.calls.runner import AsyncRunner, Call, MakeCall, Reservations, run
from bge_rerank_adapters.errors import RerankError, ScoringError

SettingsT = TypeVar("SettingsT")
T = TypeVar("T")


class Scoring(ABC, Generic[SettingsT]):
    """Scores requests, as calls of `calls.runner`, and runs them from a thread or an event loop.

    Attributes:
        settings: The settings it was made with.
    """

    settings: SettingsT

    @abstractmethod
    def _set_up(self, settings: SettingsT) -> None:
        """Keep the settings and prepare to score."""

    @abstractmethod
    def _check_open(self) -> None:
        """Raise unless it can score."""

    @abstractmethod
    def _async_runner(self) -> AsyncRunner:
        """Return the runner of calls from event loops."""

    @abstractmethod
    def _score(
        self, request: Request, reservations: Reservations, *, bounded: bool = True
    ) -> Call[ScoredRequest]:
        """Score the documents of one request.

        Args:
            request: n documents; may be none.
            reservations: Holds the futures that the call waits for.
            bounded: Whether the call is refused while too many pairs wait.
        """

    @abstractmethod
    def _score_pairs(
        self, requests: list[Request], reservations: Reservations
    ) -> Call[list[PairScore]]:
        """Score the only document of each request together, and return the scores in order."""

    @abstractmethod
    def _score_many(
        self,
        requests: Iterable[Request],
        reservations: Reservations,
        *,
        finish: Callable[[ScoredRequest], None],
    ) -> Call[None]:
        """Score requests, read as needed, and call `finish` with each, in order."""

    def _is_long(self, request: Request) -> bool:  # noqa: ARG002 - of use to subclasses
        """Return whether a request takes so long to prepare that short ones should overtake it."""
        return False

    def _no_logits(self) -> RerankError:
        """Return the error for a call of `logits` where only scores are known."""
        return ScoringError(f"{self!r} gives scores alone, no logits; use score().")

    def _run(self, make_call: MakeCall[T], *, timeout_s: float | None = None) -> T:
        self._check_open()
        return run(make_call, timeout_s=timeout_s)

    async def _arun(self, make_call: MakeCall[T], *, timeout_s: float | None, long: bool) -> T:
        self._check_open()
        return await self._async_runner().run(make_call, timeout_s=timeout_s, long=long)
