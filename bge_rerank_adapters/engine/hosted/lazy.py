"""The engine of an adapter: loaded on first use, or given."""

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any, Self

from bge_rerank_adapters.calls.ranking import Scorer
from bge_rerank_adapters.engine.checkpoints.hub import check_owner
from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.settings import EngineSettings


class LazyEngine:
    """The engine of an adapter, given or shared with all adapters of equal settings.

    Safe to use from many threads and event loops at once. A pickle has the settings, also those of
    a given engine, but neither weights nor the token. Copies share the engine.

    Attributes:
        settings: The engine's settings, loaded or not; `None` if a given engine has none.
    """

    def __init__(
        self,
        settings: EngineSettings | None,
        *,
        reranker: object = None,
        given: Iterable[str] = (),
    ) -> None:
        """Check what can be checked without weights; nothing is loaded yet.

        Args:
            settings: The settings of the engine to load; ignored if `reranker` is given.
            reranker: A ready engine to use instead, which its owner closes.
            given: Names of settings that the user gave; an error together with `reranker`.

        Raises:
            SettingsError: `reranker` is not an engine or was given with settings, or there is
                neither.
            CheckpointNotFoundError: The model is a name without an owner, and no folder.
            DeviceError: A named device does not exist.
        """
        self._given = None if reranker is None else _checked(reranker, given)
        own = getattr(reranker, "settings", None)
        known = own if isinstance(own, EngineSettings) else None
        self.settings = settings if reranker is None else known
        self._loaded: Scorer | None = None
        if reranker is None:
            _check_without_weights(self._settings_to_load())

    @classmethod
    def from_options(cls, model: str, options: Mapping[str, Any], *, reranker: object) -> Self:
        """Return the engine for the arguments of an adapter's constructor; errors as there.

        Args:
            model: The `model` setting.
            options: The other settings that the user gave.
            reranker: A ready engine, or `None`.
        """
        settings = EngineSettings(model=model, **options)
        given = [*options, *(["model"] if model != EngineSettings.model else [])]
        return cls(settings, reranker=reranker, given=given)

    def get(self) -> Scorer:
        """Return the engine; load it if it is not loaded, or was closed by another user.

        Raises:
            SettingsError: The engine was given, and is missing in this unpickled copy.
            RerankError: The model cannot be loaded.
        """
        if (loaded := self.loaded) is not None:
            return loaded
        settings = self._settings_to_load()
        # Imported here, so that an adapter can be made without loading torch.
        from bge_rerank_adapters.engine.shared import shared_reranker

        engine = self._loaded = shared_reranker(settings)
        return engine

    async def aget(self) -> Scorer:
        """Return what `get` returns, loading without blocking the event loop."""
        loaded = self.loaded
        return await asyncio.to_thread(self.get) if loaded is None else loaded

    def warm_up(self) -> None:
        """Load the engine and run it once, so that the first query does not wait for it."""
        run = getattr(self.get(), "warm_up", None)
        if run is not None:
            run()

    def close(self) -> None:
        """Release the shared engine, which is freed with its last user; a later use loads again.

        A given engine stays open. May be repeated.
        """
        self._loaded = None

    @property
    def loaded(self) -> Scorer | None:
        """The engine, given or loaded; `None` if the next use would load it."""
        loaded = self._loaded
        if self._given is not None or loaded is None:
            return self._given
        return None if getattr(loaded, "closed", False) else loaded

    def share(self, other: "LazyEngine") -> None:
        """Take over the engine that another one has loaded, if its settings are equal."""
        if self.settings == other.settings:
            self._loaded = other._loaded  # noqa: SLF001 - its own class

    def _settings_to_load(self) -> EngineSettings:
        if self.settings is None:
            raise SettingsError(
                "There is no model: this was made with reranker=, which its settings and its "
                "pickle cannot rebuild; give reranker= again, or a model."
            )
        return self.settings

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a pickle, without the engine."""
        return {"settings": self.settings, "_given": None, "_loaded": None}

    def __copy__(self) -> Self:
        """Return a copy that shares the engine; each is closed separately."""
        copied = type(self).__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy that shares the engine, as `__copy__`."""
        return self.__copy__()


class UsesEngine:
    """Base of drop-in classes that keep a `LazyEngine` as `_engine`."""

    _engine: LazyEngine

    @property
    def reranker(self) -> Any:
        """The engine: the one given, or one shared by all users of equal settings.

        It is loaded again if it was released, or closed by another user.

        Raises:
            SettingsError: The engine was given, and is missing in this unpickled copy.
            RerankError: The model cannot be loaded.
        """
        return self._engine.get()

    def close(self) -> None:
        """Release the shared engine, which is freed with its last user; a later use loads again.

        A given engine stays open, since its owner closes it. May be repeated.
        """
        self._engine.close()


def _check_without_weights(settings: EngineSettings) -> None:
    """Raise errors of loading that need neither weights nor a network to be found."""
    check_owner(settings.model)
    named = [name for name in settings.devices if name not in ("auto", "cpu")]
    if named:
        # Imported here, so that an adapter for a CPU can be made without loading torch.
        from bge_rerank_adapters.engine.models.devices import resolve_device

        for name in named:
            resolve_device(name)


def _checked(reranker: object, given: Iterable[str]) -> Scorer:
    if isinstance(reranker, type):
        raise SettingsError(
            f"reranker must be an engine, got the class {reranker.__name__}; "
            f"give one that is loaded: reranker={reranker.__name__}(...)."
        )
    if not isinstance(reranker, Scorer):
        raise SettingsError(
            "reranker must be an engine with the methods rerank and arerank, got "
            f"{type(reranker).__name__}; give one such as Reranker(...) or RemoteReranker(...)."
        )
    names = ", ".join(given)
    if names:
        raise SettingsError(
            f"reranker= is a ready engine, so {names} cannot be set beside it; "
            "give one or the other."
        )
    return reranker
