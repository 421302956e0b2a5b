"""`Reranker`: the scoring engine under all adapters."""

import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import TypeVar, Unpack

from bge_rerank_adapters.calls.base import BaseReranker
from bge_rerank_adapters.calls.ranking import PairScore, ScoredRequest
from bge_rerank_adapters.calls.requests import Request
from bge_rerank_adapters.calls.runner import AsyncRunner, Call, Reservations
from bge_rerank_adapters.engine.checkpoints.hub import find_folder
from bge_rerank_adapters.engine.models.base import Model
from bge_rerank_adapters.engine.models.call_settings import CallSettings, CallTokenizers
from bge_rerank_adapters.engine.models.capabilities import dtype_name
from bge_rerank_adapters.engine.models.causal.readout import LayerLogits
from bge_rerank_adapters.engine.models.cpu.threads import settle_threads
from bge_rerank_adapters.engine.models.device_faults import check_usable
from bge_rerank_adapters.engine.models.devices import resolve_device
from bge_rerank_adapters.engine.models.loading import (
    load_models,
    load_pair_tokenizer,
    read_checkpoint,
)
from bge_rerank_adapters.engine.queue.calls import EngineCalls
from bge_rerank_adapters.engine.queue.core import ScoringCore
from bge_rerank_adapters.engine.stats import EngineStats
from bge_rerank_adapters.settings import EngineOptions, EngineSettings
from bge_rerank_adapters.settings.options import check_options, shows_options

# A call with more characters counts as long: tokenising takes a tenth of a second or more.
_LONG_CALL_CHARACTERS = 250_000
# Pairs of a part of a large call: a fifth of a second of work for a large GPU, and less to
# tokenise.
_PART_PAIRS = 512

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Reranker(BaseReranker[EngineSettings]):
    """Scores how well documents answer a query with a BGE reranker, on this machine.

    Safe to use from many threads and event loops at once: all calls share one queue, and packs may
    hold pairs of several calls. To free its memory, close it, use it as a context manager, or drop
    all references to it.

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
            **options: The engine's settings.

        Raises:
            TypeError: There is no setting of that name.
            SettingsError: A setting has a value that is not allowed.
            CheckpointError: The checkpoint cannot be found or used.
            DeviceError: The device does not exist, has too little memory, or cannot be used by
                this process any more.
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
        tokenizer = load_pair_tokenizer(checkpoint, settings)
        self.call_tokenizers = CallTokenizers(checkpoint, settings, tokenizer)
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
        runs_ahead = any(model.runs_ahead for model in models)
        self._runner = AsyncRunner()
        self._calls = EngineCalls(
            tokenizer,
            self._core,
            max_queued_pairs=settings.max_queued_pairs,
            part_pairs=_PART_PAIRS if runs_ahead else sys.maxsize,
            engine=repr(self),
        )
        self._finalizer = weakref.finalize(self, _stop, self._core, self._runner)
        # At exit the core's own hook, which waits for threads, must run instead.
        self._finalizer.atexit = False
        # As text: handlers that keep records would keep the engine.
        _log.info("Loaded %s in %.1f s", repr(self), time.monotonic() - begin)

    @property
    def closed(self) -> bool:
        """Whether it was closed, or made before this process was forked."""
        return self._core.closed

    def pair_logits(
        self, pairs: Iterable[tuple[str, str]], call: CallSettings
    ) -> list[tuple[float, ...]]:
        """Return the logits of (query, document) pairs, with settings for this call.

        For drop-ins of libraries in which each call has settings that are an engine's here.

        Returns:
            For each pair, in input order, the logit of each layer that is read; a single one if
            the call names no layers.

        Raises:
            InputTypeError: A pair is not two `str`; the message names which.
            SettingsError: The lengths leave no room for a document, or the model does not have a
                layer.
            RerankError: As `rerank`.
        """
        requests, tokenize = Request.checked_pairs(pairs), self.call_tokenizers.tokenize(call)
        scores = self._run(
            lambda reservations: self._calls.score_pairs(requests, reservations, tokenize=tokenize)
        )
        return [_layers(each.logit) for each in scores if each.logit is not None]

    def warm_up(self) -> None:
        """Run the model once, so that the first query does not wait for one-time work.

        Each device runs its copy, in all its streams.

        Raises:
            ScoringError: The model failed.
            ClosedError: The engine has been closed.
        """
        self._core.check_open()
        self._core.tally.add(requests=1)
        self._core.warm_up(self._calls.tokenize([("warm-up", "warm-up " * 64)]).distinct[0])

    def stats(self) -> EngineStats:
        """Return the engine's counters since it was loaded; cheap to call.

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
        """Free the model; running and later calls raise `ClosedError`. May be repeated.

        Waits for the pack that is being scored.
        """
        first = not self.closed
        self._finalizer.detach()
        self._core.close()
        self._runner.close()
        if first:
            _log.info("Closed %s", repr(self))

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
        return self._calls.score(request, reservations, bounded=bounded)

    def _score_pairs(
        self, requests: list[Request], reservations: Reservations
    ) -> Call[list[PairScore]]:
        return self._calls.score_pairs(requests, reservations)

    def _score_many(
        self,
        requests: Iterable[Request],
        reservations: Reservations,
        *,
        finish: Callable[[ScoredRequest], None],
    ) -> Call[None]:
        return self._calls.score_many(requests, reservations, finish=finish)


def _in_fresh_thread(work: Callable[[], T]) -> T:
    """Return the result of `work`, run in a thread that has not used torch before.

    Torch uses OpenMP, whose worker threads belong to the thread that started them. After a fork
    they are gone, and a thread that had some would wait for them for ever.
    """
    outcome: Future[T] = Future()

    def run_work() -> None:
        try:
            settle_threads()
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised in the calling thread
            outcome.set_exception(error)

    threading.Thread(target=run_work, name="bge-rerank-load", daemon=True).start()
    return outcome.result()


def _layers(logit: float) -> tuple[float, ...]:
    return logit.layers if isinstance(logit, LayerLogits) else (logit,)


def _dtype_names(models: Sequence[Model]) -> str:
    """Return the dtype of all models, or the dtypes in order if they differ."""
    names = [dtype_name(model.dtype) for model in models]
    return ", ".join(names) if len(set(names)) > 1 else names[0]


def _stop(core: ScoringCore, runner: AsyncRunner) -> None:
    """Signal the threads to end, without waiting: that could block a garbage collection."""
    core.stop()
    runner.close()
