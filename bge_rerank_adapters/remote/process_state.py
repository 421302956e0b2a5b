"""What a remote reranker keeps for one process: connections, threads and counts."""

import os
import threading

from bge_rerank_adapters.calls.runner import AsyncRunner
from bge_rerank_adapters.errors import ClosedError
from bge_rerank_adapters.remote.connections import Connections
from bge_rerank_adapters.remote.settings import RemoteSettings
from bge_rerank_adapters.remote.stats import Tally


class ProcessState:
    """The connections of a remote reranker in one process, opened on first use.

    After a fork the threads are gone, the connections are the parent's, and a lock may be held for
    ever. So the child makes a state of its own, and leaves its parent's alone.

    Attributes:
        runner: Runs calls from event loops.
        tally: Counts what is done.
    """

    def __init__(self, settings: RemoteSettings, *, parents: "ProcessState | None" = None) -> None:
        self.runner, self.tally = AsyncRunner(), Tally()
        self._settings = settings
        # Kept, for freeing it would close the parent's loop and connections.
        self._parents = parents
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._connections: Connections | None = None
        self.closed: bool = parents is not None and parents.closed

    @property
    def here(self) -> bool:
        """Whether it is of this process."""
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
        """Return the connections; the first time takes a hundredth of a second or more.

        Raises:
            ClosedError: It has been closed.
        """
        with self._lock:
            self.check_open()
            if self._connections is None:
                self._connections = Connections(self._settings, self.tally)
            return self._connections

    def close(self) -> None:
        """End requests under way with `ClosedError`; may be repeated."""
        with self._lock:
            self.closed = True
        self.runner.close()
        if self._connections is not None:
            self._connections.close()

    def let_go(self) -> None:
        """Let the threads end, without waiting for them; safe in a garbage collection."""
        if self.here:
            self.runner.close()
            if self._connections is not None:
                self._connections.let_go()
