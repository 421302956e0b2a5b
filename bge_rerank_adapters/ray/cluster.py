"""Ranks on a cluster for a program that reads and writes itself, in order."""

import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from bge_rerank_adapters.calls.items import Bad, Item, rank_and_write
from bge_rerank_adapters.calls.limits import Limits
from bge_rerank_adapters.calls.ranked_document import RankedDocument
from bge_rerank_adapters.errors import RerankError, SettingsError
from bge_rerank_adapters.ray.recipe import Recipe, Resources, make_recipe
from bge_rerank_adapters.settings import EngineSettings

_log = logging.getLogger(__name__)

Chunk = list[Item | Bad]
Write = Callable[[Item, Iterable[RankedDocument]], bytes]

_ANSWER_S = 10.0
# The first actor may have to wait for a machine, and to fetch the model.
_PATIENCE_S = 30.0
_START_S = 900.0
# One chunk is ranked while the next is being sent.
_CHUNKS_OF_ACTOR = 2
_RETRIES = 3
# Clusters use gRPC over HTTP/2, where each side begins with a SETTINGS frame (RFC 9113, 3.4).
_HTTP2_SETTINGS = b"\x04"
_HTTP2_HEADER_BYTES = 9
_HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + _HTTP2_SETTINGS + bytes(5)


