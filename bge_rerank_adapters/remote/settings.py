"""The settings of a remote reranker: one table of every name, default, check and text."""

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.remote.apis import AUTO, NAMES
from bge_rerank_adapters.settings import checks
from bge_rerank_adapters.settings.table import Table, documented, row, setting

SCALES = (AUTO, "score", "logit")


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


@documented
@dataclass(frozen=True, kw_only=True)
class RemoteSettings(Table):
    """Which server is asked, and how.

    The key is in no repr, dump, error, log or pickle.

    Attributes:
        **rows: Each as the text of its row says.
    """

    url: str = field(
        metadata=row(
            _url,
            'The server\'s address, `"http://gpu-box:8080"`, or that of its route, '
            '`"https://api.jina.ai/v1/rerank"`; without a user name, a password or a query',
        )
    )
    api: str = setting(
        AUTO,
        checks.one_of(*NAMES, shown=str),
        '`"auto"`, `"bge"` for our own server, `"tei"`, `"vllm"`, `"infinity"`, `"cohere"`, '
        '`"jina"`, `"llamacpp"` or `"sglang"`',
    )
    model: str | None = setting(
        None, checks.optional(checks.text), "What the server calls its model", none="not sent"
    )
    api_key: str | None = setting(
        None, checks.header_secret, "Secret, sent as a bearer token", secret=True
    )
    scale: str = setting(
        AUTO,
        checks.one_of(*SCALES, shown=str),
        'What the server\'s numbers are: `"score"`, in [0, 1], `"logit"`, or `"auto"`',
    )
    timeout_s: float | None = setting(
        60.0,
        checks.optional(checks.seconds),
        "Seconds that one HTTP request may take at most, waits and retries included",
        none="for ever",
    )
    max_retries: int | None = setting(
        None,
        checks.optional(checks.at_least(0)),
        "How often a request is sent again at most",
        none="as often as `timeout_s` allows",
    )
    max_documents_per_request: int | None = setting(
        None,
        checks.optional(checks.count),
        "Longer calls go in several requests",
        none="the server's own limit where it tells one",
    )
    max_connections: int = setting(16, checks.count, "Most HTTP requests under way at once")
