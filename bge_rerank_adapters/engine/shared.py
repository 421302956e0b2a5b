"""One loaded engine for all who ask with equal settings, freed with its last user."""

import os
import threading
import weakref

from bge_rerank_adapters.engine.models.devices import resolve_device
from bge_rerank_adapters.engine.reranker import Reranker
from bge_rerank_adapters.settings import EngineSettings

# Settings, and the devices that they mean: "cuda" is another one once the current device is.
_Key = tuple[EngineSettings, tuple[str, ...]]


def _key(settings: EngineSettings) -> _Key:
    return settings, tuple(str(resolve_device(name)) for name in settings.devices)


class _Registry:
    """The engines in use, by their settings; lets one thread load while others wait for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Weak as well: a lock lives as long as someone loads, and settings may hold a token.
        self._loading: weakref.WeakValueDictionary[_Key, threading.Lock] = (
            weakref.WeakValueDictionary()
        )
        self._engines: weakref.WeakValueDictionary[_Key, Reranker] = weakref.WeakValueDictionary()

    def get(self, settings: EngineSettings) -> Reranker:
        key = _key(settings)
        with self._lock:
            loading = self._loading.setdefault(key, threading.Lock())
        # Held while it loads, so that ten threads that ask at once load one model.
        with loading:
            engine = self._engines.get(key)
            if engine is None or engine.closed:
                engine = Reranker.from_settings(settings)
                self._engines[key] = engine
            return engine


_registry = _Registry()


def shared_reranker(settings: EngineSettings) -> Reranker:
    """Return the engine for these settings, loaded now unless it is in use already.

    It lives as long as someone holds it.

    Raises:
        RerankError: The model cannot be loaded.
    """
    return _registry.get(settings)


def _forget_after_fork() -> None:
    # Threads do not come along into a forked process, and locks may be held there for ever.
    global _registry
    _registry = _Registry()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
