"""The methods that every reranker has, whether it scores here or asks a server."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar, Unpack

from bge_rerank_adapters.calls.documents import DocumentLike
from bge_rerank_adapters.calls.limits import Limits
from bge_rerank_adapters.calls.progress import ProgressBar
from bge_rerank_adapters.calls.ranking import PairScore, Ranking, ScoredRequest
from bge_rerank_adapters.calls.requests import Request, Requests
from bge_rerank_adapters.calls.runner import Call, Reservations
from bge_rerank_adapters.calls.scoring import Scoring
from bge_rerank_adapters.settings.other_names import no_attribute
from bge_rerank_adapters.settings.token_limits import TokenLimits, TokenOptions, takes_token_limits

SettingsT = TypeVar("SettingsT")


class BaseReranker(Scoring[SettingsT]):
    """Checks the arguments of a call, has its pairs scored, and ranks them.

    A subclass implements `Scoring`, `warm_up` and `close`.

    Attributes:
        settings: The settings it was made with.
    """

    @classmethod
    def from_settings(cls, settings: SettingsT) -> Self:
        """Return a new one with these settings; errors as of the constructor."""
        reranker = cls.__new__(cls)
        reranker._set_up(settings)  # noqa: SLF001 - its own class
        return reranker

    @takes_token_limits
    def rerank(
        self,
        query: str,
        documents: Sequence[DocumentLike],
        *,
        top_k: int | None = None,
        score_threshold: float | None = None,
        timeout_s: float | None = None,
        **tokens: Unpack[TokenOptions],
    ) -> Ranking:
        """Return the documents ranked by how well they answer the query, best first.

        Args:
            query: The question; may be empty.
            documents: n texts, or objects that each have one: a mapping with exactly one of
                `text`, `content` and `page_content`, a document of LangChain, a node of LlamaIndex
                (read as for an embedding) or a hit of Milvus. May be empty or have duplicates.
            top_k: Maximum number of results; `None` is all.
            score_threshold: Lowest score to keep, in [0, 1], inclusive; applied before `top_k`.
            timeout_s: Maximum seconds that the call may take; `None` is for ever.
            **tokens: `max_document_tokens`, `max_query_tokens` and `max_pair_tokens`, as in
                `TokenLimits`. Texts are cut to them before windows are made.

        Returns:
            At most n `RankedDocument`, highest logit first, equal ones in input order; `[]` for no
            documents. From a server that gives no logits: highest score first, equal ones in the
            server's order.

        Raises:
            InputTypeError: The query is not a `str`, or a document has no text or several.
            SettingsError: `top_k`, `score_threshold`, `timeout_s` or a number of tokens is out of
                range, or the server has no field for it.
            Overloaded: Too many pairs wait already, here or on the server.
            RerankTimeoutError: `timeout_s` ran out.
            ScoringError: The model failed, or gave NaN for a pair. `RemoteError`, a subclass: the
                server cannot be reached, refused, or answered wrongly.
            ClosedError: The reranker has been closed.
        """
        request = Request.checked(query, documents, TokenLimits.of_call(self.rerank, tokens))
        limits = Limits(top_k, score_threshold)
        return self._run(
            lambda reservations: self._rerank(request, limits, reservations), timeout_s=timeout_s
        )

    @takes_token_limits
    async def arerank(
        self,
        query: str,
        documents: Sequence[DocumentLike],
        *,
        top_k: int | None = None,
        score_threshold: float | None = None,
        timeout_s: float | None = None,
        **tokens: Unpack[TokenOptions],
    ) -> Ranking:
        """Return what `rerank` returns, without blocking the event loop.

        A call that is cancelled or runs out of time takes its waiting pairs out of the queue, or
        cancels its requests to the server.
        """
        request = Request.checked(query, documents, TokenLimits.of_call(self.arerank, tokens))
        limits = Limits(top_k, score_threshold)
        return await self._arun(
            lambda reservations: self._rerank(request, limits, reservations),
            timeout_s=timeout_s,
            long=self._is_long(request),
        )

    @takes_token_limits
    def logits(
        self, query: str, documents: Sequence[DocumentLike], **tokens: Unpack[TokenOptions]
    ) -> list[float]:
        """Return the documents' logits in input order: unbounded floats, `[]` for no documents.

        Raises:
            RemoteError: The server gives scores alone.
            RerankError: As `rerank`.
        """
        limits = TokenLimits.of_call(self.logits, tokens)
        scores = self._scores(Request.checked(query, documents, limits))
        logits = [each.logit for each in scores if each.logit is not None]
        if len(logits) < len(scores):
            raise self._no_logits()
        return logits

    @takes_token_limits
    def score(
        self, query: str, documents: Sequence[DocumentLike], **tokens: Unpack[TokenOptions]
    ) -> list[float]:
        """Return the documents' scores in input order: in [0, 1], `[]` for no documents.

        Raises:
            RerankError: As `rerank`.
        """
        limits = TokenLimits.of_call(self.score, tokens)
        return [each.score for each in self._scores(Request.checked(query, documents, limits))]

    @takes_token_limits
    def score_pairs(
        self, pairs: Iterable[tuple[str, DocumentLike]], **tokens: Unpack[TokenOptions]
    ) -> list[float]:
        """Return the scores of (query, document) pairs in input order: in [0, 1], `[]` for none.

        Raises:
            InputTypeError: A pair is not a `str` and a document; the message names which.
            RerankError: As `rerank`.
        """
        requests = Request.checked_pairs(pairs, TokenLimits.of_call(self.score_pairs, tokens))
        scores = self._run(lambda reservations: self._score_pairs(requests, reservations))
        return [each.score for each in scores]

    @takes_token_limits
    def rerank_many(
        self,
        requests: Iterable[tuple[str, Sequence[DocumentLike]]],
        *,
        top_k: int | None = None,
        score_threshold: float | None = None,
        progress: bool = False,
        **tokens: Unpack[TokenOptions],
    ) -> list[Ranking]:
        """Return the rankings of many (query, documents) requests, in their order.

        A few are scored at a time, and other calls are served in between.

        Args:
            requests: Any number of (query, documents) tuples; an iterator is read as needed.
            top_k: Maximum number of results of each.
            score_threshold: Lowest score to keep, in [0, 1], inclusive.
            progress: Whether to show a bar on standard error; needs rich.
            **tokens: As for `rerank`, for each request.

        Raises:
            InputTypeError: A request is not a query and documents; the message names which.
            RerankError: As `rerank`; `Overloaded` only by a server.
        """
        checked = Requests(requests, TokenLimits.of_call(self.rerank_many, tokens))
        limits = Limits(top_k, score_threshold)
        return self._run(
            lambda reservations: self._rerank_many(checked, limits, reservations, progress=progress)
        )

    @takes_token_limits
    async def arerank_many(
        self,
        requests: Iterable[tuple[str, Sequence[DocumentLike]]],
        *,
        top_k: int | None = None,
        score_threshold: float | None = None,
        progress: bool = False,
        timeout_s: float | None = None,
        **tokens: Unpack[TokenOptions],
    ) -> list[Ranking]:
        """Return what `rerank_many` returns, without blocking the event loop.

        An iterator is read in another thread. All long calls of a reranker share two threads, so
        an iterator that waits, for example for a network, delays other calls: collect the items
        first, or pass a few at a time.
        """
        checked = Requests(requests, TokenLimits.of_call(self.arerank_many, tokens))
        limits = Limits(top_k, score_threshold)
        return await self._arun(
            lambda reservations: self._rerank_many(
                checked, limits, reservations, progress=progress
            ),
            timeout_s=timeout_s,
            long=True,
        )

    @property
    @abstractmethod
    def closed(self) -> bool:
        """Whether it scores no more."""

    @abstractmethod
    def warm_up(self) -> None:
        """Score something once, so that the first query does not wait for one-time work."""

    @abstractmethod
    def close(self) -> None:
        """Release its resources; running and later calls raise `ClosedError`."""

    def __enter__(self) -> Self:
        """Return the reranker itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    if not TYPE_CHECKING:  # or type checkers would accept any attribute

        def __getattr__(self, name: str) -> NoReturn:
            """Name the method here that stands for one of another library."""
            raise AttributeError(no_attribute(name, of=type(self).__name__), name=name, obj=self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings, without secrets; unpickling makes a new reranker from them."""
        return type(self).from_settings, (self.settings,)

    def __copy__(self) -> Self:
        """Return the reranker itself: threads, weights and connections are shared, not copied."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return the reranker itself, as `__copy__`."""
        return self

    def _scores(self, request: Request) -> list[PairScore]:
        return self._run(lambda reservations: self._score(request, reservations)).scores

    def _rerank_unbounded(self, query: str, documents: Sequence[str], limits: Limits) -> Ranking:
        """Return what `rerank` returns; for bulk runs, which wait even while the queue is full."""
        request = Request.checked(query, documents)
        return self._run(
            lambda reservations: self._rerank(request, limits, reservations, bounded=False)
        )

    def _rerank(
        self,
        request: Request,
        limits: Limits,
        reservations: Reservations,
        *,
        bounded: bool = True,
    ) -> Call[Ranking]:
        scored = yield from self._score(request, reservations, bounded=bounded)
        return scored.rank(limits)

    def _rerank_many(
        self, requests: Requests, limits: Limits, reservations: Reservations, *, progress: bool
    ) -> Call[list[Ranking]]:
        yield None
        rankings: list[Ranking] = []
        with ProgressBar(requests, shown=progress) as bar:

            def finish(scored: ScoredRequest) -> None:
                rankings.append(scored.rank(limits))
                bar.advance(1)

            yield from self._score_many(requests, reservations, finish=finish)
        return rankings
