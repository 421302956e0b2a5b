"""Logits to ranked documents: order, threshold and top_k, in pure Python."""

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from bge_rerank_adapters.calls.display import to_html, to_records, to_text
from bge_rerank_adapters.errors import InputTypeError, SettingsError

N = TypeVar("N", int, float)


@dataclass(frozen=True, slots=True)
class RankedDocument:
    """One document of a ranking.

    Attributes:
        index: Position of the document in the input list, counted from 0.
        score: `sigmoid(logit)`, in [0, 1].
        text: The document as it was given.
        logit: The model's raw output for the pair, unbounded; what rankings are ordered by.
            `None` only where a remote server tells scores alone.
        truncated: Whether the end of the document was cut off to fit the model.
        span: With windows, the characters of the one that scored best, as (start, end) in `text`;
            of a document that needed none, all of them. `None` without windows.
    """

    index: int
    score: float
    text: str
    logit: float | None
    truncated: bool = False
    span: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one call took of the model's time.

    Attributes:
        tokens: Tokens of its pairs, special tokens included; identical pairs count once.
        tokenizing_s: Seconds spent on making token ids of its texts.
        waiting_s: Seconds from then until a pack had the first of its pairs.
        scoring_s: Seconds from then until the last of its pairs was scored.
    """

    tokens: int
    tokenizing_s: float = 0.0
    waiting_s: float = 0.0
    scoring_s: float = 0.0


class Ranking(list[RankedDocument]):
    """Ranked documents, best first: a list that shows itself.

    It renders as a table in a notebook; `print` gives plain columns.

    Attributes:
        usage: What the call took, where it was of one query alone; else `None`.
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
    """What an adapter needs of a scoring engine; `Reranker` is one."""

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


def sigmoid(logit: float) -> float:
    """Return the logistic function of a logit, in [0, 1], without overflow for any float."""
    if logit >= 0:
        return 1.0 / (1.0 + math.exp(-logit))
    power = math.exp(logit)
    return power / (1.0 + power)


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


def check_score_threshold(threshold: object, *, name: str = "score_threshold") -> float | None:
    """Return the threshold as a `float` in [0, 1], or `None` for no threshold.

    Raises:
        SettingsError: It is neither `None` nor a number in [0, 1].
    """
    if threshold is None:
        return None
    number = _number(threshold, float, described=f"{name} must be a number from 0 to 1 or None")
    if not 0.0 <= number <= 1.0:
        raise SettingsError(
            f"{name} must be from 0 to 1, got {number}; it is compared with the score, "
            "sigmoid(logit), not with the logit."
        )
    return number


def check_query(query: object) -> str:
    """Return the query as an exact `str`; an empty one is allowed.

    Raises:
        InputTypeError: It is anything else.
    """
    if not isinstance(query, str):
        raise InputTypeError(f"The query must be a str, got {_kind(query)}.")
    return _plain(query)


def check_documents(documents: object) -> list[str]:
    """Return the documents as a new list of exact `str`; an empty list is allowed.

    Raises:
        InputTypeError: They are one string instead of a list of them, cannot be iterated over,
            have no order of their own (a dict, a set, a table), or hold something other than a
            `str`, whose position the message names.
    """
    check_ordered(documents, name="documents", wanted="a list of str")
    if isinstance(documents, str | bytes | bytearray) or not isinstance(documents, Iterable):
        raise InputTypeError(
            f"documents must be a list of str, got {_kind(documents)}; "
            "wrap a single document in a list."
        )
    texts: list[str] = []
    for index, text in enumerate(documents):
        if not isinstance(text, str):
            raise InputTypeError(f"documents[{index}] must be a str, got {_kind(text)}.")
        texts.append(_plain(text))
    return texts


def check_ordered(items: object, *, name: str, wanted: str) -> None:
    """Refuse what iterates over something else than its items, in any order, or over nothing.

    An index into the results of a dict, a set or a table would point nowhere, and what was scored
    would be keys or the names of columns.

    Raises:
        InputTypeError: It is one of these.
    """
    if isinstance(items, Mapping):
        action = "give list(items.values()), or the list that is meant"
    elif isinstance(items, set | frozenset):
        action = "give a list, whose order the results' index can refer to"
    # Of the type: pandas' Series answers to the labels of its index as well.
    elif hasattr(type(items), "columns") or hasattr(type(items), "column_names"):
        action = "give one column as a list, such as df['text'].tolist()"
    # An array without dimensions has the method and yet cannot be iterated over.
    elif getattr(items, "shape", None) == ():
        action = "wrap a single item in a list"
    else:
        return
    raise InputTypeError(f"{name} must be {wanted}, got {_kind(items)}; {action}.")


