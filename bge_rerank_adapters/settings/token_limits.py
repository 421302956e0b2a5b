"""How much of its texts one call reads: `max_document_tokens` and the like, checked here."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypedDict, TypeVar

from bge_rerank_adapters.settings import checks
from bge_rerank_adapters.settings.options import check_options, keyword, with_keywords

F = TypeVar("F", bound=Callable[..., Any])
_CHECK = checks.optional(checks.count)


class TokenOptions(TypedDict, total=False):
    """The limits as a call takes them; `None` is the model's own limit."""

    max_document_tokens: int | None
    max_query_tokens: int | None
    max_pair_tokens: int | None


@dataclass(frozen=True, slots=True)
class TokenLimits:
    """Most tokens that one call reads of its texts; more than the model reads changes nothing.

    Attributes:
        max_document_tokens: Of a document, without the instruction that the model puts before it.
        max_query_tokens: Of the query, likewise.
        max_pair_tokens: Of a pair, counted as the engine's `max_length` is; the query gets three
            quarters of them at most.
    """

    max_document_tokens: int | None = None
    max_query_tokens: int | None = None
    max_pair_tokens: int | None = None

    def __post_init__(self) -> None:
        """Make all of them plain numbers.

        Raises:
            SettingsError: One is no whole number of at least 1.
        """
        for each in fields(self):
            object.__setattr__(self, each.name, _CHECK(each.name, getattr(self, each.name)))

    @classmethod
    def of_call(cls, method: Callable[..., Any], options: TokenOptions) -> "TokenLimits":
        """Return the limits that were given to a method which `takes_token_limits`.

        Raises:
            TypeError: Something else was given; the message says what it is called here.
            SettingsError: One is no whole number of at least 1.
        """
        if not options:
            return NO_TOKEN_LIMITS
        check_options(method, options)
        return cls(**options)

    def given(self) -> dict[str, int]:
        """Return those that are set, by their names."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


NO_TOKEN_LIMITS = TokenLimits()


def takes_token_limits(method: F) -> F:
    """List the limits in the signature of a method that takes them as `**tokens`.

    `inspect` and notebooks show them; type checkers read `**tokens: Unpack[TokenOptions]`.
    """
    added = [
        keyword(each.name, default=None, annotation=int | None) for each in fields(TokenLimits)
    ]
    signature = with_keywords(method, added, instead_of="tokens")
    method.__signature__ = signature  # type: ignore[attr-defined]
    return method
