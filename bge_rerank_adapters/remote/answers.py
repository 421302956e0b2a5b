"""Parses and checks the answer of a rerank server."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bge_rerank_adapters.calls.ranking import PairScore, ScoredRequest, Usage, sigmoid
from bge_rerank_adapters.calls.requests import Request
from bge_rerank_adapters.errors import RemoteError

# Maximum length of a server's text in an error.
SHOWN_CHARACTERS = 300
# How far float32 rounding may move a score out of [0, 1].
_ROUNDING = 1e-6
# Larger numbers are not taken as a count of tokens.
_MAX_TOKENS = 1 << 53


@dataclass(frozen=True, slots=True)
class RemoteScore:
    """A server's result for one document.

    Attributes:
        index: Index of the document in the request.
        score: Its score; `truncated`, `query_truncated` and `span` only if the server states them.
    """

    index: int
    score: PairScore


@dataclass(frozen=True, slots=True)
class RemoteScores:
    """A server's results for n documents.

    Attributes:
        scores: The n results, in the server's order.
        tokens: Number of tokens that the server states; `None` if it states none.
    """

    scores: list[RemoteScore]
    tokens: int | None = None

    def joined(self, rest: "RemoteScores", *, start: int) -> "RemoteScores":
        """Return these and the results for further documents, whose indexes begin at `start`."""
        tokens = None
        if self.tokens is not None and rest.tokens is not None:
            tokens = self.tokens + rest.tokens
        moved = [RemoteScore(start + each.index, each.score) for each in rest.scores]
        return RemoteScores(self.scores + moved, tokens)


def read_answer(body: bytes, *, documents: int, scale: str, server: str) -> RemoteScores:
    """Return a server's results for n documents.

    Args:
        body: A list of `{"index", "score"}`, as text-embeddings-inference and SGLang answer, or an
            object with a list of `{"index", "relevance_score"}` under `results` (Cohere, Jina,
            vLLM, infinity, llama.cpp) or `data` (older infinity). A `logit` beside the score is
            kept. Tokens are read from `usage` (most of them), `meta.tokens` (Cohere) or
            each row's `meta_info` (SGLang).
        documents: n.
        scale: `"logit"` if the numbers are logits, `"score"` if they are in [0, 1].
        server: The server's address, for errors.

    Raises:
        RemoteError: The body is none of these, an index is missing, repeated or out of range, or a
            number is not finite or not in [0, 1].
    """
    answer, rows = _rows(body, server)
    scores = [_remote_score(row, scale=scale, server=server) for row in rows]
    if len({each.score.logit is None for each in scores}) > 1:
        raise RemoteError(f"{server} answered with logits for only some documents.")
    _check_indexes([each.index for each in scores], documents, server)
    return RemoteScores(scores, _tokens(answer, rows))


def _rows(body: bytes, server: str) -> tuple[Any, list[Any]]:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RemoteError(
            f"{server} answered without JSON: {shortened(body)}; "
            "is it the address of a rerank server?"
        ) from error
    rows = answer
    if isinstance(answer, dict):
        rows = answer.get("results", answer.get("data"))
    if not isinstance(rows, list):
        raise RemoteError(
            f"{server} answered without a list of results: {shortened(body)}; "
            "is it the address of a rerank server, and api= its kind?"
        )
    return answer, rows


def _tokens(answer: object, rows: list[Any]) -> int | None:
    """Return the number of tokens; `None` for 0, which some servers state without counting."""
    stated = (
        _number_at(answer, "usage", "prompt_tokens")
        or _number_at(answer, "usage", "total_tokens")
        or _number_at(answer, "meta", "tokens", "input_tokens")
    )
    if stated is None and rows:
        each = [_number_at(row, "meta_info", "prompt_tokens") for row in rows]
        stated = None if None in each else sum(filter(None, each))
    return stated


def _number_at(value: object, *names: str) -> int | None:
    """Return the positive integer at this path, if any; Cohere writes it as 12.0."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if 1 <= value <= _MAX_TOKENS else None


