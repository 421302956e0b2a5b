"""What a remote reranker has in one process: connections, threads and counts."""

import os
import threading

from bge_rerank_adapters.calls.runner import AsyncDoor
from bge_rerank_adapters.errors import ClosedError
from bge_rerank_adapters.remote.settings import RemoteSettings
from bge_rerank_adapters.remote.stats import Tally
from bge_rerank_adapters.remote.wire import Wire


class Line:
    """The connections of a remote reranker, opened on first use.

    Threads do not come along into a forked process, connections must not, and a lock may be held
    there for ever; a child has a line of its own, and lets its parent's be.

    Attributes:
        door: Runs calls from event loops.
        tally: Counts what is done.
    """

    def __init__(self, settings: RemoteSettings, *, parents: "Line | None" = None) -> None:
        self.door, self.tally = AsyncDoor(), Tally()
        self._settings = settings
        # Kept, for freeing it would close the parent's loop and connections.
        self._parents = parents
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._wire: Wire | None = None
        self.closed: bool = parents is not None and parents.closed

    @property
    def here(self) -> bool:
        """Whether it is of this process."""
        return self._pid == os.getpid()

    @property
    def connected(self) -> bool:
        """Whether `wire` returns at once."""
        return self._wire is not None

    def check_open(self) -> None:
        """Raise `ClosedError` if it has been closed."""
        if self.closed:
            raise ClosedError("The remote reranker has been closed; make another one.")

    def wire(self) -> Wire:
        """Return the connections; the first time takes a hundredth of a second or more.

        Raises:
            ClosedError: It has been closed.
        """
        with self._lock:
            self.check_open()
            if self._wire is None:
                self._wire = Wire(self._settings, self.tally)
            return self._wire

    def close(self) -> None:
        """End requests under way with `ClosedError`; may be repeated."""
        with self._lock:
            self.closed = True
        self.door.close()
        if self._wire is not None:
            self._wire.close()

    def let_go(self) -> None:
        """Let the threads end, without waiting for them; safe in a garbage collection."""
        if self.here:
            self.door.close()
            if self._wire is not None:
                self._wire.let_go()
