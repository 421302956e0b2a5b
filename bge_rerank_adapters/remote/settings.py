"""The settings of a remote reranker: one table with names, defaults, checks and texts."""

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.remote.apis import AUTO, NAMES
from bge_rerank_adapters.settings import checks
from bge_rerank_adapters.settings.table import Table, documented, row, setting

SCALES = (AUTO, "score", "logit")


def _url(name: str, value: object) -> str:
    """Check an address; no message shows one that may contain a password."""
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
    """The settings of a remote reranker.

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
        'The server\'s API: `"bge"` for our own server, `"tei"` for text-embeddings-inference, '
        '`"vllm"`, `"infinity"`, `"cohere"`, `"jina"`, `"llamacpp"`, `"sglang"`, or `"auto"` to '
        'find out; with `"vllm"` the server truncates long documents instead of refusing them',
    )
    model: str | None = setting(
        None, checks.optional(checks.text), "The server's name of its model", none="not sent"
    )
    api_key: str | None = setting(
        None,
        checks.header_secret,
        "Secret, sent as a bearer token; in no repr, dump, error, log or pickle",
        secret=True,
    )
    scale: str = setting(
        AUTO,
        checks.one_of(*SCALES, shown=str),
        'What the server\'s numbers are: `"score"`, in [0, 1]; `"logit"`, which vLLM (from '
        '`use_activation` on) and infinity are asked for if `api` is given; `"auto"` is logits '
        "from our server, text-embeddings-inference, llama.cpp and SGLang, else scores. llama.cpp "
        "and SGLang return the output of the model's head; if the checkpoint ends in its own "
        'sigmoid or softmax, give `"score"`',
    )
    timeout_s: float | None = setting(
        60.0,
        checks.optional(checks.seconds),
        "Maximum seconds of one HTTP request, with its retries and their waits; a call of many "
        "documents may be several requests",
        none="no limit",
    )
    max_retries: int | None = setting(
        None,
        checks.optional(checks.at_least(0)),
        "Maximum number of retries of a request; 0 fails at once",
        none="as many as `timeout_s` allows",
    )
    max_documents_per_request: int | None = setting(
        None,
        checks.optional(checks.count),
        "Longer calls are sent as several requests in parallel",
        none="the server's limit if it states one (32 or more for text-embeddings-inference), and "
        "at most 1000",
    )
    max_connections: int = setting(
        16, checks.count, "Maximum number of HTTP requests at once; one call uses half of them"
    )
