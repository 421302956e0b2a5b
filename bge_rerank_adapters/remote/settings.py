"""The settings of a remote reranker, all checked in one place."""

import numbers
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.remote.apis import AUTO, NAMES

SCALES = (AUTO, "score", "logit")


@dataclass(frozen=True, kw_only=True)
class RemoteSettings:
    """Which server is asked, and how.

    Attributes:
        url: The server's address, `"http://gpu-box:8080"`, or that of its route,
            `"https://api.jina.ai/v1/rerank"`; without a user name, a password or a query.
        api: `"auto"`, `"bge"` for our own server, `"tei"`, `"vllm"`, `"infinity"`, `"cohere"` or
            `"jina"`.
        model: What the server calls its model; `None` is not sent.
        api_key: Secret, sent as a bearer token; in no repr, dump, error, log or pickle.
        scale: What the server's numbers are: `"score"`, in [0, 1], `"logit"`, or `"auto"`.
        timeout_s: Seconds that one HTTP request may take at most, waits and retries included;
            `None` is for ever.
        max_retries: How often a request is sent again at most.
        max_documents_per_request: Longer calls go in several requests; `None` is the server's own
            limit where it tells one.
        max_connections: Most HTTP requests under way at once.
    """

    url: str
    api: str = AUTO
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    scale: str = AUTO
    timeout_s: float | None = 60.0
    max_retries: int = 4
    max_documents_per_request: int | None = None
    max_connections: int = 16

    def __post_init__(self) -> None:
        """Check and normalise every setting."""
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings without the key, which is a secret."""
        return _unpickle_settings, (self.to_dict(),)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values for JSON, without the key."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.repr}

    def __repr__(self) -> str:
        """Show all but the key."""
        shown = ", ".join(f"{name}={value!r}" for name, value in self.to_dict().items())
        return f"RemoteSettings({shown})"


def _unpickle_settings(plain: dict[str, Any]) -> RemoteSettings:
    return RemoteSettings(**plain)


def _url(name: str, value: object) -> str:
    """Check an address; none of its messages shows one that may hold a password."""
    if not isinstance(value, str):
        raise SettingsError(f"{name} must be a str, got a {type(value).__name__}.")
    try:
        parts = urlsplit(value.strip())
        port_is_known = parts.port is None or parts.port > 0
    except ValueError as error:
        raise SettingsError(f"{name} is no address: {error}.") from error
    if "@" in parts.netloc:
        raise SettingsError(
            f"{name} must hold no user name or password, which errors would show; "
            "give the secret as api_key."
        )
    if parts.query or parts.fragment:
        raise SettingsError(f"{name} must end with its path; leave out what follows ? or #.")
    if parts.scheme not in {"http", "https"} or not parts.hostname or not port_is_known:
        raise SettingsError(
            f"{name} must be an address such as 'http://gpu-box:8080', got {value!r}."
        )
    return value.strip().rstrip("/")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise SettingsError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")
    return value


def _api(name: str, value: object) -> str:
    return _one_of(name, value, NAMES)


def _scale(name: str, value: object) -> str:
    return _one_of(name, value, SCALES)


def _model(name: str, value: object) -> str | None:
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise SettingsError(f"{name} must be a non-empty str or None, got {value!r}.")
    return value


def _secret(name: str, value: object) -> str | None:
    """Check what goes into a header, where other characters would break the request."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise SettingsError(f"{name} must be a str or None, got a {type(value).__name__}.")
    if not value or not value.isprintable() or " " in value:
        raise SettingsError(
            f"{name} must be one or more characters without spaces, line ends or control "
            "characters; a key that was read from a file often ends with one."
        )
    return value


def _seconds(name: str, value: object) -> float | None:
    if value is None:
        return None
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not value > 0:  # type: ignore[operator]
        raise SettingsError(f"{name} must be a number of seconds above 0 or None, got {value!r}.")
    return float(value)  # type: ignore[arg-type]


def _whole(name: str, value: object, *, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise SettingsError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    return int(value)


def _retries(name: str, value: object) -> int:
    return _whole(name, value, least=0)


def _count(name: str, value: object) -> int:
    return _whole(name, value, least=1)


def _optional_count(name: str, value: object) -> int | None:
    return None if value is None else _count(name, value)


_CHECKS = {
    "url": _url,
    "api": _api,
    "model": _model,
    "api_key": _secret,
    "scale": _scale,
    "timeout_s": _seconds,
    "max_retries": _retries,
    "max_documents_per_request": _optional_count,
    "max_connections": _count,
}
