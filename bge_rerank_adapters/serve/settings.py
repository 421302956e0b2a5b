"""The settings of a server, and the environment variables that carry them."""

import math
import numbers
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import PurePath
from typing import Any, Self

from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.settings import EngineSettings, setting_names

PREFIX = "BGE_RERANK_"
# What a header's value can hold, spaces left out: those around it are cut off on the way.
_KEY = re.compile(r"[^\s\x00-\x1f\x7f]+")
# A scheme (of an extension or an app, it may be its own), a host and perhaps a port.
_ORIGIN = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^/\s]+")
ANY_MODEL = "*"


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """All that decides what a server answers and what it refuses.

    Attributes:
        engine: Of the engine that it loads, which is the only one it has.
        served_model: The model's name in requests and answers, or several of them, of which the
            first is in answers; `"*"` among them lets requests name any. `None` is the engine's
            model, of a folder its last part.
        api_key: Secret that every request but those for `/health` and `/docs` has to bring; in no
            repr, log or pickle. `None` lets everyone in.
        max_body_bytes: Largest body of a request.
        max_documents: Most documents of a request.
        max_characters: Most characters of a document, and of the query.
        timeout_s: Seconds that scoring a request may take.
        body_timeout_s: Seconds that a body may take to arrive.
        max_concurrent_requests: Most requests for scores that are served at a time.
        max_reading_requests: Most requests whose bodies are arriving at a time; one more takes the
            place of the one that has been at it longest.
        max_reading_bytes: Most bytes of all those bodies, likewise.
        strict: Whether fields of requests that mean nothing here are refused, not ignored.
        cors_origins: Origins whose web pages may send requests, such as `https://app.example.com`;
            `"*"` is all. None by default.
        api_key_left_out: Of unpickled settings: there was an api_key, which has to be given again.
    """

    engine: EngineSettings = field(default_factory=EngineSettings)
    served_model: str | tuple[str, ...] | None = None
    api_key: str | None = field(default=None, repr=False)
    max_body_bytes: int = 4 * 1024 * 1024
    max_documents: int = 1000
    max_characters: int = 100_000
    timeout_s: float = 60.0
    body_timeout_s: float = 30.0
    max_concurrent_requests: int = 256
    max_reading_requests: int = 1024
    max_reading_bytes: int = 256 * 1024 * 1024
    strict: bool = False
    cors_origins: tuple[str, ...] = ()
    api_key_left_out: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        """Check every setting."""
        if not isinstance(self.engine, EngineSettings):
            raise SettingsError(
                f"engine must be an EngineSettings, got {type(self.engine).__name__}."
            )
        if self.served_model is not None and not _are_names(_listed(self.served_model)):
            raise SettingsError(
                "served_model must be a non-empty str, several of them or None, got "
                f"{self.served_model!r}."
            )
        _check_origins(self.cors_origins)
        if not isinstance(self.strict, bool):
            raise SettingsError(f"strict must be True or False, got {self.strict!r}.")
        _check_key(self.api_key)
        for name in ("max_body_bytes", "max_documents", "max_characters"):
            _check_count(name, getattr(self, name))
        for name in ("max_concurrent_requests", "max_reading_requests", "max_reading_bytes"):
            _check_count(name, getattr(self, name))
        for name in ("timeout_s", "body_timeout_s"):
            _check_seconds(name, getattr(self, name))
        if self.api_key is not None:
            object.__setattr__(self, "api_key_left_out", False)

    @property
    def model_name(self) -> str:
        """The model's name in answers, and the first that requests may give it."""
        for name in _listed(self.served_model or ()):
            if name != ANY_MODEL:
                return name
        path = PurePath(self.engine.model)
        # A path of the machine is nobody's business, while a hub name has its owner in front.
        is_folder = path.is_absolute() or self.engine.model.startswith((".", "~"))
        return path.name if is_folder and path.name else self.engine.model

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names that requests may give the model; `"*"` among them allows any."""
        return tuple(dict.fromkeys((self.model_name, *_listed(self.served_model or ()))))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings without secrets; `create_app` refuses them until the key is back."""
        plain = {each.name: getattr(self, each.name) for each in fields(self)}
        left_out = self.api_key is not None or self.api_key_left_out
        return _unpickle_settings, (plain | {"api_key": None, "api_key_left_out": left_out},)

    @classmethod
    def from_environment(
        cls,
        environment: Mapping[str, str] | None = None,
        *,
        given: Mapping[str, Any] | None = None,
    ) -> Self:
        """Return the settings that `BGE_RERANK_...` variables name, each named as its setting.

        Args:
            environment: `None` is the process's own.
            given: Settings of the server or its engine, by their names, that come before them.

        Raises:
            SettingsError: A variable's name is not known, or its value is not allowed.
        """
        values = _read(environment) | dict(given or {})
        engine = {name: values[name] for name in setting_names() if name in values}
        own = {name: values[name] for name in _SERVER if name in values}
        return cls(engine=EngineSettings(**engine), **own)

    def with_secrets(self, environment: Mapping[str, str] | None = None) -> Self:
        """Return the same settings with the secrets that the environment holds.

        Raises:
            SettingsError: They had an api_key once, and the environment has none.
        """
        values = _read(environment)
        api_key, token = values.get("api_key", self.api_key), values.get("token", self.engine.token)
        if api_key is None and self.api_key_left_out:
            raise SettingsError(
                f"This server is to have an api_key, and {PREFIX}API_KEY is not set where it "
                "starts; set it on every machine, or in the runtime environment of the job."
            )
        return replace(self, api_key=api_key, engine=replace(self.engine, token=token))


