"""A table of the APIs of rerank servers, and how a server's API is recognised.

Sources, besides our own server: text-embeddings-inference `router/src/http/types.rs` and
`server.rs`; vLLM `vllm/entrypoints/pooling/scoring/protocol.py`; infinity_emb 0.0.78
`fastapi_schemas/pymodels.py`; the cohere package 7.3 `v2/raw_client.py`; Jina's public examples;
llama.cpp `tools/server/server-common.cpp` (format_response_rerank) and `server-context.cpp`; SGLang
`srt/entrypoints/openai/protocol.py`, `serving_rerank.py` and `srt/layers/activation.py`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.settings.token_limits import NO_TOKEN_LIMITS, TokenLimits

AUTO = "auto"
# Documents of a request, even if the server allows more: parts of a long call run in parallel.
_MAX_DOCUMENTS = 1000
# Hosts whose API is known.
_HOSTS = {"api.cohere.com": "cohere", "api.cohere.ai": "cohere", "api.jina.ai": "jina"}
_VERSION = re.compile(r"/v\d+$")


@dataclass(frozen=True, slots=True)
class Api:
    """The request format of one kind of server.

    Attributes:
        paths: Possible paths of its route; the first that exists is used.
        texts: Name of the field with the documents.
        constants: Further fields of every request.
        raw: Fields that request logits instead of scores; `None` if there are none.
        scale: What its numbers are by default: `"score"` or `"logit"`.
        max_documents: Maximum number of documents of a request, if the server states none.
        token_limits: The names of its fields for the limits of `TokenLimits` that it supports.
        states_limit: Whether `GET /info` has `max_client_batch_size`.
    """

    paths: tuple[str, ...]
    texts: str = "documents"
    constants: Mapping[str, Any] = field(default_factory=dict)
    raw: Mapping[str, Any] | None = None
    scale: str = "score"
    max_documents: int = _MAX_DOCUMENTS
    token_limits: Mapping[str, str] = field(default_factory=dict)
    states_limit: bool = False

    def request(
        self,
        query: str,
        texts: list[str],
        *,
        model: str | None,
        scale: str,
        token_limits: TokenLimits = NO_TOKEN_LIMITS,
    ) -> dict[str, Any]:
        """Return the JSON body of a request for the scores of all n texts.

        Raises:
            SettingsError: The API has no field for one of the limits.
        """
        body: dict[str, Any] = {"query": query, self.texts: texts, **self.constants}
        if model is not None:
            body["model"] = model
        if self.texts == "documents":
            # Without it some servers return only a few.
            body["top_n"] = len(texts)
        if scale == "logit" and self.raw is not None:
            body |= self.raw
        for name, tokens in token_limits.given().items():
            if name not in self.token_limits:
                raise SettingsError(_no_field(name))
            body[self.token_limits[name]] = tokens
        return body


# vLLM's names; Cohere has the first.
_OUR_TOKEN_LIMITS = {
    "max_document_tokens": "max_tokens_per_doc",
    "max_query_tokens": "max_tokens_per_query",
    "max_pair_tokens": "truncate_prompt_tokens",
}
APIS: Mapping[str, Api] = {
    "bge": Api(
        ("/v1/rerank",),
        constants={"return_details": True},
        token_limits=_OUR_TOKEN_LIMITS,
        states_limit=True,
    ),
    "tei": Api(
        ("/rerank",),
        texts="texts",
        constants={"truncate": True},
        raw={"raw_scores": True},
        scale="logit",
        max_documents=32,
        states_limit=True,
    ),
    # -1 truncates to the model's length; without it a pair that is too long is an error.
    "vllm": Api(
        ("/rerank",),
        constants={"truncate_prompt_tokens": -1},
        raw={"use_activation": False},
        token_limits=_OUR_TOKEN_LIMITS,
    ),
    "infinity": Api(("/rerank",), raw={"raw_scores": True}),
    "cohere": Api(("/v2/rerank",), token_limits={"max_document_tokens": "max_tokens_per_doc"}),
    # Other servers with Jina's API may have no version in their path.
    "jina": Api(("/v1/rerank", "/rerank"), constants={"return_documents": False}),
    # Both return the output of the model's head, which is a logit for BGE rerankers.
    "llamacpp": Api(("/v1/rerank",), scale="logit"),
    "sglang": Api(("/v1/rerank",), constants={"return_documents": False}, scale="logit"),
}
# Values of `owned_by` in `GET /v1/models` that identify a server.
_OWNERS = ("llamacpp", "sglang")
# The name of our own server in `/info`.
OUR_NAME = "bge_rerank_adapters"
# The common part of the APIs of Cohere, Jina, vLLM, infinity and our own server.
COMMON = Api(("/rerank", "/v1/rerank", "/v2/rerank"))
NAMES = (AUTO, *APIS)


def _no_field(name: str) -> str:
    able = " or ".join(f'"{api}"' for api, each in APIS.items() if name in each.token_limits)
    return (
        f"{name} is not supported by this server, whose API has no field for it; leave it out, or "
        f"give api={able} if the server is one of these."
    )


def api_of_address(url: str) -> Api | None:
    """Return the API that an address implies, or `None` if the server must be queried for it.

    A known host has its own API; a path such as `/v1/rerank` or `/v1` means the common one.
    """
    parts = urlsplit(url)
    if parts.hostname in _HOSTS:
        return APIS[_HOSTS[parts.hostname]]
    versioned = _VERSION.search(parts.path.removesuffix("/rerank"))
    return COMMON if versioned else None


def addresses(url: str, api: Api) -> tuple[str, ...]:
    """Return the possible addresses of the route, the most likely one first."""
    path = urlsplit(url).path
    if path.endswith("/rerank"):
        return (url,)
    if _VERSION.search(path):
        return (f"{url}/rerank",)
    return tuple(f"{url}{each}" for each in api.paths)


def api_of_info(info: object) -> Api:
    """Return the API of a server, given its `/info` or `None`."""
    if not isinstance(info, dict):
        return COMMON
    if info.get("server") == OUR_NAME:
        return APIS["bge"]
    return APIS["tei"] if "max_client_batch_size" in info else COMMON


def api_of_models(models: object) -> Api:
    """Return the API of a server, given its `/v1/models` or `None`."""
    listed = models.get("data") if isinstance(models, dict) else None
    first = listed[0] if isinstance(listed, list) and listed else None
    owner = first.get("owned_by") if isinstance(first, dict) else None
    return APIS[owner] if owner in _OWNERS else COMMON


def limit_of_info(info: object, api: Api) -> int:
    """Return the maximum number of documents of a request, given a server's `/info` or `None`."""
    limit = info.get("max_client_batch_size") if isinstance(info, dict) else None
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        return api.max_documents
    return min(limit, _MAX_DOCUMENTS)


def info_address(url: str) -> str:
    """Return the address at which our server and text-embeddings-inference describe themselves."""
    return _beside(url, "/info")


def models_address(url: str) -> str:
    """Return the address at which llama.cpp, SGLang and others list their models."""
    return _beside(url, "/v1/models")


def _beside(url: str, path: str) -> str:
    parts = urlsplit(url)
    base = _VERSION.sub("", parts.path.removesuffix("/rerank"))
    return urlunsplit(parts._replace(path=f"{base}{path}"))
