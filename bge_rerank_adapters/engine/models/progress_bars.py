"""Turns off the progress bars of transformers and FlagEmbedding, also in concurrent calls."""

import importlib
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any


class _Bars:
    """Keeps progress bars off while any of several concurrent calls needs them off."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By owner: how many calls need its bars off, and the function that restores them.
        self._off: dict[str, tuple[int, Callable[[], None]]] = {}

    @contextmanager
    def off(self, name: str, turn_off: Callable[[], Callable[[], None]]) -> Iterator[None]:
        """Keep bars off within a `with` block.

        Args:
            name: Name of their owner.
            turn_off: Turns them off and returns the function that restores them; called only if
                they are not off yet.
        """
        with self._lock:
            calls, restore = self._off[name] if name in self._off else (0, turn_off())
            self._off[name] = (calls + 1, restore)
        try:
            yield
        finally:
            with self._lock:
                calls, restore = self._off.pop(name)
                if calls > 1:
                    self._off[name] = (calls - 1, restore)
                else:
                    restore()


_bars = _Bars()


def without_loading_bar() -> AbstractContextManager[None]:
    """Turn off the progress bar of transformers 5 for loading, within a `with` block."""
    return _bars.off("loading", _stop_loading_bar)


def _stop_loading_bar() -> Callable[[], None]:
    logging: Any = importlib.import_module("transformers.utils.logging")
    # Releases without this function are left unchanged.
    if not getattr(logging, "is_progress_bar_enabled", lambda: False)():
        return lambda: None
    logging.disable_progress_bar()
    enable: Callable[[], None] = logging.enable_progress_bar
    return enable


def without_bars(module: types.ModuleType) -> AbstractContextManager[None]:
    """Turn off the progress bars of a module that uses tqdm, within a `with` block."""
    return _bars.off(module.__name__, partial(_stop_bars, module))


def _stop_bars(module: types.ModuleType) -> Callable[[], None]:
    shown = {name: getattr(module, name) for name in ("tqdm", "trange") if hasattr(module, name)}
    for name, bar in shown.items():
        setattr(module, name, partial(bar, disable=True))

    def restore() -> None:
        for name, bar in shown.items():
            setattr(module, name, bar)

    return restore
