"""The fields that the LangChain and LlamaIndex adapters share, and the engine behind them.

Both hosts build their components on pydantic, which they bring along; the core does not need it.
"""

import asyncio
from collections.abc import Mapping
from typing import Any, Self, cast

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from bge_rerank_adapters.calls.limits import Limits
from bge_rerank_adapters.calls.ranking import Scorer
from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.settings import EngineSettings, check_setting, setting_names

# Pydantic would make True a 1 and "256" a number, where the engine refuses them. A device and a
# dtype are made texts below, the token is a secret of pydantic's.
_CHECKED_BY_THE_ENGINE = tuple(
    name for name in setting_names() if name not in {"device", "dtype", "token"}
)


class AdapterSettings(BaseModel):
    """Settings of an adapter, checked at once; the engine itself is loaded on first use.

    `top_k` (or `top_n`) and `score_threshold` may be assigned later and are checked again. The
    engine's own settings cannot: make another adapter, or use `model_copy(update=...)`.

    Attributes:
        model: A checkpoint: a folder, a hub name, or `"tiny"` for the bundled one.
        top_k: How many results to return; `None` is all. `top_n` is the same thing.
        score_threshold: Lowest score to keep, in [0, 1] and inclusive; applied before `top_k`.
        reranker: A ready engine, or anything with the methods of `Scorer`, to use instead of
            loading one; not together with engine settings.
        device: See `EngineSettings`, as for all that follow.
        dtype: Number format of the model.
        max_length: Most tokens of a pair.
        query_max_length: Most tokens of the query.
        long_documents: `"truncate"` or `"window"`.
        window_tokens: Most document tokens of a window.
        window_overlap_tokens: Tokens that neighbouring windows share.
        revision: Branch, tag or commit on the hub.
        cache_dir: Folder of the hub's cache.
        local_files_only: Never ask the hub.
        token: Secret for the hub; in no repr, dump or pickle.
        backend: `"native"`, or `"flagembedding"`.
        family: How the checkpoint is run; found from its config if `None`.
        prompt: What a decoder is asked after the document.
        query_instruction: Put before each query.
        passage_instruction: Put before each document.
        cutoff_layers: The layer whose logit is read, or a list of one.
        compress_ratio: How many of a document's tokens are made one.
        compress_layers: Before which layers that is done.
        pack_tokens: Token budget of one forward pass.
        max_queued_pairs: Most pairs that may wait in the engine.
    """

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        validate_default=False,
        arbitrary_types_allowed=True,
        populate_by_name=True,
        protected_namespaces=(),
        # A rejected input is not echoed: it may hold the token.
        hide_input_in_errors=True,
    )

    model: str | None = Field(default=EngineSettings.model, frozen=True)
    top_k: int | None = Field(default=3, validation_alias=AliasChoices("top_k", "top_n"))
    score_threshold: float | None = None
    reranker: Any = Field(default=None, exclude=True, repr=False, frozen=True)
    device: str | list[str] = Field(default=cast(str, EngineSettings.device), frozen=True)
    dtype: str = Field(default=EngineSettings.dtype, frozen=True)
    max_length: int = Field(default=EngineSettings.max_length, frozen=True)
    query_max_length: int | None = Field(default=EngineSettings.query_max_length, frozen=True)
    long_documents: str = Field(default=EngineSettings.long_documents, frozen=True)
    window_tokens: int | None = Field(default=EngineSettings.window_tokens, frozen=True)
    window_overlap_tokens: int | None = Field(
        default=EngineSettings.window_overlap_tokens, frozen=True
    )
    revision: str | None = Field(default=EngineSettings.revision, frozen=True)
    cache_dir: str | None = Field(default=EngineSettings.cache_dir, frozen=True)
    local_files_only: bool = Field(default=EngineSettings.local_files_only, frozen=True)
    token: SecretStr | None = Field(default=None, exclude=True, repr=False, frozen=True)
    backend: str = Field(default=EngineSettings.backend, frozen=True)
    family: str | None = Field(default=EngineSettings.family, frozen=True)
    prompt: str | None = Field(default=EngineSettings.prompt, frozen=True)
    query_instruction: str | None = Field(default=EngineSettings.query_instruction, frozen=True)
    passage_instruction: str | None = Field(default=EngineSettings.passage_instruction, frozen=True)
    cutoff_layers: int | list[int] | None = Field(default=EngineSettings.cutoff_layers, frozen=True)
    compress_ratio: int | None = Field(default=EngineSettings.compress_ratio, frozen=True)
    compress_layers: int | list[int] | None = Field(
        default=cast(None, EngineSettings.compress_layers), frozen=True
    )
    pack_tokens: int | str = Field(default=EngineSettings.pack_tokens, frozen=True)
    max_queued_pairs: int = Field(default=EngineSettings.max_queued_pairs, frozen=True)

    # The engine with the settings it was loaded for: after `model_copy(update=...)` they differ
    # from the fields, and another engine is needed.
    _loaded: tuple[EngineSettings, Scorer] | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and {"top_k", "top_n"} <= data.keys():
            raise SettingsError(
                f"top_k ({data['top_k']!r}) and top_n ({data['top_n']!r}) are one setting; "
                "give one of top_k, top_n."
            )
        return data

    @field_validator(*_CHECKED_BY_THE_ENGINE, mode="before")
    @classmethod
    def _as_strict_as_the_engine(cls, value: Any, info: ValidationInfo) -> Any:
        # A dump of an adapter made with a ready engine of another kind has no model.
        if info.field_name is None or (info.field_name == "model" and value is None):
            return value
        checked = check_setting(info.field_name, value)
        return list(checked) if isinstance(checked, tuple) else checked

    @field_validator("device", "dtype", mode="before")
    @classmethod
    def _torch_value_as_text(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [str(each) for each in value]
        return str(value)

    @field_validator("top_k", "score_threshold", mode="before")
    @classmethod
    def _checked_limit(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        return getattr(Limits(**{name: value}), name)

    @field_validator("reranker")
    @classmethod
    def _reranker(cls, value: Any) -> Any:
        if isinstance(value, type):
            raise SettingsError(
                f"reranker must be an engine, got the class {value.__name__}; "
                f"give one that is loaded: reranker={value.__name__}(...)."
            )
        if value is not None and not isinstance(value, Scorer):
            raise SettingsError(
                f"reranker must have the methods rerank and arerank, got {type(value).__name__}."
            )
        return value

    @model_validator(mode="after")
    def _check_engine_settings(self) -> Self:
        if self.reranker is None:
            self._engine_settings()
        else:
            self._show_settings_of_injected_engine()
        return self

    def _show_settings_of_injected_engine(self) -> None:
        # Also runs at every assignment, when the fields are filled already: what tells the user's
        # settings from those shown here is the set of fields that were given.
        given = [name for name in setting_names() if name in self.model_fields_set]
        if given:
            raise SettingsError(
                f"reranker= is a ready engine, so {', '.join(given)} cannot be set beside it; "
                "give one or the other."
            )
        settings = getattr(self.reranker, "settings", None)
        self.__dict__.update(
            settings.to_dict() if isinstance(settings, EngineSettings) else {"model": None}
        )

    @property
    def top_n(self) -> int | None:
        """`top_k` under the name that users of the host type."""
        return self.top_k

    @top_n.setter
    def top_n(self, value: int | None) -> None:
        self.top_k = value

    @property
    def scorer(self) -> Scorer:
        """The engine that scores: the one given, or one shared by all with equal settings.

        Loads the model on first use.

        Raises:
            RerankError: The model cannot be loaded.
        """
        ready = self._ready_scorer()
        if ready is not None:
            return ready
        # Imported here so that an adapter can be made without loading torch.
        from bge_rerank_adapters.engine.shared import shared_reranker

        settings = self._engine_settings()
        engine = shared_reranker(settings)
        self._loaded = (settings, engine)
        return engine

    async def ascorer(self) -> Scorer:
        """Return `scorer`, loading the model without blocking the event loop."""
        ready = self._ready_scorer()
        if ready is not None:
            return ready
        return await asyncio.to_thread(lambda: self.scorer)

    def _ready_scorer(self) -> Scorer | None:
        """Return the engine if there is one that fits the settings and is not closed."""
        if self.reranker is not None:
            return cast(Scorer, self.reranker)
        if self._loaded is None:
            return None
        settings, engine = self._loaded
        if settings != self._engine_settings() or getattr(engine, "closed", False):
            return None
        return engine

    def warm_up(self) -> Self:
        """Load the model now and run it once, so that the first query does not wait for it."""
        run = getattr(self.scorer, "warm_up", None)
        if run is not None:
            run()
        return self

    def close(self) -> None:
        """Let go of the shared engine, which is freed with its last user; a later use loads again.

        An engine that was given as `reranker=` stays open: it is its owner's to close.
        """
        self._loaded = None

    def _limits(self) -> dict[str, Any]:
        """Return `top_k` and `score_threshold` as the scorer takes them."""
        return {"top_k": self.top_k, "score_threshold": self.score_threshold}

    def model_copy(
        self,
        *,
        update: Mapping[str, Any] | None = None,
        deep: bool = False,  # noqa: ARG002 - settings are plain values, always copied
    ) -> Self:
        """Return an adapter with `update` applied, which is checked as a constructor's settings.

        The engine is shared with the copy where the settings still fit it, and never copied.
        """
        given = dict(update or {})
        if "top_n" in given and "top_k" not in given:
            given["top_k"] = given.pop("top_n")
        values = {name: getattr(self, name) for name in type(self).model_fields} | given
        if values["reranker"] is not None:
            for name in set(setting_names()) - given.keys():
                del values[name]
        copied = type(self)(**values)
        copied._loaded = self._loaded  # noqa: SLF001 - its own class
        return copied

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Copy the settings; an engine holds threads and weights, and is shared instead."""
        return self.model_copy()

    def _engine_settings(self) -> EngineSettings:
        if self.model is None:
            raise SettingsError(
                "There is no model: this adapter was made with reranker=, which its settings "
                "cannot rebuild; give reranker= again, or model=."
            )
        values: dict[str, Any] = {name: getattr(self, name) for name in setting_names()}
        if self.token is not None:
            values["token"] = self.token.get_secret_value()
        return EngineSettings(**values)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; refuse the engine's settings, without pydantic's echo of a token."""
        if name == "reranker" or name in setting_names():
            raise SettingsError(
                f"{name} is fixed once the adapter is made; make another adapter, or one with "
                f"model_copy(update={{{name!r}: ...}})."
            )
        super().__setattr__(name, value)

    def __eq__(self, other: object) -> bool:
        """Adapters are equal where their settings are, loaded or not, secrets aside."""
        if type(other) is not type(self) or not isinstance(other, AdapterSettings):
            return NotImplemented
        return self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings: never weights, engines or secrets."""
        return _unpickle_adapter, (type(self), self.model_dump())


def _unpickle_adapter(kind: type[AdapterSettings], dumped: dict[str, Any]) -> AdapterSettings:
    return kind(**{name: value for name, value in dumped.items() if name in kind.model_fields})
