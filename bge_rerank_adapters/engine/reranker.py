"""`Reranker`: the scoring engine under all adapters."""

import logging
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import islice
from typing import NamedTuple, TypeVar, Unpack

from bge_rerank_adapters.calls.base import BaseReranker
from bge_rerank_adapters.calls.ranking import PairScore, ScoredRequest, Usage, sigmoid
from bge_rerank_adapters.calls.requests import Piece, Request, pieces
from bge_rerank_adapters.calls.runner import AsyncRunner, Call, Reservations, Step, advance
from bge_rerank_adapters.engine.checkpoints.hub import find_folder
from bge_rerank_adapters.engine.models.base import Model, launch_of
from bge_rerank_adapters.engine.models.causal.readout import LayerLogits
from bge_rerank_adapters.engine.models.cpu.threads import settle_threads
from bge_rerank_adapters.engine.models.device_faults import check_usable
from bge_rerank_adapters.engine.models.devices import resolve_device
from bge_rerank_adapters.engine.models.loading import (
    load_models,
    load_pair_tokenizer,
    read_checkpoint,
)
from bge_rerank_adapters.engine.models.reading import Read, Reading, Readings
from bge_rerank_adapters.engine.queue.backlog import Logits
from bge_rerank_adapters.engine.queue.core import ScoringCore
from bge_rerank_adapters.engine.queue.packs import Job
from bge_rerank_adapters.engine.stats import EngineStats
from bge_rerank_adapters.engine.text.pairs import TokenizedPairs, TokenPair
from bge_rerank_adapters.engine.text.parts import Part, parts_of
from bge_rerank_adapters.errors import ScoringError
from bge_rerank_adapters.settings import EngineOptions, EngineSettings
from bge_rerank_adapters.settings.options import check_options, shows_options
from bge_rerank_adapters.settings.token_limits import NO_TOKEN_LIMITS

# How many pairs of a long run of requests are tokenised and queued at a time, and how many such
# pieces are under way: one is scored while the next is tokenised.
_PIECE_PAIRS = 4096
_PIECES_UNDER_WAY = 2
# From here on a call's tokenising counts as long: it takes a tenth of a second or more.
_LONG_CALL_CHARACTERS = 250_000

T = TypeVar("T")
_Scored = tuple[list[PairScore], Usage]
# Pairs of a part of a large call: on a large GPU they are a fifth of a second, and are tokenised in
# a part of that.
_PART_PAIRS = 512

_log = logging.getLogger(__name__)


class _Submitted(NamedTuple):
    """A part of a call that waits for its logits."""

    part: Part
    tokenized: TokenizedPairs
    job: Job[TokenPair]


