"""The state of a remote reranker in one process: connections, threads and counts."""

import os
import threading

from bge_rerank_adapters.calls.counters import Counters
from bge_rerank_adapters.calls.runner import AsyncRunner
from bge_rerank_adapters.errors import ClosedError
from bge_rerank_adapters.remote.connections import Connections
from bge_rerank_adapters.remote.settings import RemoteSettings
from bge_rerank_adapters.remote.stats import RemoteStats


class ProcessState:
    """The connections of a remote reranker in one process, opened on first use.

    After a fork the threads are gone, the connections belong to the parent, and locks may stay held
    forever. So the child makes its own state, and does not touch its parent's.

    Attributes:
        runner: Runs calls from event loops.
        tally: Counts the work done, by the names of `RemoteStats`.
    """

    def __init__(self, settings: RemoteSettings, *, parents: "ProcessState | None" = None) -> None:
        self.runner, self.tally = AsyncRunner(), Counters(RemoteStats().to_dict())
        self._settings = settings
        # Only kept alive: freeing it would close the parent's loop and connections.
        self._parents = parents
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._connections: Connections | None = None
        self.closed: bool = parents is not None and parents.closed

    @property
    def here(self) -> bool:
        """Whether this is the process that made it."""
        return self._pid == os.getpid()

    @property
    def connected(self) -> bool:
        """Whether `connections` returns at once."""
        return self._connections is not None

    def check_open(self) -> None:
        """Raise `ClosedError` if it has been closed."""
        if self.closed:
            raise ClosedError("The remote reranker has been closed; make another one.")

    def connections(self) -> Connections:
        """Return the connections; the first call takes 10 ms or more.

        Raises:
            ClosedError: It has been closed.
        """
        with self._lock:
            self.check_open()
            if self._connections is None:
                self._connections = Connections(self._settings, self.tally)
            return self._connections

    def close(self) -> None:
        """Fail running requests with `ClosedError`; may be repeated."""
        with self._lock:
            self.closed = True
        self.runner.close()
        if self._connections is not None:
            self._connections.close()

    def stop_soon(self) -> None:
        """Signal the threads to end without waiting for them; safe during garbage collection."""
        if self.here:
            self.runner.close()
            if self._connections is not None:
                self._connections.stop_soon()
