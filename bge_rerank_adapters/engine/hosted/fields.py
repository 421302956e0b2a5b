"""The pydantic fields that the LangChain and LlamaIndex adapters share, and their engine.

Both hosts build their components on pydantic, and depend on it; the core does not.
"""

from collections.abc import Mapping
from typing import Any, Self

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
from bge_rerank_adapters.engine.hosted.lazy import LazyEngine
from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.settings import EngineSettings, check_setting
from bge_rerank_adapters.settings.other_names import unexpected_option
from bge_rerank_adapters.settings.table import rows, with_entries

_ROWS = rows(EngineSettings)
# Pydantic would accept True and "256" as numbers, which the engine refuses. Not the token, which
# becomes pydantic's SecretStr.
_CHECKED_BY_THE_ENGINE = tuple(name for name in _ROWS if name != "token")


def _engine_field(name: str) -> Any:
    row = _ROWS[name]
    return Field(
        default=row.default,
        description=row.sentence,
        exclude=row.secret or None,
        repr=not row.secret,
        frozen=True,
    )


class AdapterSettings(BaseModel):
    """Settings of an adapter, checked at once; the engine is loaded on first use.

    `top_k` (or `top_n`) and `score_threshold` may be assigned later and are checked again. The
    engine's own settings are fixed: make another adapter, or use `model_copy(update=...)`.

    Attributes:
        top_k: Maximum number of results; `None` is all. `top_n` is the same setting.
        score_threshold: Lowest score to keep, in [0, 1], inclusive; applied before `top_k`.
        reranker: A ready engine, or anything with the methods of `Scorer`, to use instead of
            loading one; not together with engine settings.
        **settings: The engine's settings.
    """

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        validate_default=False,
        arbitrary_types_allowed=True,
        populate_by_name=True,
        protected_namespaces=(),
        # Errors do not show the input, which may hold the token.
        hide_input_in_errors=True,
    )

    model: str | None = _engine_field("model")
    top_k: int | None = Field(default=3, validation_alias=AliasChoices("top_k", "top_n"))
    score_threshold: float | None = None
    reranker: Any = Field(default=None, exclude=True, repr=False, frozen=True)
    device: str | list[str] = _engine_field("device")
    dtype: str = _engine_field("dtype")
    max_length: int = _engine_field("max_length")
    query_max_length: int | None = _engine_field("query_max_length")
    query_truncation_side: str = _engine_field("query_truncation_side")
    long_documents: str = _engine_field("long_documents")
    window_tokens: int | None = _engine_field("window_tokens")
    window_overlap_tokens: int | None = _engine_field("window_overlap_tokens")
    revision: str | None = _engine_field("revision")
    cache_dir: str | None = _engine_field("cache_dir")
    local_files_only: bool = _engine_field("local_files_only")
    token: SecretStr | None = _engine_field("token")
    backend: str = _engine_field("backend")
    family: str | None = _engine_field("family")
    prompt: str | None = _engine_field("prompt")
    query_instruction: str | None = _engine_field("query_instruction")
    passage_instruction: str | None = _engine_field("passage_instruction")
    cutoff_layers: int | list[int] | None = _engine_field("cutoff_layers")
    compress_ratio: int | None = _engine_field("compress_ratio")
    compress_layers: int | list[int] | None = _engine_field("compress_layers")
    pack_tokens: int | str = _engine_field("pack_tokens")
    max_queued_pairs: int = _engine_field("max_queued_pairs")

    _engine: LazyEngine | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and {"top_k", "top_n"} <= data.keys():
            raise SettingsError(
                f"top_k ({data['top_k']!r}) and top_n ({data['top_n']!r}) are one setting; "
                "give one of top_k, top_n."
            )
        return data

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, data: Any) -> Any:
        """Refuse options that do not exist, and name those that do."""
        for name in data if isinstance(data, Mapping) else ():
            if name not in (*cls.model_fields, "top_n"):
                error = unexpected_option(str(name), of=cls.__name__, allowed=cls.model_fields)
                raise SettingsError(str(error))
        return data

    @field_validator(*_CHECKED_BY_THE_ENGINE, mode="before")
    @classmethod
    def _checked_by_the_engine(cls, value: Any, info: ValidationInfo) -> Any:
        # The dump of an adapter with a ready engine of unknown settings has no model.
        if info.field_name is None or (info.field_name == "model" and value is None):
            return value
        checked = check_setting(info.field_name, value)
        return list(checked) if isinstance(checked, tuple) else checked

    @field_validator("top_k", "score_threshold", mode="before")
    @classmethod
    def _checked_limit(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        return getattr(Limits(**{name: value}), name)

    @model_validator(mode="after")
    def _keep_the_engine(self) -> Self:
        # Also runs after assignments, which cannot change the engine's settings.
        if self._engine is None:
            self._engine = self._make_engine()
        return self

    def _make_engine(self) -> LazyEngine:
        if self.reranker is None:
            return LazyEngine(self._engine_settings())
        given = [name for name in _ROWS if name in self.model_fields_set]
        engine = LazyEngine(None, reranker=self.reranker, given=given)
        # Shown, dumped and pickled as if they had been given; without settings there is no model.
        self.__dict__.update(engine.settings.to_dict() if engine.settings else {"model": None})
        return engine

    @property
    def top_n(self) -> int | None:
        """`top_k` under the host's name for it."""
        return self.top_k

    @top_n.setter
    def top_n(self, value: int | None) -> None:
        self.top_k = value

    @property
    def scorer(self) -> Scorer:
        """The engine: the one given, or one shared by all adapters with equal settings.

        Loads the model on first use.

        Raises:
            RerankError: The model cannot be loaded.
        """
        return self._lazy().get()

    async def ascorer(self) -> Scorer:
        """Return `scorer`, loading the model without blocking the event loop."""
        return await self._lazy().aget()

    def warm_up(self) -> Self:
        """Load the model now and run it once, so that the first query does not wait for it."""
        self._lazy().warm_up()
        return self

    def close(self) -> None:
        """Release the shared engine, which is freed with its last user; a later use loads again.

        An engine that was given as `reranker=` stays open, since its owner closes it.
        """
        self._lazy().close()

    def _lazy(self) -> LazyEngine:
        if self._engine is None:  # made by `model_construct`, which checks nothing
            self._engine = self._make_engine()
        return self._engine

    def _limits(self) -> dict[str, Any]:
        """Return `top_k` and `score_threshold` as the scorer takes them."""
        return {"top_k": self.top_k, "score_threshold": self.score_threshold}

    def model_copy(
        self,
        *,
        update: Mapping[str, Any] | None = None,
        deep: bool = False,  # noqa: ARG002 - settings are plain values, always copied
    ) -> Self:
        """Return an adapter with `update` applied, which is checked as in the constructor.

        The copy shares the engine if its settings still fit it.
        """
        given = dict(update or {})
        if "top_n" in given and "top_k" not in given:
            given["top_k"] = given.pop("top_n")
        values = {name: getattr(self, name) for name in type(self).model_fields} | given
        if values["reranker"] is not None:
            for name in _ROWS.keys() - given.keys():
                del values[name]
        made = type(self)(**values)
        made._lazy().share(self._lazy())  # noqa: SLF001 - its own class
        return made

    def __copy__(self) -> Self:
        """Copy the settings, and share the engine."""
        return self.model_copy()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Copy the settings, and share the engine."""
        return self.model_copy()

    def _engine_settings(self) -> EngineSettings | None:
        values: dict[str, Any] = {name: getattr(self, name) for name in _ROWS}
        if self.token is not None:
            values["token"] = self.token.get_secret_value()
        return None if self.model is None else EngineSettings(**values)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; refuse the engine's settings in an error that shows no token."""
        if name == "reranker" or name in _ROWS:
            raise SettingsError(
                f"{name} is fixed once the adapter is made; make another adapter, or one with "
                f"model_copy(update={{{name!r}: ...}})."
            )
        super().__setattr__(name, value)

    def __eq__(self, other: object) -> bool:
        """Compare the settings, without secrets; whether the engine is loaded does not matter."""
        if type(other) is not type(self) or not isinstance(other, AdapterSettings):
            return NotImplemented
        return self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings: never weights, engines or secrets."""
        return _unpickle_adapter, (type(self), self.model_dump())


AdapterSettings.__doc__ = with_entries(AdapterSettings.__doc__, _ROWS.values())


def _unpickle_adapter(kind: type[AdapterSettings], dumped: dict[str, Any]) -> AdapterSettings:
    return kind(**{name: value for name, value in dumped.items() if name in kind.model_fields})