@dataclass(frozen=True, kw_only=True)
class ReplicaSettings:
    """How many replicas Ray Serve runs, and what each of them gets.

    Attributes:
        min_replicas: Fewest, kept without any load.
        max_replicas: Most under load.
        target_ongoing_requests: Requests of one replica at which another is started.
        num_cpus: Processor cores that each reserves.
        num_gpus: GPUs that each reserves; may be a part of one.
    """

    min_replicas: int = 1
    max_replicas: int = 4
    target_ongoing_requests: float = 16.0
    num_cpus: float = 1.0
    num_gpus: float = 0.0

    def __post_init__(self) -> None:
        """Check every setting."""
        _check_count("min_replicas", self.min_replicas)
        _check_count("max_replicas", self.max_replicas)
        if self.max_replicas < self.min_replicas:
            raise SettingsError(
                f"max_replicas ({self.max_replicas}) must be at least min_replicas "
                f"({self.min_replicas})."
            )
        _check_seconds("target_ongoing_requests", self.target_ongoing_requests, unit="requests")
        for name in ("num_cpus", "num_gpus"):
            value = getattr(self, name)
            if not _is_number(value) or value < 0:
                raise SettingsError(f"{name} must be a number of at least 0, got {value!r}.")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Self:
        """Return the settings that `BGE_RERANK_...` variables name.

        Raises:
            SettingsError: A variable's name is not known, or its value is not allowed.
        """
        values = _read(environment)
        return cls(**{name: values[name] for name in _REPLICAS if name in values})


def _unpickle_settings(plain: dict[str, Any]) -> ServerSettings:
    return ServerSettings(**plain)


