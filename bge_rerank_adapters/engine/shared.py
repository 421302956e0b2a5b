"""Shares one loaded engine among all users of equal settings, and frees it with the last."""

import os
import threading
import weakref

from bge_rerank_adapters.engine.models.devices import resolve_device
from bge_rerank_adapters.engine.reranker import Reranker
from bge_rerank_adapters.settings import EngineSettings

# Settings and their resolved devices: "cuda" depends on the current device.
_Key = tuple[EngineSettings, tuple[str, ...]]


def _key(settings: EngineSettings) -> _Key:
    return settings, tuple(str(resolve_device(name)) for name in settings.devices)


class _Registry:
    """The engines in use, by their settings; one thread loads while others wait for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Weak, so that locks and settings, which may hold a token, are dropped after loading.
        self._loading: weakref.WeakValueDictionary[_Key, threading.Lock] = (
            weakref.WeakValueDictionary()
        )
        self._engines: weakref.WeakValueDictionary[_Key, Reranker] = weakref.WeakValueDictionary()

    def get(self, settings: EngineSettings) -> Reranker:
        key = _key(settings)
        with self._lock:
            loading = self._loading.setdefault(key, threading.Lock())
        # Held while loading, so that concurrent callers load only one model.
        with loading:
            engine = self._engines.get(key)
            if engine is None or engine.closed:
                engine = Reranker.from_settings(settings)
                self._engines[key] = engine
            return engine


_registry = _Registry()


def shared_reranker(settings: EngineSettings) -> Reranker:
    """Return the engine for these settings; it is loaded unless it is in use already.

    It is freed once nobody refers to it.

    Raises:
        RerankError: The model cannot be loaded.
    """
    return _registry.get(settings)


def _forget_after_fork() -> None:
    # A forked process has none of the threads, and locks may be held in it for ever.
    global _registry
    _registry = _Registry()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