class Reranker(BaseReranker[EngineSettings]):
    """Scores how well documents answer a query with a BGE reranker, on this machine.

    Safe to use from many threads and event loops at once: all calls feed one queue, and pairs of
    different calls share packs. Close it, or use it as a context manager, to free its memory; an
    engine that is merely dropped is freed as well.

    Attributes:
        settings: The settings it was made with.

    Example:
        ```python
        from bge_rerank_adapters import Reranker

        with Reranker("tiny") as reranker:
            for result in reranker.rerank("Who wrote Faust?", ["Goethe did.", "It rains."]):
                print(result.index, result.score, result.text)
        ```
    """

    settings: EngineSettings

    @shows_options(EngineOptions)
    def __init__(self, model: str = EngineSettings.model, **options: Unpack[EngineOptions]) -> None:
        """Check the settings and load the weights.

        Args:
            model: A folder, a name on the hub, or `"tiny"` for the bundled checkpoint.
            **options: The engine's settings by their names, as `EngineSettings` describes them.

        Raises:
            TypeError: There is no setting of that name.
            SettingsError: A setting has a value that is not allowed.
            CheckpointError: The checkpoint cannot be found or used.
            DeviceError: The device is not there, has too little memory, or cannot be used by this
                process any more.
        """
        check_options(Reranker, options)
        self._set_up(EngineSettings(model=model, **options))

    def _set_up(self, settings: EngineSettings) -> None:
        begin = time.monotonic()
        devices = [resolve_device(name) for name in settings.devices]
        for device in devices:
            check_usable(device)
        folder = find_folder(settings)
        checkpoint = read_checkpoint(folder, settings)
        tokenizer = self._tokenizer = load_pair_tokenizer(checkpoint, settings)
        self.readings = Readings(checkpoint, settings, tokenizer)
        models = _in_fresh_thread(
            lambda: load_models(checkpoint, settings, tokenizer=tokenizer, devices=devices)
        )
        self.settings = settings.without_token()
        self.device = ", ".join(str(model.device) for model in models)
        self.dtype = _dtype_names(models)
        self._core = ScoringCore(
            models,
            max_queued_pairs=settings.max_queued_pairs,
            pack_tokens=settings.pack_tokens if isinstance(settings.pack_tokens, int) else None,
        )
        self.pack_tokens = max(worker.budget for worker in self._core.workers)
        runs_ahead = any(launch_of(model) for model in models)
        self._part_pairs = _PART_PAIRS if runs_ahead else sys.maxsize
        self._runner = AsyncRunner()
        # Taken by the first call whose query is cut, and never given back.
        self._cut_query_warning = threading.Lock()
        self._finalizer = weakref.finalize(self, _let_go, self._core, self._runner)
        # At exit the core's own hook waits for its threads, which this must not overtake.
        self._finalizer.atexit = False
        _log.info("Loaded %r in %.1f s", self, time.monotonic() - begin)

    @property
    def closed(self) -> bool:
        """Whether it scores no more, since it has been closed, or was made before a fork."""
        return self._core.closed

    def pair_logits(
        self, pairs: Iterable[tuple[str, str]], reading: Reading
    ) -> list[tuple[float, ...]]:
        """Return the logits of (query, document) pairs, read as this one call asks for.

        For drop-ins of libraries that take at every call what are an engine's settings here.

        Returns:
            For each pair, in input order, the logit of each layer that is read; one alone where
            the call names no layers.

        Raises:
            InputTypeError: A pair is not two `str`; the message names which.
            SettingsError: The lengths leave no room for a document, or the model does not have a
                layer.
            RerankError: As `rerank`.
        """
        requests, read = Request.checked_pairs(pairs), self.readings.reader(reading)
        scores, _ = self._run(
            lambda reservations: self._score_together(
                requests, reservations, name=lambda index: f"pairs[{index}]", read=read
            )
        )
        return [_layers(each.logit) for each in scores if each.logit is not None]

    def warm_up(self) -> None:
        """Run the model once, so that the first query does not wait for kernels to be chosen.

        Each device runs its copy, in all threads that will run pairs of calls.

        Raises:
            ScoringError: The model failed.
            ClosedError: The engine has been closed.
        """
        self._core.check_open()
        self._core.tally.add_requests(1)
        self._core.warm_up(self._tokenize([("warm-up", "warm-up " * 64)]).distinct[0])

    def stats(self) -> EngineStats:
        """Return what the engine has done since it was loaded; cheap, and good to ask at any time.

        Example:
            ```python
            from bge_rerank_adapters import Reranker

            with Reranker("tiny") as reranker:
                reranker.rerank("Who wrote Faust?", ["Goethe did.", "It rains."])
                print(reranker.stats().to_dict())
            ```
        """
        return self._core.stats()

    def close(self) -> None:
        """Free the model; calls under way and later ones raise `ClosedError`. May be repeated.

        Waits for the pack that is in the model at this moment.
        """
        first = not self.closed
        self._finalizer.detach()
        self._core.close()
        self._runner.close()
        if first:
            _log.info("Closed %r", self)

    def __repr__(self) -> str:
        """Name the model, device and dtype in use."""
        state = ", closed" if self.closed else ""
        return f"Reranker({self.settings.model!r}, device={self.device}, dtype={self.dtype}{state})"

    def _check_open(self) -> None:
        self._core.check_open()

    def _async_runner(self) -> AsyncRunner:
        return self._runner

    def _is_long(self, request: Request) -> bool:
        return sum(map(len, request.texts)) > _LONG_CALL_CHARACTERS

    def _score(
        self, request: Request, reservations: Reservations, *, bounded: bool = True
    ) -> Call[ScoredRequest]:
        scores, usage = yield from self._score_together(
            [request], reservations, name=lambda index: f"documents[{index}]", bounded=bounded
        )
        return ScoredRequest(request, scores, usage=usage)

    def _score_pairs(
        self, requests: list[Request], reservations: Reservations
    ) -> Call[list[PairScore]]:
        scores, _ = yield from self._score_together(
            requests, reservations, name=lambda index: f"pairs[{index}]"
        )
        return scores

    def _score_many(
        self,
        requests: Iterable[Request],
        reservations: Reservations,
        *,
        finish: Callable[[ScoredRequest], None],
    ) -> Call[None]:
        # A quarter of the queue each, so that the two under way leave other callers half of it.
        size = min(_PIECE_PAIRS, max(1, self.settings.max_queued_pairs // 4))
        coming = pieces(requests, max_pairs=size)
        under_way: deque[tuple[Piece, Call[_Scored], Step]] = deque()
        while True:
            for piece in islice(coming, _PIECES_UNDER_WAY - len(under_way)):
                call = self._score_piece(piece, reservations)
                under_way.append((piece, call, _begin(call)))
            if not under_way:
                return
            piece, call, step = under_way.popleft()
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
        read: Read | None = None,
    ) -> Call[_Scored]:
        """Tokenise, queue, wait, and return the scores in the order of the pairs, and the usage.

        Args:
            requests: n pairs in all; may be none.
            reservations: Holds the room in the queue.
            name: What an error calls the pair at an index.
            counted: As how many requests they count.
            bounded: Whether the call may be refused because too many pairs wait.
            read: Tokenises the pairs; `None` is by the engine's settings and the call's limits.
        """
        read = read or self._reader(requests)
        pairs = [(request.query, text) for request in requests for text in request.texts]
        future: Logits = Future()
        if pairs:
            self._core.reserve(reservations.hold(future), len(pairs), bounded=bounded)
        self._core.tally.add_requests(counted)
        if not pairs:
            return [], Usage(tokens=0)
        begin = time.perf_counter()
        submitted = yield from self._submit(pairs, future, reservations, name=name, read=read)
        queued, waited_s = time.perf_counter(), 0.0
        scores: dict[tuple[str, str], PairScore] = {}
        for part, tokenized, job in submitted:
            logits = yield job.future
            scores |= zip(part.pairs, _pair_scores(tokenized, logits), strict=True)
            waited_s = waited_s or job.waited_s
        usage = Usage(
            tokens=sum(len(pair) for _, _, job in submitted for pair in job.pairs),
            tokenizing_s=queued - begin,
            waiting_s=waited_s,
            scoring_s=max(0.0, time.perf_counter() - queued - waited_s),
        )
        return [scores[pair] for pair in pairs], usage

    def _submit(
        self,
        pairs: Sequence[tuple[str, str]],
        future: Logits,
        reservations: Reservations,
        *,
        name: Callable[[int], str],
        read: Read,
    ) -> Call[list[_Submitted]]:
        """Tokenise and queue pairs; a large call's in parts, where a device runs ahead.

        Args:
            pairs: n >= 1 pairs.
            future: Has room for all of them.
            reservations: Holds the room in the queue.
            name: What an error calls the pair at an index.
            read: Tokenises pairs.
        """
        parts = parts_of(pairs, self._part_pairs)
        left = sum(len(part.pairs) for part in parts)
        submitted = []
        for part in parts:
            yield None
            tokenized = self._tokenize(part.pairs, read)
            if read == self._tokenizer.tokenize:
                self._warn_of_cut_query(tokenized)
            job = Job(tokenized.distinct, future, part.name(name))
            submitted.append(_Submitted(part, tokenized, job))
            left -= len(part.pairs)
            if left:
                # The room of those to come, before the job gives up what it does not need.
                future = Future()
                self._core.reserve(reservations.hold(future), left, bounded=False)
            self._core.submit(job)
        return submitted

    def _warn_of_cut_query(self, tokenized: TokenizedPairs) -> None:
        """Log the first query that is cut: queries that differ in what is cut off score alike."""
        cut = any(pair.query_truncated for pair in tokenized.distinct)
        if cut and self._cut_query_warning.acquire(blocking=False):
            _log.warning(
                "A query is longer than query_max_length (%d tokens) and is cut; results say so as "
                "query_truncated. Raise query_max_length, or keep a query's end with "
                'query_truncation_side="left". This is logged once for %r.',
                self._tokenizer.query_max_length,
                self,
            )

    def _reader(self, requests: Sequence[Request]) -> Read:
        """Return what tokenises the pairs of one call, which all have the same limits.

        Raises:
            SettingsError: The limits leave no room for a document.
        """
        limits = requests[0].token_limits if requests else NO_TOKEN_LIMITS
        if not limits.given():
            return self._tokenizer.tokenize
        return partial(self._tokenizer.tokenize, lengths=self._tokenizer.lengths(limits))

    def _tokenize(
        self, pairs: Sequence[tuple[str, str]], read: Read | None = None
    ) -> TokenizedPairs:
        begin = time.perf_counter()
        try:
            return (read or self._tokenizer.tokenize)(list(pairs))
        except (KeyboardInterrupt, SystemExit, ScoringError):
            raise
        except BaseException as error:  # what Rust panics with is no Exception
            raise ScoringError(
                f"The tokenizer failed on a call of {len(pairs)} pairs: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            self._core.tally.add_tokenizing(time.perf_counter() - begin)


def _in_fresh_thread(work: Callable[[], T]) -> T:
    """Return what `work` returns, done in a thread that has not used torch before.

    Torch computes with OpenMP, whose helpers a thread keeps. In a process that was forked from a
    thread that had some they are gone, and that thread would wait for them for ever; others work.
    """
    outcome: Future[T] = Future()

    def run_work() -> None:
        try:
            settle_threads()
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised to who asked
            outcome.set_exception(error)

    threading.Thread(target=run_work, name="bge-rerank-load", daemon=True).start()
    return outcome.result()


def _begin(call: Call[_Scored]) -> Step:
    """Tokenise and queue a piece, without waiting for its logits."""
    finished, value = advance(call)
    while not finished and value is None:
        finished, value = advance(call)
    return finished, value


def _finish(call: Call[_Scored], step: Step) -> Call[_Scored]:
    """Wait for what was begun."""
    finished, value = step
    while not finished:
        finished, value = advance(call, (yield value))
    return value  # type: ignore[no-any-return]


def _pair_scores(tokenized: TokenizedPairs, logits: Sequence[float]) -> list[PairScore]:
    """Return the scores of the caller's pairs from the logits of all windows that differ."""
    scores = []
    for position in tokenized.winners(logits):
        pair, logit = tokenized.distinct[position], logits[position]
        scores.append(
            PairScore(sigmoid(logit), logit, pair.truncated, pair.span, pair.query_truncated)
        )
    return scores


def _layers(logit: float) -> tuple[float, ...]:
    return logit.layers if isinstance(logit, LayerLogits) else (logit,)


def _split(piece: Piece, scores: list[PairScore]) -> Iterator[ScoredRequest]:
    end = 0
    for request in piece.requests:
        start, end = end, end + len(request.texts)
        yield ScoredRequest(request, scores[start:end])


def _dtype_names(models: Sequence[Model]) -> str:
    """Return the dtype of all models, or of each one in order where they differ."""
    names = [str(model.dtype).removeprefix("torch.") for model in models]
    return ", ".join(names) if len(set(names)) > 1 else names[0]


def _let_go(core: ScoringCore, runner: AsyncRunner) -> None:
    """Signal the threads to end; waiting for them here could block a garbage collection."""
    core.stop()
    runner.close()
