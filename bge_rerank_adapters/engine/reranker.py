"""`Reranker`: the scoring engine under all adapters."""

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self, TypeVar, Unpack

from bge_rerank_adapters.calls.progress import ProgressBar
from bge_rerank_adapters.calls.ranking import (
    Ranking,
    Usage,
    check_pairs,
    check_score_threshold,
    check_top_k,
    rank,
    sigmoid,
)
from bge_rerank_adapters.calls.requests import Piece, Request, Requests, check_request, pieces
from bge_rerank_adapters.calls.runner import AsyncDoor, Call, Places, Step, advance, run
from bge_rerank_adapters.engine.checkpoints.hub import find_folder
from bge_rerank_adapters.engine.models.cpu.streams import settle_threads
from bge_rerank_adapters.engine.models.devices import resolve_device
from bge_rerank_adapters.engine.models.loading import (
    Model,
    load_model,
    load_pair_tokenizer,
    read_checkpoint,
)
from bge_rerank_adapters.engine.queue.backlog import Logits
from bge_rerank_adapters.engine.queue.core import ScoringCore
from bge_rerank_adapters.engine.queue.packs import Job
from bge_rerank_adapters.engine.stats import EngineStats
from bge_rerank_adapters.engine.text.tokenizer import TokenizedPairs
from bge_rerank_adapters.errors import ScoringError
from bge_rerank_adapters.settings import EngineOptions, EngineSettings
from bge_rerank_adapters.settings.options import check_options, shows_options

# How many pairs of a long run of requests are tokenised and queued at a time, and how many such
# pieces are under way: one is scored while the next is tokenised.
_PIECE_PAIRS = 4096
_PIECES_UNDER_WAY = 2
# From here on a call's tokenising counts as long: it takes a tenth of a second or more.
_LONG_CALL_CHARACTERS = 250_000

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Scored:
    """The logits of pairs in the order they were given, which were cut, and what spoke for them."""

    logits: list[float]
    truncated: list[bool]
    spans: list[tuple[int, int] | None]
    usage: Usage

    def rank(self, texts: Sequence[str], part: slice, limits: dict[str, Any]) -> Ranking:
        """Return the ranking of the documents whose pairs are those of a part."""
        return rank(
            texts,
            self.logits[part],
            truncated=self.truncated[part],
            spans=self.spans[part],
            **limits,
        )