def check_pairs(pairs: object) -> list[tuple[str, str]]:
    """Return (query, document) pairs as a new list of tuples; an empty list is allowed.

    Raises:
        InputTypeError: The pairs are not a list, or one of them is not two `str`.
    """
    check_ordered(pairs, name="pairs", wanted="a list of (query, document) tuples")
    if isinstance(pairs, str | bytes) or not isinstance(pairs, Iterable):
        raise InputTypeError(
            f"pairs must be a list of (query, document) tuples, got {_kind(pairs)}."
        )
    checked: list[tuple[str, str]] = []
    for index, pair in enumerate(pairs):
        if isinstance(pair, str | bytes) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise InputTypeError(
                f"pairs[{index}] must be a (query, document) tuple, got {_kind(pair)}."
            )
        for name, text in zip(("query", "document"), pair, strict=True):
            if not isinstance(text, str):
                raise InputTypeError(
                    f"The {name} of pairs[{index}] must be a str, got {_kind(text)}."
                )
        checked.append((_plain(pair[0]), _plain(pair[1])))
    return checked


def rank(
    documents: Sequence[str],
    logits: Sequence[float],
    *,
    truncated: Sequence[bool],
    spans: Sequence[tuple[int, int] | None] | None = None,
    top_k: int | None = None,
    score_threshold: float | None = None,
) -> Ranking:
    """Return the documents best first; threshold and `top_k` must have been checked.

    Args:
        documents: The n texts, in input order.
        logits: Their n logits, finite.
        truncated: For each, whether it was cut.
        spans: For each, the characters of its best window; `None` where there are no windows.
        top_k: How many to return at most; `None` is all.
        score_threshold: Lowest score to keep, inclusive; applied before `top_k`.

    Returns:
        Highest logit first, equal logits in input order; `[]` for no documents.
    """
    ranked = Ranking()
    for index in sorted(range(len(logits)), key=lambda position: -logits[position]):
        score = sigmoid(logits[index])
        if len(ranked) == top_k or (score_threshold is not None and score < score_threshold):
            break
        span = None if spans is None else spans[index]
        ranked.append(
            RankedDocument(index, score, documents[index], logits[index], truncated[index], span)
        )
    return ranked


def span_within(span: tuple[int, int] | None, *, start: int, length: int) -> list[int] | None:
    """Return a span of a scored text as one of the part of it that users know.

    Args:
        span: Characters of the scored text, or `None`.
        start: Where the part begins in the scored text.
        length: How many characters it has.

    Returns:
        `[start, end]` within the part, ready for JSON; both ends are equal where nothing of it is
        in the span. `None` for no span.
    """
    if span is None:
        return None
    return [min(max(place - start, 0), length) for place in span]


def _plain(text: str) -> str:
    """Return the characters as an exact `str`, the same object where it is one already.

    Of a class of its own a text may compare as equal to another text, and identical documents
    share a score; numpy's would come back in the results.
    """
    # Not str(text), which a class may answer with something else: an enum does, with its name.
    return text if type(text) is str else str.__str__(text)


def _number(value: Any, convert: Callable[[Any], N], *, described: str) -> N:
    """Return `convert(value)` of one number; texts, booleans and arrays of numbers are none.

    Raises:
        SettingsError: It is none; the message begins as `described`.
    """
    cause: Exception | None = None
    one = not isinstance(value, bool) and getattr(value, "shape", ()) == ()
    if one and (hasattr(value, "__index__") or hasattr(value, "__float__")):
        try:
            return convert(value)
        except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            cause = error
    raise SettingsError(f"{described}, got {value!r}.") from cause


def _kind(value: Any) -> str:
    """Name a value's type, and its text where that is short."""
    shown = repr(value)
    return type(value).__name__ if len(shown) > 40 else f"{type(value).__name__} ({shown})"