def _listed(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _are_names(names: object) -> bool:
    return (
        isinstance(names, tuple)
        and bool(names)
        and all(isinstance(name, str) and name.strip() for name in names)
    )


def _check_origins(origins: object) -> None:
    right = isinstance(origins, tuple) and all(
        isinstance(each, str) and (each == "*" or _ORIGIN.fullmatch(each)) for each in origins
    )
    if not right:
        raise SettingsError(
            'cors_origins must be a tuple of origins such as "https://app.example.com", without a '
            f'slash at the end, or ("*",) for all; got {origins!r}.'
        )


def _check_key(api_key: object) -> None:
    if api_key is None:
        return
    if not isinstance(api_key, str):
        raise SettingsError(f"api_key must be a str or None, got a {type(api_key).__name__}.")
    if not _KEY.fullmatch(api_key):
        raise SettingsError(
            "api_key must be one or more characters without spaces, line ends or control "
            "characters among them; what was given is not shown, since it is a secret."
        )


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise SettingsError(f"{name} must be a whole number of at least 1, got {value!r}.")


def _check_seconds(name: str, value: object, *, unit: str = "seconds") -> None:
    if not _is_number(value) or not value > 0:  # type: ignore[operator]
        raise SettingsError(f"{name} must be a number of {unit} above 0, got {value!r}.")


def _is_number(value: object) -> bool:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and math.isfinite(value)  # type: ignore[arg-type]


def _text(value: str) -> str:
    return value


def _flag(value: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    try:
        return words[value.strip().lower()]
    except KeyError as error:
        raise ValueError("must be true or false") from error


def _whole(value: str) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise ValueError("must be a whole number") from error


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise ValueError("must be a number") from error


def _texts(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(","))


def one_or_more(value: str) -> str | tuple[str, ...]:
    """Return the names in a list with commas: a lone one as it is."""
    names = _texts(value)
    return names if len(names) > 1 else names[0]


def _wholes(value: str) -> tuple[int, ...]:
    return tuple(_whole(part) for part in value.split(","))


def _auto_or_whole(value: str) -> str | int:
    return value if value == "auto" else _whole(value)


_SERVER: dict[str, Callable[[str], Any]] = {
    "served_model": one_or_more,
    "api_key": _text,
    "max_body_bytes": _whole,
    "max_documents": _whole,
    "max_characters": _whole,
    "timeout_s": _number,
    "body_timeout_s": _number,
    "max_concurrent_requests": _whole,
    "max_reading_requests": _whole,
    "max_reading_bytes": _whole,
    "strict": _flag,
    "cors_origins": _texts,
}
_REPLICAS: dict[str, Callable[[str], Any]] = {
    "min_replicas": _whole,
    "max_replicas": _whole,
    "target_ongoing_requests": _number,
    "num_cpus": _number,
    "num_gpus": _number,
}
# Engine settings that are no plain text.
_ENGINE: dict[str, Callable[[str], Any]] = {
    "device": _texts,
    "max_length": _whole,
    "query_max_length": _whole,
    "window_tokens": _whole,
    "window_overlap_tokens": _whole,
    "local_files_only": _flag,
    "cutoff_layers": _whole,
    "compress_ratio": _whole,
    "compress_layers": _wholes,
    "pack_tokens": _auto_or_whole,
    "max_queued_pairs": _whole,
}
_PARSERS = dict.fromkeys(setting_names(), _text) | _ENGINE | _SERVER | _REPLICAS
_SECRETS = ("api_key", "token")


def variable(name: str) -> str:
    """Return the environment variable of a setting."""
    return PREFIX + name.upper()


def _read(environment: Mapping[str, str] | None) -> dict[str, Any]:
    """Return the values of all variables, by the names of their settings."""
    found = os.environ if environment is None else environment
    known = {variable(name): name for name in _PARSERS}
    # A name mistyped must not leave a server without its key, say.
    unknown = sorted(name for name in found if name.startswith(PREFIX) and name not in known)
    if unknown:
        raise SettingsError(
            f"{', '.join(unknown)} is not a setting; known are {', '.join(sorted(known))}."
        )
    return {known[name]: _parse(name, known[name], found[name]) for name in known if name in found}


def _parse(variable_name: str, name: str, value: str) -> Any:
    try:
        return _PARSERS[name](value)
    except ValueError as error:
        shown = "a secret" if name in _SECRETS else repr(value)
        raise SettingsError(f"{variable_name} {error}, got {shown}.") from error
