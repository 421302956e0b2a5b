"""A cluster as what ranks for a program that reads and writes by itself, in order."""

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
# One chunk is ranked while the next is on its way.
_CHUNKS_OF_ACTOR = 2
_RETRIES = 3
# Clusters speak gRPC, and so HTTP/2: either side begins with a frame of settings, RFC 9113, 3.4.
_HTTP2_SETTINGS = b"\x04"
_HTTP2_HEADER_BYTES = 9
_HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + _HTTP2_SETTINGS + bytes(5)


@contextmanager
def connected(address: str) -> Generator[None, None, None]:
    """Connect this program to a cluster, for as long as a `with` lasts.

    Args:
        address: `"local"` for a cluster on this machine that ends with it, `"auto"` for the one
            that runs on this machine, `"host:port"` of a head node, or `"ray://host:port"`.

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
        told = next(iter(str(error).splitlines()), type(error).__name__)
        raise SettingsError(
            f'No Ray cluster answers at {address!r}: {told.rstrip(".")}. Give "local", "auto", '
            '"host:port" or "ray://host:port"; where the cluster asks for a token, set '
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to it, as well."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def chunk_ranker(
    settings: EngineSettings, *, limits: Limits, write: Write, actors: int | None
) -> Generator["ChunkRanker", None, None]:
    """Load engines in the cluster that this program is connected to; they end with the `with`.

    Args:
        settings: Of every engine.
        limits: Of each ranking.
        write: Makes bytes of an item and its ranking.
        actors: How many engines; `None` is one for each GPU, or, where there are none, for each
            machine.

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
    """Return how many actors there are, and what each gets.

    Args:
        nodes: The resources of each machine.
        actors: How many are asked for.
    """
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if gpus:
        return actors or gpus, Resources(num_gpus=1, num_cpus=1)
    processors = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    count = actors or max(1, len(processors))
    of_a_node = -(-count // max(1, len(processors)))
    return count, Resources(num_cpus=max(1, min(processors, default=1) // of_a_node))


class ChunkRanker:
    """Engines in the cluster, which rank chunks of items; results come in the chunks' order."""

    def __init__(self, recipe: Recipe, write: Write, *, count: int, resources: Resources) -> None:
        """Load the engines; the first to be ready is waited for.

        Raises:
            RerankError: The model cannot be loaded, or no engine was ready in time.
        """
        # An actor that dies is started again and does its chunk again; one that dies of the same
        # chunk each time must not do so for ever.
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
        """Yield each chunk with what to write for its items, or why there is nothing.

        Raises:
            RerankError: The model cannot be loaded, or an actor died of a chunk again and again.
        """
        under_way: deque[tuple[Chunk, Any]] = deque()
        busy: dict[Any, Any] = {}
        more = True
        while more or under_way:
            while more and self._free and len(under_way) < 2 * _CHUNKS_OF_ACTOR * len(self._actors):
                chunk = next(chunks, None)
                more = chunk is not None
                if chunk is not None:
                    # The one that has least to do.
                    actor = max(self._free, key=self._free.count)
                    self._free.remove(actor)
                    told = actor.rank.remote(chunk)
                    busy[told] = actor
                    under_way.append((chunk, told))
            if busy:
                self._note_done(busy)
            while under_way and under_way[0][1] not in busy:
                chunk, told = under_way.popleft()
                yield chunk, _got(told)

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor)

    def _note_done(self, busy: dict[Any, Any]) -> None:
        """Wait until an actor is done with something."""
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
    """What each actor is."""

    def __init__(self, recipe: Recipe, write: Write) -> None:
        self._recipe, self._write = recipe, write
        self._engine: Any = None

    def load(self) -> None:
        # Not in the constructor, whose errors reach nobody as they are.
        self._engine = self._engine or self._recipe.load()

    def rank(self, chunk: Chunk) -> list[bytes | Bad]:
        self.load()
        return rank_and_write(self._engine, chunk, limits=self._recipe.limits, write=self._write)


def _got(told: Any) -> Any:
    """Return what an actor answered; its own error is raised as if it had been made here."""
    try:
        return ray.get(told)
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
    """Refuse an address where no cluster answers, which Ray itself would wait for by minutes."""
    if address in {"local", "auto"}:
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=_ANSWER_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0") not in {"", "0"}:
                return  # nobody answers a greeting in the clear
            connection.sendall(_HTTP2_GREETING)
            answer = connection.makefile("rb").read(_HTTP2_HEADER_BYTES)
        if answer[3:4] != _HTTP2_SETTINGS:
            raise ConnectionError("what listens there is no head node")
    except (OSError, ValueError, OverflowError) as error:
        raise SettingsError(
            f'No Ray cluster answers at {address!r} ({error}); give "local", "auto", "host:port" '
            'or "ray://host:port".'
        ) from error
