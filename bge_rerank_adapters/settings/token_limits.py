"""Token limits of one call: `max_document_tokens` and the like."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypedDict, TypeVar

from bge_rerank_adapters.settings import checks
from bge_rerank_adapters.settings.options import check_options, keyword, with_keywords

F = TypeVar("F", bound=Callable[..., Any])
_CHECK = checks.optional(checks.count)


class TokenOptions(TypedDict, total=False):
    """The limits as keyword arguments of a call; `None` is the model's own limit."""

    max_document_tokens: int | None
    max_query_tokens: int | None
    max_pair_tokens: int | None


@dataclass(frozen=True, slots=True)
class TokenLimits:
    """How many tokens of its texts one call reads; more than the model reads changes nothing.

    Attributes:
        max_document_tokens: Maximum tokens of a document, without the model's instruction.
        max_query_tokens: Maximum tokens of the query, without the model's instruction.
        max_pair_tokens: Maximum tokens of a pair, counted like the engine's `max_length`; at most
            three quarters of them are the query's.
    """

    max_document_tokens: int | None = None
    max_query_tokens: int | None = None
    max_pair_tokens: int | None = None

    def __post_init__(self) -> None:
        """Check and normalise all of them.

        Raises:
            SettingsError: One is not a whole number of at least 1.
        """
        for each in fields(self):
            object.__setattr__(self, each.name, _CHECK(each.name, getattr(self, each.name)))

    @classmethod
    def of_call(cls, method: Callable[..., Any], options: TokenOptions) -> "TokenLimits":
        """Return the limits that were given to a method decorated by `takes_token_limits`.

        Raises:
            TypeError: Another option was given; the message gives its name here, if it has one.
            SettingsError: One is not a whole number of at least 1.
        """
        if not options:
            return NO_TOKEN_LIMITS
        check_options(method, options)
        return cls(**options)

    def given(self) -> dict[str, int]:
        """Return the limits that are set, by name."""
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