def _remote_score(row: object, *, scale: str, server: str) -> RemoteScore:
    if not isinstance(row, dict):
        raise _wrong(server, row, "is not an object with an index and a score")
    index = row.get("index")
    if not isinstance(index, int) or isinstance(index, bool):
        raise _wrong(server, row, "has no index")
    logit, number = row.get("logit"), row.get("relevance_score", row.get("score"))
    if logit is None and scale == "logit":
        logit, number = number, None
    if logit is not None:
        logit = _finite(logit, row, server)
        score = sigmoid(logit) if number is None else _finite(number, row, server)
    else:
        score = _finite(number, row, server)
    if not -_ROUNDING <= score <= 1 + _ROUNDING:
        raise _wrong(
            server,
            row,
            'has a score outside [0, 1]; if the server gives logits, give api="jina", '
            'scale="logit" (or api="llamacpp" or "sglang", if it is one)',
        )
    return RemoteScore(
        index,
        PairScore(
            min(max(score, 0.0), 1.0),
            logit,
            truncated=row.get("truncated") is True,
            span=_span(row.get("span")),
            query_truncated=row.get("query_truncated") is True,
        ),
    )


def _finite(number: object, row: object, server: str) -> float:
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise _wrong(server, row, "has no number for a score")
    try:
        value = float(number)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise _wrong(server, row, "has a score that is not finite")
    return value


def _span(value: object) -> tuple[int, int] | None:
    if isinstance(value, list) and len(value) == 2 and all(type(each) is int for each in value):
        return value[0], value[1]
    return None


def _check_indexes(indexes: Sequence[int], documents: int, server: str) -> None:
    seen: set[int] = set()
    for index in indexes:
        if not 0 <= index < documents:
            raise RemoteError(
                f"{server} answered with index {index} for a request of {documents} documents."
            )
        if index in seen:
            raise RemoteError(f"{server} answered with index {index} twice.")
        seen.add(index)
    if len(seen) < documents:
        missing = next(each for each in range(documents) if each not in seen)
        raise RemoteError(
            f"{server} answered with {len(seen)} results for {documents} documents, "
            f"without index {missing}; all scores were asked for."
        )


def _wrong(server: str, row: object, what: str) -> RemoteError:
    return RemoteError(f"{server} answered with a result that {what}: {shortened(repr(row))}")


def shortened(text: str | bytes) -> str:
    """Return the beginning of a server's text, on one line."""
    if isinstance(text, bytes):
        text = text[: 4 * SHOWN_CHARACTERS].decode("utf-8", errors="replace")
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]} ..."


class DistinctRequest:
    """A request whose identical documents are sent once, and the results so far.

    Attributes:
        request: The query and its n documents.
        distinct: The distinct documents, in order of first occurrence.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        indexes: dict[str, list[int]] = {}
        for index, text in enumerate(request.texts):
            indexes.setdefault(text, []).append(index)
        self.distinct = list(indexes)
        self._indexes = list(indexes.values())
        self._results = RemoteScores([], 0)

    def parts(self, max_documents: int) -> Iterator[tuple[int, list[str]]]:
        """Yield parts of the distinct documents, each with the index at which it begins."""
        for start in range(0, len(self.distinct), max_documents):
            yield start, self.distinct[start : start + max_documents]

    def add(self, results: RemoteScores, *, start: int) -> None:
        """Store the results for the part that begins at an index."""
        self._results = self._results.joined(results, start=start)

    def scored(self) -> ScoredRequest:
        """Return the scores of the n documents; equal ones keep the server's order."""
        results = self._results
        scores = {
            index: each.score for each in results.scores for index in self._indexes[each.index]
        }
        return ScoredRequest(
            self.request,
            [scores[index] for index in range(len(scores))],
            order=list(scores),
            usage=None if results.tokens is None else Usage(tokens=results.tokens),
        )
