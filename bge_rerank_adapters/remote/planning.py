"""How a server is asked: what its address and what it says of itself tell."""

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
from bge_rerank_adapters.remote.exchange import Answer, Exchange
from bge_rerank_adapters.remote.refusals import refusal
from bge_rerank_adapters.remote.settings import RemoteSettings

# Of what a server says of itself.
_LONGEST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    """How the server is asked.

    Attributes:
        api: What it speaks.
        urls: Where; several where it has not answered yet.
        scale: What its numbers are: `"score"` or `"logit"`.
        max_documents: Most documents of a request.
    """

    api: Api
    urls: tuple[str, ...]
    scale: str
    max_documents: int


async def find_plan(settings: RemoteSettings, exchange: Exchange, deadline: float | None) -> Plan:
    """Return how the server is asked, which is asked for `/info` and `/v1/models` where needed.

    Raises:
        SettingsError: Logits are wanted of what may be any kind of server.
        RemoteError: It cannot be reached, or wants another key.
    """
    api = APIS.get(settings.api) or api_of_address(settings.url)
    limit_wanted = settings.max_documents_per_request is None
    info = None
    if api is None or (api.states_limit and limit_wanted):
        info = await _info(settings, exchange, deadline)
    if api is None:
        api = api_of_info(info)
    if api is COMMON:
        answer = await _asked(exchange, models_address(settings.url), deadline)
        api = api_of_models(_content(answer))
    if api is COMMON and settings.scale == "logit":
        raise SettingsError(_logits_of_any(settings.url))
    limit = settings.max_documents_per_request or limit_of_info(info, api)
    scale = api.scale if settings.scale == AUTO else settings.scale
    return Plan(api, addresses(settings.url, api), scale, limit)


async def _info(settings: RemoteSettings, exchange: Exchange, deadline: float | None) -> object:
    """Return what the server's `/info` says, or `None` where there is none."""
    url = info_address(settings.url)
    answer = await _asked(exchange, url, deadline)
    if answer.status in {401, 403}:
        raise refusal(answer, url, settings)
    return _content(answer)


async def _asked(exchange: Exchange, url: str, deadline: float | None) -> Answer:
    return await exchange.get(url, deadline=deadline, longest=_LONGEST_BYTES)


def _content(answer: Answer) -> object:
    try:
        return json.loads(answer.body) if answer.status == 200 else None
    except (ValueError, RecursionError):
        return None


def _logits_of_any(url: str) -> str:
    return (
        f'scale="logit" needs api=, for {url} may be of any kind, and would not be asked for '
        'logits; give api="vllm" or "infinity" if it is one, or api="jina" (api="cohere", if its '
        "path is /v2/rerank) where logits are what it answers anyway."
    )
