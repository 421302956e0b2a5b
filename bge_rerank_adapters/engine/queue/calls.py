"""Runs the calls of an engine: tokenises their pairs, queues them, and waits for their logits."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import islice
from typing import NamedTuple

from bge_rerank_adapters.calls.ranking import PairScore, ScoredRequest, Usage, sigmoid
from bge_rerank_adapters.calls.requests import Piece, Request, pieces
from bge_rerank_adapters.calls.runner import Call, Reservations, Step, advance
from bge_rerank_adapters.engine.models.call_settings import Tokenize
from bge_rerank_adapters.engine.queue.backlog import Logits
from bge_rerank_adapters.engine.queue.core import ScoringCore
from bge_rerank_adapters.engine.queue.packs import Job
from bge_rerank_adapters.engine.text.pairs import TokenizedPairs, TokenPair
from bge_rerank_adapters.engine.text.parts import Part, parts_of
from bge_rerank_adapters.engine.text.tokenizer import PairTokenizer
from bge_rerank_adapters.errors import ScoringError
from bge_rerank_adapters.settings.token_limits import NO_TOKEN_LIMITS

# Pairs of a piece of many requests, and how many pieces are in progress: one is scored while the
# next is tokenised.
_PIECE_PAIRS = 4096
_PIECES_IN_PROGRESS = 2

_Scored = tuple[list[PairScore], Usage]

_log = logging.getLogger(__name__)


class _Submitted(NamedTuple):
    """A part of a call that waits for its logits."""

    part: Part
    tokenized: TokenizedPairs
    job: Job[TokenPair]
    # Read before the job is queued: this thread may not run again before the job is scored.
    ready_at: float


class EngineCalls:
    """The calls of an engine, as generators for `calls.runner`; thread-safe."""

    def __init__(
        self,
        tokenizer: PairTokenizer,
        core: ScoringCore,
        *,
        max_queued_pairs: int,
        part_pairs: int,
        engine: str,
    ) -> None:
        """Take the parts of an engine.

        Args:
            tokenizer: The checkpoint's tokenizer.
            core: Scores tokenised pairs.
            max_queued_pairs: Maximum number of pairs that may wait.
            part_pairs: Maximum number of pairs of a call that are tokenised at a time; the device
                scores one part while the next is tokenised.
            engine: The engine's name in the log.
        """
        self._tokenizer, self._core = tokenizer, core
        self._max_queued_pairs, self._part_pairs = max_queued_pairs, part_pairs
        self._engine = engine
        # Acquired by the first call whose query is cut, and never released.
        self._cut_query_warning = threading.Lock()

    def score(
        self, request: Request, reservations: Reservations, *, bounded: bool = True
    ) -> Call[ScoredRequest]:
        """Score the documents of one request; errors call them `documents[...]`."""
        scores, usage = yield from self._score_together(
            [request], reservations, name=lambda index: f"documents[{index}]", bounded=bounded
        )
        return ScoredRequest(request, scores, usage=usage)

    def score_pairs(
        self,
        requests: Sequence[Request],
        reservations: Reservations,
        *,
        tokenize: Tokenize | None = None,
    ) -> Call[list[PairScore]]:
        """Score the only document of each request; errors call them `pairs[...]`.

        Args:
            requests: May be empty.
            reservations: Holds the room in the queue.
            tokenize: Tokenises the pairs; `None` follows the engine's settings and the call's
                limits.
        """
        scores, _ = yield from self._score_together(
            requests, reservations, name=lambda index: f"pairs[{index}]", tokenize=tokenize
        )
        return scores

    def score_many(
        self,
        requests: Iterable[Request],
        reservations: Reservations,
        *,
        finish: Callable[[ScoredRequest], None],
    ) -> Call[None]:
        """Score requests, read as needed, and call `finish` with each, in order."""
        # A quarter of the queue each, so that two pieces leave other callers half of it.
        size = min(_PIECE_PAIRS, max(1, self._max_queued_pairs // 4))
        coming = pieces(requests, max_pairs=size)
        in_progress: deque[tuple[Piece, Call[_Scored], Step]] = deque()
        while True:
            for piece in islice(coming, _PIECES_IN_PROGRESS - len(in_progress)):
                call = self._score_piece(piece, reservations)
                in_progress.append((piece, call, _begin(call)))
            if not in_progress:
                return
            piece, call, step = in_progress.popleft()
            scores, _ = yield from _finish(call, step)
            for scored in _split(piece, scores):
                finish(scored)

    def _score_piece(self, piece: Piece, reservations: Reservations) -> Call[_Scored]:
        return self._score_together(
            piece.requests,
            reservations,
            name=piece.name,
            counted=len(piece.requests),
            bounded=False,
        )

    def _score_together(
        self,
        requests: Sequence[Request],
        reservations: Reservations,
        *,
        name: Callable[[int], str],
        counted: int = 1,
        bounded: bool = True,
        tokenize: Tokenize | None = None,
    ) -> Call[_Scored]:
        """Tokenise pairs, queue them, wait, and return their scores in order, and the usage.

        Args:
            requests: n pairs in all; may be none.
            reservations: Holds the room in the queue.
            name: Returns the name in errors of the pair at an index.
            counted: How many requests to add to the statistics.
            bounded: Whether the call is refused while too many pairs wait.
            tokenize: As for `score_pairs`.
        """
        tokenize = tokenize or self._tokenize_by_limits(requests)
        pairs = [(request.query, text) for request in requests for text in request.texts]
        future: Logits = Future()
        if pairs:
            self._core.reserve(reservations.hold(future), len(pairs), bounded=bounded)
        self._core.tally.add(requests=counted)
        if not pairs:
            return [], Usage(tokens=0)
        begin = time.perf_counter()
        submitted = yield from self._submit(
            pairs, future, reservations, name=name, tokenize=tokenize
        )
        scores = yield from _collect(submitted)
        ready_at, jobs = submitted[-1].ready_at, [each.job for each in submitted]
        waited_s = next((job.waited_s for job in jobs if job.waited_s), 0.0)
        usage = Usage(
            tokens=sum(len(pair) for job in jobs for pair in job.pairs),
            tokenizing_s=ready_at - begin,
            waiting_s=waited_s,
            scoring_s=max(0.0, time.perf_counter() - ready_at - waited_s),
        )
        return [scores[pair] for pair in pairs], usage

    def _submit(
        self,
        pairs: Sequence[tuple[str, str]],
        future: Logits,
        reservations: Reservations,
        *,
        name: Callable[[int], str],
        tokenize: Tokenize,
    ) -> Call[list[_Submitted]]:
        """Tokenise and queue the pairs of a call, in parts of `part_pairs` pairs.

        Args:
            pairs: n >= 1 pairs.
            future: The reservation of all of them.
            reservations: Holds the reservations of the remaining parts.
            name: Returns the name in errors of the pair at an index.
            tokenize: Tokenises pairs.
        """
        parts = parts_of(pairs, self._part_pairs)
        left = sum(len(part.pairs) for part in parts)
        submitted = []
        for part in parts:
            yield None
            tokenized = self.tokenize(part.pairs, tokenize)
            if tokenize == self._tokenizer.tokenize:
                self._warn_of_cut_query(tokenized)
            job = Job(tokenized.distinct, future, part.name(name))
            submitted.append(_Submitted(part, tokenized, job, time.perf_counter()))
            left -= len(part.pairs)
            if left:
                # Reserve for the remaining parts before the job releases this reservation.
                future = Future()
                self._core.reserve(reservations.hold(future), left, bounded=False)
            self._core.submit(job)
        return submitted

    def _warn_of_cut_query(self, tokenized: TokenizedPairs) -> None:
        """Log the first query that is cut, since queries that differ only there score alike."""
        cut = any(pair.query_truncated for pair in tokenized.distinct)
        if cut and self._cut_query_warning.acquire(blocking=False):
            _log.warning(
                "A query is longer than query_max_length (%d tokens) and is cut; results say so as "
                "query_truncated. Raise query_max_length, or keep a query's end with "
                'query_truncation_side="left". This is logged once for %s.',
                self._tokenizer.query_max_length,
                self._engine,
            )

    def _tokenize_by_limits(self, requests: Sequence[Request]) -> Tokenize:
        """Return the function that tokenises the pairs of a call, which all have the same limits.

        Raises:
            SettingsError: The limits leave no room for a document.
        """
        limits = requests[0].token_limits if requests else NO_TOKEN_LIMITS
        if not limits.given():
            return self._tokenizer.tokenize
        return partial(self._tokenizer.tokenize, lengths=self._tokenizer.lengths(limits))

    def tokenize(
        self, pairs: Sequence[tuple[str, str]], tokenize: Tokenize | None = None
    ) -> TokenizedPairs:
        """Return the token ids of pairs, and count the time.

        Raises:
            ScoringError: The tokenizer failed.
        """
        begin = time.perf_counter()
        try:
            return (tokenize or self._tokenizer.tokenize)(list(pairs))
        except (KeyboardInterrupt, SystemExit, ScoringError):
            raise
        except BaseException as error:  # a Rust panic is not an Exception
            raise ScoringError(
                f"The tokenizer failed on a call of {len(pairs)} pairs: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            self._core.tally.add(tokenizing_s=time.perf_counter() - begin)


def _begin(call: Call[_Scored]) -> Step:
    """Run a call until it waits for its logits."""
    finished, value = advance(call)
    while not finished and value is None:
        finished, value = advance(call)
    return finished, value


def _finish(call: Call[_Scored], step: Step) -> Call[_Scored]:
    """Wait for a call that `_begin` has started."""
    finished, value = step
    while not finished:
        finished, value = advance(call, (yield value))
    return value  # type: ignore[no-any-return]


def _collect(submitted: Sequence[_Submitted]) -> Call[dict[tuple[str, str], PairScore]]:
    """Wait for the logits of all parts of a call, and return the scores of its distinct pairs."""
    scores: dict[tuple[str, str], PairScore] = {}
    for part, tokenized, job, _ in submitted:
        logits = yield job.future
        scores |= zip(part.pairs, _pair_scores(tokenized, logits), strict=True)
    return scores


def _pair_scores(tokenized: TokenizedPairs, logits: Sequence[float]) -> list[PairScore]:
    """Return the scores of the caller's pairs, from the logits of all distinct windows."""
    scores = []
    for position in tokenized.winners(logits):
        pair, logit = tokenized.distinct[position], logits[position]
        scores.append(
            PairScore(sigmoid(logit), logit, pair.truncated, pair.span, pair.query_truncated)
        )
    return scores


def _split(piece: Piece, scores: list[PairScore]) -> Iterator[ScoredRequest]:
    end = 0
    for request in piece.requests:
        start, end = end, end + len(request.texts)
        yield ScoredRequest(request, scores[start:end])
