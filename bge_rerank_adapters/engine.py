"""`Reranker`: the scoring engine under all adapters."""

import asyncio
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self, TypeVar

from bge_rerank_adapters.errors import InputTypeError, RerankTimeoutError, SettingsError
from bge_rerank_adapters.hub import find_folder
from bge_rerank_adapters.models.devices import resolve_device, resolve_dtype
from bge_rerank_adapters.models.loading import (
    load_model,
    load_pair_tokenizer,
    read_encoder_config,
)
from bge_rerank_adapters.progress import ProgressBar
from bge_rerank_adapters.ranking import (
    RankedDocument,
    check_documents,
    check_pairs,
    check_query,
    check_score_threshold,
    check_top_k,
    rank,
    sigmoid,
)
from bge_rerank_adapters.settings import EngineSettings
from bge_rerank_adapters.worker import ScoringCore

# Tokens of a pack where the user leaves it open: enough to keep the device busy, few enough that
# a call that comes meanwhile does not wait long.
_PACK_TOKENS = {"cpu": 2048}
_PACK_TOKENS_ACCELERATOR = 16_384
# How many pairs of a long run of requests are tokenised and queued at a time, and how many such
# pieces are under way: one is scored while the next is tokenised.
_PIECE_PAIRS = 4096
_PIECES_UNDER_WAY = 2

T = TypeVar("T")
Request = tuple[str, list[str]]
# A call is a generator that yields each future it waits for and is sent its result. It neither
# blocks nor knows whether it is run from a thread or from an event loop.
Call = Generator[Future[list[float]], list[float], T]


