"""Limits of a ranking: `top_k` and `score_threshold`."""

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

from bge_rerank_adapters.errors import SettingsError

N = TypeVar("N", int, float)


class HasScore(Protocol):
    """Anything with a score."""

    @property
    def score(self) -> float:
        """In [0, 1]."""
        ...


ScoredT = TypeVar("ScoredT", bound=HasScore)


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of a ranking is returned.

    Attributes:
        top_k: Maximum number of results; `None` is all.
        score_threshold: Lowest score to keep, in [0, 1], inclusive; `None` keeps all.
    """

    top_k: int | None = None
    score_threshold: float | None = None

    def __post_init__(self) -> None:
        """Check and normalise both.

        Raises:
            SettingsError: One of them is out of range.
        """
        object.__setattr__(self, "top_k", check_top_k(self.top_k))
        object.__setattr__(self, "score_threshold", _check_score_threshold(self.score_threshold))

    def keep(self, best_first: Iterable[ScoredT]) -> Iterator[ScoredT]:
        """Yield the results that are within the limits: threshold first, then `top_k`.

        Args:
            best_first: All results, highest score first; read only as far as needed.
        """
        for each in islice(best_first, self.top_k):
            if self.score_threshold is not None and each.score < self.score_threshold:
                return
            yield each

    def to_dict(self) -> dict[str, Any]:
        """Return the limits as keyword arguments of `rerank`, which are JSON values."""
        return asdict(self)


def check_top_k(top_k: object, *, name: str = "top_k") -> int | None:
    """Return `top_k` as an `int` of at least 1, or `None` for all documents.

    Raises:
        SettingsError: It is neither `None` nor a whole number of at least 1.
    """
    if top_k is None:
        return None
    number = _number(top_k, operator.index, described=f"{name} must be a whole number or None")
    if number < 1:
        raise SettingsError(f"{name} must be at least 1, got {number}; None returns all documents.")
    return number


def _check_score_threshold(threshold: object) -> float | None:
    """Return the threshold as a `float` in [0, 1], or `None` for no threshold.

    Raises:
        SettingsError: It is neither `None` nor a number in [0, 1].
    """
    if threshold is None:
        return None
    number = _number(
        threshold, float, described="score_threshold must be a number from 0 to 1 or None"
    )
    if not 0.0 <= number <= 1.0:
        raise SettingsError(
            f"score_threshold must be from 0 to 1, got {number}; it is compared with the score, "
            "sigmoid(logit), not with the logit."
        )
    return number


def _number(value: Any, convert: Callable[[Any], N], *, described: str) -> N:
    """Return `convert(value)` of a number; texts, booleans and arrays are refused.

    Raises:
        SettingsError: It is not a number; the message begins with `described`.
    """
    cause: Exception | None = None
    one = not isinstance(value, bool) and getattr(value, "shape", ()) == ()
    if one and (hasattr(value, "__index__") or hasattr(value, "__float__")):
        try:
            return convert(value)
        except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            cause = error
    raise SettingsError(f"{described}, got {value!r}.") from cause