@contextmanager
def connected(address: str) -> Generator[None, None, None]:
    """Connect this program to a cluster within a `with` block.

    Args:
        address: `"local"` for a new cluster on this machine that ends with the block, `"auto"` for
            the one that runs on it, `"host:port"` of a head node, or `"ray://host:port"`.

    Raises:
        SettingsError: No cluster answers there.
    """
    _check_answers(address)
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=False if address == "local" else None,
        )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise SettingsError(
            f'No Ray cluster answers at {address!r}: {reason.rstrip(".")}. Give "local", "auto", '
            '"host:port" or "ray://host:port"; if the cluster needs a token, also set '
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def chunk_ranker(
    settings: EngineSettings, *, limits: Limits, write: Write, actors: int | None
) -> Generator["ChunkRanker", None, None]:
    """Load engines in the connected cluster; they end with the `with` block.

    Args:
        settings: The settings of the engines.
        limits: The limits of each ranking.
        write: Serialises an item and its ranking.
        actors: Number of engines; `None` is one for each GPU, or without GPUs one for each machine.

    Raises:
        RerankError: The model cannot be loaded, or the cluster has no room.
    """
    count, resources = share(_nodes(), actors)
    recipe = make_recipe(None, settings, **limits.to_dict(), resources=resources)
    ranker = ChunkRanker(recipe, write, count=count, resources=resources)
    try:
        yield ranker
    finally:
        ranker.close()


def share(nodes: list[dict[str, float]], actors: int | None) -> tuple[int, Resources]:
    """Return the number of actors, and the resources of each.

    Args:
        nodes: The resources of each machine.
        actors: The number that the user wants, or `None`.
    """
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if gpus:
        return actors or gpus, Resources(num_gpus=1, num_cpus=1)
    cpus = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    count = actors or max(1, len(cpus))
    of_a_node = -(-count // max(1, len(cpus)))
    return count, Resources(num_cpus=max(1, min(cpus, default=1) // of_a_node))


class ChunkRanker:
    """Engines in the cluster that rank chunks of items, with results in order."""

    def __init__(self, recipe: Recipe, write: Write, *, count: int, resources: Resources) -> None:
        """Load the engines, and wait until the first is ready.

        Raises:
            RerankError: The model cannot be loaded, or no engine was ready in time.
        """
        # An actor that dies is restarted and repeats its chunk, but not for ever.
        remote = ray.remote(
            max_restarts=-1,
            max_task_retries=_RETRIES,
            num_gpus=resources.num_gpus,
            num_cpus=resources.num_cpus,
        )(_Ranker)
        self._actors: list[Any] = [remote.remote(recipe, write) for _ in range(count)]
        self._loading = {actor.load.remote(): actor for actor in self._actors}
        self._free: list[Any] = []
        ready, _ = ray.wait([*self._loading], timeout=_PATIENCE_S)
        if not ready:
            _log.warning(
                "No actor is ready after %.0f s; each needs %s. It may wait for room in the "
                "cluster, or for the model.",
                _PATIENCE_S,
                resources,
            )
            ready, _ = ray.wait([*self._loading], timeout=_START_S)
        if not ready:
            raise RerankError(
                f"No actor of {count} was ready within {_START_S:.0f} s; each needs {resources}, "
                f"and the cluster has {_free()} free."
            )
        self._note(ready)

    def rank(self, chunks: Iterator[Chunk]) -> Iterator[tuple[Chunk, list[bytes | Bad]]]:
        """Yield each chunk with the bytes to write for its items, or why there are none.

        Raises:
            RerankError: The model cannot be loaded, or an actor died repeatedly on a chunk.
        """
        in_progress: deque[tuple[Chunk, Any]] = deque()
        busy: dict[Any, Any] = {}
        more = True
        while more or in_progress:
            while (
                more and self._free and len(in_progress) < 2 * _CHUNKS_OF_ACTOR * len(self._actors)
            ):
                chunk = next(chunks, None)
                more = chunk is not None
                if chunk is not None:
                    # The actor with the least work.
                    actor = max(self._free, key=self._free.count)
                    self._free.remove(actor)
                    result = actor.rank.remote(chunk)
                    busy[result] = actor
                    in_progress.append((chunk, result))
            if busy:
                self._note_done(busy)
            while in_progress and in_progress[0][1] not in busy:
                chunk, result = in_progress.popleft()
                yield chunk, _got(result)

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor)

    def _note_done(self, busy: dict[Any, Any]) -> None:
        """Wait until an actor has finished loading or a chunk."""
        done, _ = ray.wait([*self._loading, *busy])
        self._note([each for each in done if each in self._loading])
        for each in done:
            if each in busy:
                self._free.append(busy.pop(each))

    def _note(self, loaded: list[Any]) -> None:
        for each in loaded:
            _got(each)
            self._free += [self._loading.pop(each)] * _CHUNKS_OF_ACTOR


class _Ranker:
    """An actor with an engine."""

    def __init__(self, recipe: Recipe, write: Write) -> None:
        self._recipe, self._write = recipe, write
        self._engine: Any = None

    def load(self) -> None:
        # Not in the constructor, whose errors Ray does not pass on.
        self._engine = self._engine or self._recipe.load()

    def rank(self, chunk: Chunk) -> list[bytes | Bad]:
        self.load()
        return rank_and_write(self._engine, chunk, limits=self._recipe.limits, write=self._write)


def _got(result: Any) -> Any:
    """Return an actor's result, or raise its error."""
    try:
        return ray.get(result)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RerankError | ImportError):
            raise error.cause from None
        raise RerankError(f"An actor failed: {error.cause!r}.") from error
    except ray.exceptions.RayError as error:
        raise RerankError(
            f"An actor died {_RETRIES + 1} times of the same work, or with its machine: "
            f"{str(error).splitlines()[0]} What was written so far stays; see the cluster's logs, "
            "and go on with --resume."
        ) from error


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _free() -> Any:
    return ray.available_resources()  # type: ignore[no-untyped-call]


def _check_answers(address: str) -> None:
    """Refuse an address where no cluster answers; Ray itself would wait for minutes."""
    if address in {"local", "auto"}:
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=_ANSWER_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0") not in {"", "0"}:
                return  # an unencrypted greeting would get no answer
            connection.sendall(_HTTP2_GREETING)
            answer = connection.makefile("rb").read(_HTTP2_HEADER_BYTES)
        if answer[3:4] != _HTTP2_SETTINGS:
            raise ConnectionError("it is not a head node")
    except (OSError, ValueError, OverflowError) as error:
        raise SettingsError(
            f'No Ray cluster answers at {address!r} ({error}); give "local", "auto", "host:port" '
            'or "ray://host:port".'
        ) from error