class Reranker:
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
            DeviceError: The device is not there.
        """
        check_options(Reranker, options)
        self._load(EngineSettings(model=model, **options))

    @classmethod
    def from_settings(cls, settings: EngineSettings) -> Self:
        """Return a new engine with these settings, its weights loaded; errors as in `Reranker`."""
        engine = cls.__new__(cls)
        engine._load(settings)  # noqa: SLF001 - its own class
        return engine

    def _load(self, settings: EngineSettings) -> None:
        begin = time.monotonic()
        devices = [resolve_device(name) for name in settings.devices]
        folder = find_folder(settings)
        checkpoint = read_checkpoint(folder, settings)
        tokenizer = self._tokenizer = load_pair_tokenizer(checkpoint, settings)
        models = _in_fresh_thread(
            lambda: [
                load_model(checkpoint, settings, tokenizer=tokenizer, device=each)
                for each in devices
            ]
        )
        self.settings = settings.without_token()
        self.device = ", ".join(str(model.device) for model in models)
        self.dtype = _dtype_names(models)
        self._core = ScoringCore(
            models,
            max_queued_pairs=settings.max_queued_pairs,
            pack_tokens=settings.pack_tokens if isinstance(settings.pack_tokens, int) else None,
        )
        self._door = AsyncDoor()
        self._finalizer = weakref.finalize(self, _let_go, self._core, self._door)
        # At exit the core's own hook waits for its threads, which this must not overtake.
        self._finalizer.atexit = False
        _log.info("Loaded %r in %.1f s", self, time.monotonic() - begin)

    @property
    def closed(self) -> bool:
        """Whether it scores no more: `close` has been called, or it is of before a fork."""
        return self._core.closed

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_k: int | None = None,
        score_threshold: float | None = None,
        timeout_s: float | None = None,
    ) -> Ranking:
        """Return the documents ranked by how well they answer the query, best first.

        Args:
            query: The question; may be empty.
            documents: n texts; may be empty or repeat themselves.
            top_k: Most results to return; `None` is all.
            score_threshold: Lowest score to keep, in [0, 1], inclusive; applied before `top_k`.
            timeout_s: Seconds to wait at most; `None` is for ever.

        Returns:
            At most n `RankedDocument`, highest logit first, equal ones in input order; `[]` for no
            documents.

        Raises:
            InputTypeError: The query or a document is not a `str`.
            SettingsError: `top_k`, `score_threshold` or `timeout_s` is out of range.
            Overloaded: Too many pairs wait already.
            RerankTimeoutError: `timeout_s` ran out.
            ScoringError: The model failed, or gave NaN for a pair.
            ClosedError: The engine has been closed.
        """
        request = check_request(query, documents)
        limits = _check_limits(top_k, score_threshold)
        return run(self._rerank(request, limits, Places()), timeout_s=timeout_s)

    async def arerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_k: int | None = None,
        score_threshold: float | None = None,
        timeout_s: float | None = None,
    ) -> Ranking:
        """Return what `rerank` returns, without blocking the event loop.

        A call that is cancelled or runs out of time takes its waiting pairs out of the queue.
        """
        request = check_request(query, documents)
        limits = _check_limits(top_k, score_threshold)
        long = sum(map(len, request[1])) > _LONG_CALL_CHARACTERS
        places = Places()
        call = self._rerank(request, limits, places)
        return await self._door.run(call, places=places, timeout_s=timeout_s, long=long)

    def logits(self, query: str, documents: Sequence[str]) -> list[float]:
        """Return the documents' logits in input order: unbounded floats, `[]` for no documents.

        Raises:
            RerankError: As `rerank`.
        """
        query, texts = check_request(query, documents)
        pairs = [(query, text) for text in texts]
        return run(self._score(pairs, Places(), name=_document)).logits

    def score(self, query: str, documents: Sequence[str]) -> list[float]:
        """Return the documents' scores in input order: in [0, 1], `[]` for no documents.

        Raises:
            RerankError: As `rerank`.
        """
        return [sigmoid(logit) for logit in self.logits(query, documents)]

    def score_pairs(self, pairs: Iterable[tuple[str, str]]) -> list[float]:
        """Return the scores of (query, document) pairs in input order: in [0, 1], `[]` for none.

        Raises:
            RerankError: As `rerank`.
        """
        checked = check_pairs(pairs)
        scored = run(self._score(checked, Places(), name=lambda index: f"pairs[{index}]"))
        return [sigmoid(logit) for logit in scored.logits]

    def rerank_many(
        self,
        requests: Iterable[tuple[str, Sequence[str]]],
        *,
        top_k: int | None = None,
        score_threshold: float | None = None,
        progress: bool = False,
    ) -> list[Ranking]:
        """Return the rankings of many (query, documents) requests, in their order.

        It feeds the engine in pieces, so it is never refused for its size, and other calls are
        served in between.

        Args:
            requests: Any number of (query, documents) tuples; an iterator is read as it goes.
            top_k: Most results for each.
            score_threshold: Lowest score to keep, in [0, 1], inclusive.
            progress: Whether to show a bar on standard error.

        Raises:
            InputTypeError: A request is not a query and documents; the message names which.
            RerankError: As `rerank`, but never `Overloaded`.
        """
        limits = _check_limits(top_k, score_threshold)
        return run(self._rerank_many(Requests(requests), limits, Places(), progress=progress))

    async def arerank_many(
        self,
        requests: Iterable[tuple[str, Sequence[str]]],
        *,
        top_k: int | None = None,
        score_threshold: float | None = None,
        progress: bool = False,
        timeout_s: float | None = None,
    ) -> list[Ranking]:
        """Return what `rerank_many` returns, without blocking the event loop.

        An iterator is read in another thread. All long calls of an engine share two of these, so
        one that waits for its items, from a network, say, keeps others waiting too: gather the
        items first, or call it with a few at a time.
        """
        limits = _check_limits(top_k, score_threshold)
        places = Places()
        call = self._rerank_many(Requests(requests), limits, places, progress=progress)
        return await self._door.run(call, places=places, timeout_s=timeout_s, long=True)

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
        self._door.close()
        if first:
            _log.info("Closed %r", self)

    def __enter__(self) -> Self:
        """Return the engine itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def __repr__(self) -> str:
        """Name the model, device and dtype in use."""
        state = ", closed" if self.closed else ""
        return f"Reranker({self.settings.model!r}, device={self.device}, dtype={self.dtype}{state})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings; unpickling loads the weights again. A token is left out."""
        return type(self).from_settings, (self.settings,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return the engine itself: threads and weights are shared, not copied."""
        return self

    def _score(
        self,
        pairs: list[tuple[str, str]],
        places: Places,
        *,
        name: Callable[[int], str],
        requests: int = 1,
        bounded: bool = True,
    ) -> Call[_Scored]:
        """Tokenise, queue, wait, and put the logits back in the order of the pairs.

        Args:
            pairs: n pairs; may be empty.
            places: What holds the call's place in the queue.
            name: What an error calls the pair at an index.
            requests: How many requests they are of.
            bounded: Whether the call may be refused because too many pairs wait.
        """
        self._core.check_open()
        if not pairs:
            self._core.tally.add_requests(requests)
            return _Scored([], [], [], Usage(tokens=0))
        future: Logits = Future()
        # Whatever interrupts it from here on, Ctrl-C included, the call gives back its room.
        try:
            self._core.reserve(future, len(pairs), bounded=bounded)
            self._core.tally.add_requests(requests)
            places.hold(future)
            yield None
            begin = time.perf_counter()
            tokenized = self._tokenize(pairs)
            job = Job(tokenized.distinct, future, name)
            queued = time.perf_counter()
            self._core.submit(job)
            logits = (yield future) or []
            scored = time.perf_counter()
        finally:
            # Where the caller has gone, so must its waiting pairs; a no-op if all are scored.
            future.cancel()
        best = tokenized.best(logits)
        return _Scored(
            [logits[position] for position in best],
            [tokenized.distinct[position].truncated for position in best],
            [tokenized.distinct[position].span for position in best],
            Usage(
                tokens=sum(map(len, tokenized.distinct)),
                tokenizing_s=queued - begin,
                waiting_s=job.waited_s,
                scoring_s=max(0.0, scored - queued - job.waited_s),
            ),
        )

    def _tokenize(self, pairs: list[tuple[str, str]]) -> TokenizedPairs:
        begin = time.perf_counter()
        try:
            return self._tokenizer.tokenize(pairs)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # what Rust panics with is no Exception
            raise ScoringError(
                f"The tokenizer failed on a call of {len(pairs)} pairs: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            self._core.tally.add_tokenizing(time.perf_counter() - begin)

    def _rerank(self, request: Request, limits: dict[str, Any], places: Places) -> Call[Ranking]:
        query, texts = request
        pairs = [(query, text) for text in texts]
        scored = yield from self._score(pairs, places, name=_document)
        ranking = scored.rank(texts, slice(None), limits)
        ranking.usage = scored.usage
        return ranking

    def _rerank_many(
        self, requests: Requests, limits: dict[str, Any], places: Places, *, progress: bool
    ) -> Call[list[Ranking]]:
        self._core.check_open()
        yield None
        rankings: list[Ranking] = []
        under_way: deque[tuple[Piece, Call[_Scored], Step]] = deque()
        # A quarter of the queue each, so that the two under way leave other callers half of it.
        size = min(_PIECE_PAIRS, max(1, self.settings.max_queued_pairs // 4))
        coming = pieces(requests, max_pairs=size)
        with ProgressBar(requests, shown=progress) as bar:
            try:
                while True:
                    for piece in islice(coming, _PIECES_UNDER_WAY - len(under_way)):
                        call = self._score_piece(piece, places)
                        under_way.append((piece, call, _begin(call)))
                    if not under_way:
                        return rankings
                    piece, call, step = under_way[0]
                    scored = yield from _finish(call, step)
                    under_way.popleft()
                    rankings.extend(_split(piece, scored, limits))
                    bar.advance(len(piece.requests))
            finally:
                for _, call, _ in under_way:
                    call.close()

    def _score_piece(self, piece: Piece, places: Places) -> Call[_Scored]:
        return self._score(
            piece.pairs(), places, name=piece.name, requests=len(piece.requests), bounded=False
        )


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


def _split(piece: Piece, scored: _Scored, limits: dict[str, Any]) -> Iterator[Ranking]:
    start = 0
    for _, texts in piece.requests:
        part = slice(start, start + len(texts))
        yield scored.rank(texts, part, limits)
        start = part.stop


def _document(index: int) -> str:
    return f"documents[{index}]"


def _check_limits(top_k: object, score_threshold: object) -> dict[str, Any]:
    return {
        "top_k": check_top_k(top_k),
        "score_threshold": check_score_threshold(score_threshold),
    }


def _dtype_names(models: Sequence[Model]) -> str:
    """Return the dtype of all models, or of each one in order where they differ."""
    names = [str(model.dtype).removeprefix("torch.") for model in models]
    return ", ".join(names) if len(set(names)) > 1 else names[0]


def _let_go(core: ScoringCore, door: AsyncDoor) -> None:
    """Signal the threads to end; waiting for them here could block a garbage collection."""
    core.stop()
    door.close()
