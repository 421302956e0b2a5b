"""The requests of a call: one, or many that are read and scored in pieces."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from bge_rerank_adapters.calls.checks import (
    check_documents,
    check_ordered,
    check_pairs,
    check_query,
    list_documents,
)
from bge_rerank_adapters.errors import InputTypeError
from bge_rerank_adapters.settings.token_limits import NO_TOKEN_LIMITS, TokenLimits


@dataclass(frozen=True, slots=True)
class Request:
    """A query and its documents, checked, with the options of the call that scoring needs.

    Attributes:
        query: The query's text.
        texts: The documents' texts.
        documents: The documents as they were given; `None` if they are the texts.
        token_limits: How many tokens of them are read.
    """

    query: str
    texts: list[str]
    documents: list[Any] | None = None
    token_limits: TokenLimits = NO_TOKEN_LIMITS

    @classmethod
    def checked(
        cls, query: object, documents: object, token_limits: TokenLimits = NO_TOKEN_LIMITS
    ) -> Self:
        """Return a request for a query and its documents.

        Raises:
            InputTypeError: The query is not a `str`, or a document has no text.
        """
        query, given = check_query(query), list_documents(documents)
        return cls(query, check_documents(given), given, token_limits)

    @classmethod
    def checked_pairs(
        cls, pairs: object, token_limits: TokenLimits = NO_TOKEN_LIMITS
    ) -> list[Self]:
        """Return a request of one document for each (query, document) pair.

        Raises:
            InputTypeError: The pairs are not a list, or one of them is not a `str` and a document.
        """
        return [cls(query, [text], token_limits=token_limits) for query, text in check_pairs(pairs)]

    def document(self, index: int) -> Any:
        """Return a document as it was given."""
        return self.texts[index] if self.documents is None else self.documents[index]


class Requests:
    """Requests, each checked when it is read. They have a length if their source has one."""

    def __init__(self, requests: object, token_limits: TokenLimits = NO_TOKEN_LIMITS) -> None:
        """Take an iterable of (query, documents) tuples, and how many tokens of them are read.

        Raises:
            InputTypeError: It is not such an iterable. Later, while it is read: a request is not
                a query and documents; the message gives its position.
        """
        check_ordered(requests, name="requests", wanted="a list of (query, documents) tuples")
        if isinstance(requests, str | bytes) or not isinstance(requests, Iterable):
            raise InputTypeError(
                "requests must be (query, documents) tuples, got "
                f"{type(requests).__name__}; use rerank for a single query."
            )
        self._requests, self._token_limits = requests, token_limits

    def __len__(self) -> int:
        """Return the number of requests.

        Raises:
            TypeError: Their source has no length.
        """
        return len(self._requests)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Request]:
        """Check each request as it is read."""
        for position, request in enumerate(self._requests):
            with _named(position):
                if isinstance(request, str | bytes) or not isinstance(request, Sequence):
                    raise InputTypeError(
                        f"must be a (query, documents) tuple, got {type(request).__name__}."
                    )
                if len(request) != 2:
                    raise InputTypeError(
                        f"must be a (query, documents) tuple, got {len(request)} items."
                    )
                checked = Request.checked(request[0], request[1], self._token_limits)
            yield checked


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring requests that are scored together.

    Attributes:
        first: Position of its first request among all.
        requests: At least one.
    """

    first: int
    requests: list[Request]

    def name(self, index: int) -> str:
        """Return the name in errors of the pair at an index within the piece."""
        for number, request in enumerate(self.requests, self.first):
            if index < len(request.texts):
                return f"requests[{number}], documents[{index}]"
            index -= len(request.texts)
        raise IndexError(index)


def pieces(requests: Iterable[Request], *, max_pairs: int) -> Iterator[Piece]:
    """Yield the requests in pieces, each ended as soon as it has `max_pairs` pairs."""
    first = pairs = 0
    piece: list[Request] = []
    for request in requests:
        piece.append(request)
        pairs += len(request.texts)
        if pairs >= max_pairs:
            yield Piece(first, piece)
            first += len(piece)
            piece, pairs = [], 0
    if piece:
        yield Piece(first, piece)


@contextmanager
def _named(position: int) -> Generator[None, None, None]:
    try:
        yield
    except InputTypeError as error:
        raise InputTypeError(f"requests[{position}]: {error}") from error
