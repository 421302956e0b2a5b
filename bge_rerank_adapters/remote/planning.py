"""Finds out which API a server has, from its address and its description of itself."""

import json
from dataclasses import dataclass

from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.remote.apis import (
    APIS,
    AUTO,
    COMMON,
    Api,
    addresses,
    api_of_address,
    api_of_info,
    api_of_models,
    info_address,
    limit_of_info,
    models_address,
)
from bge_rerank_adapters.remote.refusals import Answer, refusal
from bge_rerank_adapters.remote.retrying import RetryingClient
from bge_rerank_adapters.remote.settings import RemoteSettings

# Limit on the size of a server's description.
_MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    """How requests to the server are made.

    Attributes:
        api: The server's API.
        urls: Addresses to try; one once the server has answered there.
        scale: What its numbers are: `"score"` or `"logit"`.
        max_documents: Maximum number of documents of a request.
    """

    api: Api
    urls: tuple[str, ...]
    scale: str
    max_documents: int


async def find_plan(
    settings: RemoteSettings, client: RetryingClient, deadline: float | None
) -> Plan:
    """Return the plan, after `GET /info` and `GET /v1/models` if they are needed for it.

    Raises:
        SettingsError: Logits are requested, but the kind of server is not known.
        RemoteError: The server cannot be reached, or refuses the key.
    """
    api = APIS.get(settings.api) or api_of_address(settings.url)
    limit_wanted = settings.max_documents_per_request is None
    info = None
    if api is None or (api.states_limit and limit_wanted):
        info = await _info(settings, client, deadline)
    if api is None:
        api = api_of_info(info)
    if api is COMMON:
        answer = await _get(client, models_address(settings.url), deadline)
        api = api_of_models(_content(answer))
    if api is COMMON and settings.scale == "logit":
        raise SettingsError(_logits_of_any(settings.url))
    limit = settings.max_documents_per_request or limit_of_info(info, api)
    scale = api.scale if settings.scale == AUTO else settings.scale
    return Plan(api, addresses(settings.url, api), scale, limit)


async def _info(settings: RemoteSettings, client: RetryingClient, deadline: float | None) -> object:
    """Return the server's `/info`, or `None` if it has none."""
    url = info_address(settings.url)
    answer = await _get(client, url, deadline)
    if answer.status in {401, 403}:
        raise refusal(answer, url, settings)
    return _content(answer)


async def _get(client: RetryingClient, url: str, deadline: float | None) -> Answer:
    return await client.get(url, deadline=deadline, max_bytes=_MAX_BYTES)


def _content(answer: Answer) -> object:
    try:
        return json.loads(answer.body) if answer.status == 200 else None
    except (ValueError, RecursionError):
        return None


def _logits_of_any(url: str) -> str:
    return (
        f'scale="logit" needs api=, since {url} may be any kind of server, and how to request '
        'logits is not known; give api="vllm" or "infinity" if it is one, or api="jina" '
        '(api="cohere", if its path is /v2/rerank) if it returns logits anyway.'
    )