@dataclass(frozen=True, slots=True)
class _Scored:
    """The logits of pairs in the order they were given, and which pairs were cut."""

    logits: list[float]
    truncated: list[bool]


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

    def __init__(
        self,
        model: str = EngineSettings.model,
        *,
        device: str | Sequence[str] = EngineSettings.device,
        dtype: str = EngineSettings.dtype,
        max_length: int = EngineSettings.max_length,
        query_max_length: int | None = EngineSettings.query_max_length,
        revision: str | None = EngineSettings.revision,
        cache_dir: str | None = EngineSettings.cache_dir,
        local_files_only: bool = EngineSettings.local_files_only,
        token: str | None = EngineSettings.token,
        pack_tokens: int | str = EngineSettings.pack_tokens,
        max_queued_pairs: int = EngineSettings.max_queued_pairs,
    ) -> None:
        """Check the settings and load the weights.

        Args:
            model: A folder, a name on the hub, or `"tiny"` for the bundled checkpoint.
            device: `"auto"`, `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`, `"xpu"`, ..., or several of
                them for a copy of the model on each.
            dtype: `"auto"`, `"float32"`, `"bfloat16"`, `"float16"` or, on a processor, `"int8"`.
                `"auto"` is the fastest that a short timing finds this device to run natively,
                and never int8.
            max_length: Most tokens of a pair, special tokens included; clamped to the model's
                positions.
            query_max_length: Most tokens of the query; `None` is three quarters of `max_length`.
            revision: Branch, tag or commit on the hub.
            cache_dir: Folder of the hub's cache.
            local_files_only: Never ask the hub.
            token: Secret for the hub.
            pack_tokens: Token budget of one forward pass, or `"auto"`.
            max_queued_pairs: Most pairs that may wait before calls raise `Overloaded`.

        Raises:
            SettingsError: A setting has a value that is not allowed.
            CheckpointError: The checkpoint cannot be found or used.
            DeviceError: The device is not there.
        """
        self._load(
            EngineSettings(
                model=model,
                device=tuple(device) if isinstance(device, list) else device,  # type: ignore[arg-type]
                dtype=dtype,
                max_length=max_length,
                query_max_length=query_max_length,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                token=token,
                pack_tokens=pack_tokens,
                max_queued_pairs=max_queued_pairs,
            )
        )

    @classmethod
    def from_settings(cls, settings: EngineSettings) -> Self:
        """Return a new engine with these settings, its weights loaded; errors as in `Reranker`."""
        engine = cls.__new__(cls)
        engine._load(settings)  # noqa: SLF001 - its own class
        return engine

    def _load(self, settings: EngineSettings) -> None:
        devices = [resolve_device(name) for name in settings.devices]
        folder = find_folder(settings)
        config = read_encoder_config(folder)
        self._tokenizer = load_pair_tokenizer(
            folder,
            config,
            max_length=settings.max_length,
            query_max_length=settings.query_max_length,
        )
        models = [
            load_model(folder, config, device=each, dtype=resolve_dtype(settings.dtype, each))
            for each in devices
        ]
        self.settings = settings.without_token()
        self.device = ", ".join(str(model.device) for model in models)
        self.dtype = str(models[0].dtype).removeprefix("torch.")
        self._core = ScoringCore(
            models,
            pack_tokens=_pack_tokens(settings, devices[0].type),
            max_queued_pairs=settings.max_queued_pairs,
        )
        # Tokenising for event loops; a pool of its own, so that work queued in the loop's default
        # pool cannot hold it up.
        self._steps = ThreadPoolExecutor(max_workers=2, thread_name_prefix="bge-rerank-steps")
        self._finalizer = weakref.finalize(self, _let_go, self._core, self._steps)
        # At exit the core's own hook waits for its threads, which this must not overtake.
        self._finalizer.atexit = False

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return self._core.closed

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_k: int | None = None,
        score_threshold: float | None = None,
        timeout_s: float | None = None,
    ) -> list[RankedDocument]:
        """Return the documents ranked by how well they answer the query, best first.

        Args:
            query: The question; may be empty.
            documents: n texts; may be empty or repeat themselves.
            top_k: Most results to return; `None` is all.
            score_threshold: Lowest score to keep, in [0, 1], inclusive; applied before `top_k`.
            timeout_s: Seconds to wait at most; `None` is for ever.

        Returns:
            At most n results, highest logit first, equal ones in input order; `[]` for no
            documents.

        Raises:
            InputTypeError: The query or a document is not a `str`.
            SettingsError: `top_k`, `score_threshold` or `timeout_s` is out of range.
            Overloaded: Too many pairs wait already.
            RerankTimeoutError: `timeout_s` ran out.
            ScoringError: The model failed, or gave NaN for a pair.
            ClosedError: The engine has been closed.
        """
        request = _check_request(query, documents)
        limits = _check_limits(top_k, score_threshold)
        return _run(self._rerank(request, limits), timeout_s)

    async def arerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_k: int | None = None,
        score_threshold: float | None = None,
        timeout_s: float | None = None,
    ) -> list[RankedDocument]:
        """Return what `rerank` returns, without blocking the event loop.

        A call that is cancelled or runs out of time takes its waiting pairs out of the queue.
        """
        request = _check_request(query, documents)
        limits = _check_limits(top_k, score_threshold)
        return await self._arun(self._rerank(request, limits), timeout_s)

    def logits(self, query: str, documents: Sequence[str]) -> list[float]:
        """Return the documents' logits in input order: unbounded floats, `[]` for no documents.

        Raises:
            RerankError: As `rerank`.
        """
        query, texts = _check_request(query, documents)
        return _run(self._score([(query, text) for text in texts])).logits

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
        scored = _run(self._score(check_pairs(pairs)))
        return [sigmoid(logit) for logit in scored.logits]

    def rerank_many(
        self,
        requests: Iterable[tuple[str, Sequence[str]]],
        *,
        top_k: int | None = None,
        score_threshold: float | None = None,
        progress: bool = False,
    ) -> list[list[RankedDocument]]:
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
        return _run(self._rerank_many(_check_requests(requests), limits, progress=progress))

    async def arerank_many(
        self,
        requests: Iterable[tuple[str, Sequence[str]]],
        *,
        top_k: int | None = None,
        score_threshold: float | None = None,
        progress: bool = False,
        timeout_s: float | None = None,
    ) -> list[list[RankedDocument]]:
        """Return what `rerank_many` returns, without blocking the event loop."""
        limits = _check_limits(top_k, score_threshold)
        call = self._rerank_many(_check_requests(requests), limits, progress=progress)
        return await self._arun(call, timeout_s)

    def warm_up(self) -> None:
        """Run the model once, so that the first query does not wait for kernels to be chosen."""
        self.score("warm-up", ["warm-up " * 64])

    def close(self) -> None:
        """Free the model; calls under way and later ones raise `ClosedError`. May be repeated."""
        self._finalizer.detach()
        self._core.close()
        self._steps.shutdown(wait=False)

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

    def _score(self, pairs: list[tuple[str, str]], *, bounded: bool = True) -> Call[_Scored]:
        """Tokenise, queue, wait, and put the logits back in the order of the pairs."""
        self._core.check_open()
        if not pairs:
            return _Scored([], [])
        tokenized = self._tokenizer.tokenize(pairs)
        job = self._core.submit(tokenized.distinct, bounded=bounded)
        try:
            logits = yield job.future
        finally:
            # Where the caller has gone, so must its waiting pairs; a no-op if all are scored.
            job.future.cancel()
        return _Scored(
            [logits[position] for position in tokenized.positions],
            [tokenized.distinct[position].truncated for position in tokenized.positions],
        )

    def _rerank(self, request: Request, limits: dict[str, Any]) -> Call[list[RankedDocument]]:
        query, texts = request
        scored = yield from self._score([(query, text) for text in texts])
        return rank(texts, scored.logits, truncated=scored.truncated, **limits)

    def _rerank_many(
        self, requests: Iterable[Request], limits: dict[str, Any], *, progress: bool
    ) -> Call[list[list[RankedDocument]]]:
        rankings: list[list[RankedDocument]] = []
        under_way: deque[tuple[list[Request], Call[_Scored], Future[list[float]] | None]] = deque()
        # A quarter of the queue each, so that the two under way leave other callers half of it.
        size = min(_PIECE_PAIRS, max(1, self.settings.max_queued_pairs // 4))
        pieces = _pieces(requests, size)
        with ProgressBar(requests, shown=progress) as bar:
            try:
                while True:
                    for piece in islice(pieces, _PIECES_UNDER_WAY - len(under_way)):
                        call = self._score(
                            [(query, text) for query, texts in piece for text in texts],
                            bounded=False,
                        )
                        under_way.append((piece, call, _begin(call)))
                    if not under_way:
                        return rankings
                    piece, call, future = under_way[0]
                    scored = yield from _finish(call, future)
                    under_way.popleft()
                    rankings.extend(_split(piece, scored, limits))
                    bar.advance(len(piece))
            finally:
                for _, call, _ in under_way:
                    call.close()

    async def _arun(self, call: Call[T], timeout_s: float | None) -> T:
        """Run a call from an event loop: its steps in the engine's own small pool."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_check_timeout(timeout_s)):
                # In a forked process the pool's threads are gone, and it would wait for them.
                self._core.check_open()
                result: list[float] | None = None
                while True:
                    step = self._submit_step(call, result)
                    finished, value = await _step_result(loop, step, call)
                    if finished:
                        return value  # type: ignore[no-any-return]
                    result = await asyncio.wrap_future(value)
        except TimeoutError as error:
            raise _timed_out(timeout_s) from error
        finally:
            _close_when_idle(call)

    def _submit_step(
        self, call: Call[Any], result: list[float] | None
    ) -> "Future[tuple[bool, Any]]":
        try:
            return self._steps.submit(_advance, call, result)
        except RuntimeError:
            # The pool is shut down: the engine is closed, and says so better than the pool does.
            self._core.check_open()
            raise


def _advance(call: Call[T], result: list[float] | None) -> tuple[bool, Any]:
    """Run a call up to the next future it waits for.

    Returns:
        `(False, future)`, or `(True, what the call returns)`.
    """
    try:
        return False, next(call) if result is None else call.send(result)
    except StopIteration as stop:
        return True, stop.value


async def _step_result(
    loop: asyncio.AbstractEventLoop, step: "Future[tuple[bool, Any]]", call: Call[Any]
) -> tuple[bool, Any]:
    try:
        return await asyncio.wrap_future(step, loop=loop)
    except asyncio.CancelledError:
        # The step may still run in its thread; the call is closed as soon as it is done.
        step.add_done_callback(lambda _: _close_when_idle(call))
        raise


def _close_when_idle(call: Call[Any]) -> None:
    # A call that another thread runs at this moment raises ValueError, and is closed after that.
    with suppress(ValueError):
        call.close()


def _run(call: Call[T], timeout_s: float | None = None) -> T:
    """Run a call in this thread."""
    limit = _check_timeout(timeout_s)
    deadline = None if limit is None else time.monotonic() + limit
    finished, value = _advance(call, None)
    try:
        while not finished:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            finished, value = _advance(call, value.result(left))
    except FutureTimeoutError as error:
        raise _timed_out(timeout_s) from error
    finally:
        call.close()
    return value  # type: ignore[no-any-return]


def _begin(call: Call[Any]) -> "Future[list[float]] | None":
    """Run a call to its first future; `None` if it ended without one."""
    finished, value = _advance(call, None)
    return None if finished else value


def _finish(call: Call[_Scored], future: "Future[list[float]] | None") -> Call[_Scored]:
    if future is None:
        return _Scored([], [])
    finished, value = _advance(call, (yield future))
    if not finished:
        raise RuntimeError("A scoring call waited twice.")
    return value  # type: ignore[no-any-return]


def _pieces(requests: Iterable[Request], max_pairs: int) -> Generator[list[Request], None, None]:
    piece: list[Request] = []
    pairs = 0
    for request in requests:
        piece.append(request)
        pairs += len(request[1])
        if pairs >= max_pairs:
            yield piece
            piece, pairs = [], 0
    if piece:
        yield piece


def _split(
    piece: list[Request], scored: _Scored, limits: dict[str, Any]
) -> Generator[list[RankedDocument], None, None]:
    start = 0
    for _, texts in piece:
        part = slice(start, start + len(texts))
        yield rank(texts, scored.logits[part], truncated=scored.truncated[part], **limits)
        start = part.stop


@contextmanager
def _named(position: int) -> Generator[None, None, None]:
    try:
        yield
    except InputTypeError as error:
        raise InputTypeError(f"requests[{position}]: {error}") from error


def _check_requests(requests: object) -> "_Requests":
    if isinstance(requests, str | bytes) or not isinstance(requests, Iterable):
        raise InputTypeError(
            "requests must be (query, documents) tuples, got "
            f"{type(requests).__name__}; use rerank for a single query."
        )
    return _Requests(requests)


class _Requests:
    """Requests that are checked as they are read; as long as what they come from."""

    def __init__(self, requests: Iterable[Any]) -> None:
        self._requests = requests

    def __len__(self) -> int:
        return len(self._requests)  # type: ignore[arg-type]

    def __iter__(self) -> Generator[Request, None, None]:
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
                checked = _check_request(request[0], request[1])
            yield checked


def _check_request(query: object, documents: object) -> Request:
    return check_query(query), check_documents(documents)


def _check_limits(top_k: object, score_threshold: object) -> dict[str, Any]:
    return {
        "top_k": check_top_k(top_k),
        "score_threshold": check_score_threshold(score_threshold),
    }


def _check_timeout(timeout_s: object) -> float | None:
    if timeout_s is None:
        return None
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not timeout_s > 0:
        raise SettingsError(
            f"timeout_s must be a number of seconds above 0 or None, got {timeout_s!r}."
        )
    return float(timeout_s)


def _timed_out(timeout_s: float | None) -> RerankTimeoutError:
    return RerankTimeoutError(
        f"The call was not done within timeout_s={timeout_s}; its waiting pairs were dropped. "
        "Send fewer documents or allow more time."
    )


def _pack_tokens(settings: EngineSettings, device_type: str) -> int:
    if isinstance(settings.pack_tokens, int):
        return settings.pack_tokens
    return _PACK_TOKENS.get(device_type, _PACK_TOKENS_ACCELERATOR)


def _let_go(core: ScoringCore, steps: ThreadPoolExecutor) -> None:
    """Signal the threads to end; waiting for them here could block a garbage collection."""
    core.stop()
    steps.shutdown(wait=False)
