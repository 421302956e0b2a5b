"""The settings of a server, and their environment variables."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import partial
from pathlib import PurePath
from typing import Any, Self

from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.serve.container import is_injected
from bge_rerank_adapters.settings import EngineSettings, checks, setting_names
from bge_rerank_adapters.settings.parsing import COUNT, FLAG, NUMBER, ONE_OR_MORE, TEXTS
from bge_rerank_adapters.settings.table import Table, documented, rows, setting

PREFIX = "BGE_RERANK_"
# A scheme (browser extensions and apps have their own), a host and perhaps a port.
_ORIGIN = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^/\s]+")
ANY_MODEL = "*"


def _names(name: str, value: object) -> str | tuple[str, ...] | None:
    names = value if isinstance(value, tuple) else (value,)
    if value is not None and not (
        names and all(isinstance(each, str) and each.strip() for each in names)
    ):
        raise SettingsError(
            f"{name} must be a non-empty str, several of them or None, got {value!r}."
        )
    return value  # type: ignore[return-value]


def _origins(name: str, value: object) -> tuple[str, ...]:
    right = isinstance(value, tuple) and all(
        isinstance(each, str) and (each == "*" or _ORIGIN.fullmatch(each)) for each in value
    )
    if not right:
        raise SettingsError(
            f'{name} must be a tuple of origins such as "https://app.example.com", without a '
            f'slash at the end, or ("*",) for all; got {value!r}.'
        )
    return value  # type: ignore[return-value]


@documented
@dataclass(frozen=True, kw_only=True)
class ServerSettings(Table):
    """The settings of a server.

    The key is left out of reprs, logs and pickles.

    Attributes:
        engine: The settings of its engine.
        **rows: One for each row of the table.
        api_key_left_out: Whether pickling has removed an api_key, which must be given again.
    """

    engine: EngineSettings = field(default_factory=EngineSettings)
    served_model: str | tuple[str, ...] | None = setting(
        None,
        _names,
        "The model's name in requests and answers, or several of them, of which the first is in "
        'answers; `"*"` among them lets requests name any',
        none="the engine's model, of a folder its last part",
        format=ONE_OR_MORE,
    )
    api_key: str | None = setting(
        None,
        checks.header_secret,
        "Secret that every request but those for `/health` and `/docs` has to bring",
        none="no key: everyone is let in",
        secret=True,
    )
    max_body_bytes: int = setting(
        4 * 1024 * 1024, checks.count, "Maximum bytes of a request's body", format=COUNT
    )
    max_documents: int = setting(1000, checks.count, "Maximum documents of a request", format=COUNT)
    max_characters: int = setting(
        100_000, checks.count, "Maximum characters of a document, and of the query", format=COUNT
    )
    timeout_s: float = setting(
        60.0, checks.seconds, "Seconds that scoring a request may take", format=NUMBER
    )
    body_timeout_s: float = setting(
        30.0, checks.seconds, "Seconds that a body may take to arrive", format=NUMBER
    )
    max_concurrent_requests: int = setting(
        256, checks.count, "Maximum requests for scores that are served at a time", format=COUNT
    )
    max_reading_requests: int = setting(
        1024,
        checks.count,
        "Maximum requests whose bodies are arriving at a time; one more cancels the one that began "
        "first",
        format=COUNT,
    )
    max_reading_bytes: int = setting(
        256 * 1024 * 1024,
        checks.count,
        "Maximum bytes of all those bodies; more cancel the one that began first",
        format=COUNT,
    )
    strict: bool = setting(
        False,
        checks.flag,
        "Whether requests with unknown fields are refused; otherwise the fields are ignored",
        format=FLAG,
    )
    cors_origins: tuple[str, ...] = setting(
        (),
        _origins,
        "Origins whose web pages may send requests, such as `https://app.example.com`; "
        '`"*"` is all',
        format=TEXTS,
    )
    api_key_left_out: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        """Check every setting."""
        if not isinstance(self.engine, EngineSettings):
            raise SettingsError(
                f"engine must be an EngineSettings, got {type(self.engine).__name__}."
            )
        super().__post_init__()
        if self.api_key is not None:
            object.__setattr__(self, "api_key_left_out", False)

    @property
    def model_name(self) -> str:
        """The model's name in answers, and the first that requests may give it."""
        for name in _listed(self.served_model or ()):
            if name != ANY_MODEL:
                return name
        path = PurePath(self.engine.model)
        # Paths of the machine are not shown; a hub name is kept with its owner.
        is_folder = path.is_absolute() or self.engine.model.startswith((".", "~"))
        return path.name if is_folder and path.name else self.engine.model

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names that requests may give the model; `"*"` among them allows any."""
        return tuple(dict.fromkeys((self.model_name, *_listed(self.served_model or ()))))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values, without secrets."""
        return {"engine": self.engine.to_dict(), **super().to_dict()}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without secrets; `create_app` refuses the copy until its key is restored."""
        plain = {each.name: getattr(self, each.name) for each in fields(self)}
        left_out = self.api_key is not None or self.api_key_left_out
        plain |= {"api_key": None, "api_key_left_out": left_out}
        return partial(type(self), **plain), ()

    @classmethod
    def from_environment(
        cls,
        environment: Mapping[str, str] | None = None,
        *,
        given: Mapping[str, Any] | None = None,
    ) -> Self:
        """Return the settings from variables called `BGE_RERANK_` and the setting's name.

        Args:
            environment: The variables; `None` is the process's environment.
            given: Settings of the server or its engine by name, which override variables.

        Raises:
            SettingsError: A variable's name is not known, or its value is not allowed.
        """
        values = _read(environment) | dict(given or {})
        engine = {name: values[name] for name in setting_names() if name in values}
        own = {name: values[name] for name in rows(cls) if name in values}
        return cls(engine=EngineSettings(**engine), **own)

    def with_secrets(self, environment: Mapping[str, str] | None = None) -> Self:
        """Return the same settings with the secrets from the environment.

        Raises:
            SettingsError: Pickling has removed an api_key, and the environment has none.
        """
        values = _read(environment)
        api_key, token = values.get("api_key", self.api_key), values.get("token", self.engine.token)
        if api_key is None and self.api_key_left_out:
            raise SettingsError(
                f"This server needs its api_key, and {PREFIX}API_KEY is not set where it "
                "starts; set it on every machine, or in the runtime environment of the job."
            )
        return replace(self, api_key=api_key, engine=replace(self.engine, token=token))


@documented
@dataclass(frozen=True, kw_only=True)
class ReplicaSettings(Table):
    """Number and resources of Ray Serve's replicas.

    Attributes:
        **rows: One for each row of the table.
    """

    min_replicas: int = setting(
        1, checks.count, "Minimum number of replicas, kept without any load", format=COUNT
    )
    max_replicas: int = setting(
        4, checks.count, "Maximum number of replicas under load", format=COUNT
    )
    target_ongoing_requests: float = setting(
        16.0,
        checks.above_zero("requests"),
        "Requests of one replica at which another is started",
        format=NUMBER,
    )
    num_cpus: float = setting(
        1.0, checks.zero_or_more, "CPU cores that each replica reserves", format=NUMBER
    )
    num_gpus: float = setting(
        0.0,
        checks.zero_or_more,
        "GPUs that each replica reserves; may be a fraction",
        format=NUMBER,
    )

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        if self.max_replicas < self.min_replicas:
            raise SettingsError(
                f"max_replicas ({self.max_replicas}) must be at least min_replicas "
                f"({self.min_replicas})."
            )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Self:
        """Return the settings from `BGE_RERANK_...` variables.

        Raises:
            SettingsError: A variable's name is not known, or its value is not allowed.
        """
        values = _read(environment)
        return cls(**{name: values[name] for name in rows(cls) if name in values})


def _listed(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


_ROWS = rows(EngineSettings) | rows(ServerSettings) | rows(ReplicaSettings)


def variable(name: str) -> str:
    """Return the environment variable of a setting."""
    return PREFIX + name.upper()


def _read(environment: Mapping[str, str] | None) -> dict[str, Any]:
    """Return the values of all variables, by setting."""
    found = os.environ if environment is None else environment
    known = {variable(name): name for name in _ROWS}
    # A mistyped name must not, for example, leave a server without its key.
    unknown = [
        name
        for name in sorted(found)
        if name.startswith(PREFIX) and name not in known and not is_injected(name, found[name])
    ]
    if unknown:
        raise SettingsError(_not_known(unknown, sorted(known)))
    return {known[name]: _parse(name, known[name], found[name]) for name in known if name in found}


def _not_known(unknown: list[str], known: list[str]) -> str:
    # Without the prefix, which would make all names similar.
    names = [name.removeprefix(PREFIX) for name in known]
    near = [get_close_matches(name.removeprefix(PREFIX), names, 1, 0.75) for name in unknown]
    close = ", ".join(PREFIX + name for names in near for name in names)
    meant = f"did you mean {close}? Known are" if close else "known are"
    return f"{', '.join(unknown)} is not a setting; {meant} {', '.join(known)}."


def _parse(variable_name: str, name: str, value: str) -> Any:
    try:
        return _ROWS[name].format.read(value)
    except ValueError as error:
        shown = "a secret" if _ROWS[name].secret else repr(value)
        raise SettingsError(f"{variable_name} {error}, got {shown}.") from error
