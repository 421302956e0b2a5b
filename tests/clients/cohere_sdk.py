"""Cohere's own package, the old `Client` and `ClientV2`, whatever its version."""

import asyncio

import cohere
import pytest

VERSION = tuple(int(part) for part in cohere.__version__.split(".")[:2])
CLIENTS = [cohere.Client, *([cohere.ClientV2] if hasattr(cohere, "ClientV2") else [])]
ASYNC = [cohere.AsyncClient, *([cohere.AsyncClientV2] if hasattr(cohere, "AsyncClientV2") else [])]


@pytest.fixture(params=CLIENTS, ids=lambda each: each.__name__)
def client(request, servers):
    return request.param(api_key=servers.key, base_url=servers.locked_url)


def found(answer):
    return [(each.index, each.relevance_score) for each in answer.results]


@pytest.mark.parametrize("top_n", [None, 1, 3, 99])
def test_it_is_the_engines_ranking(client, servers, check, top_n):
    answer = client.rerank(
        model=servers.model, query=servers.query, documents=servers.documents, top_n=top_n
    )
    check(found(answer), top_n)
    assert answer.id
    assert answer.meta.billed_units.search_units == 1


@pytest.mark.parametrize("kind", ASYNC, ids=lambda each: each.__name__)
def test_asynchronously_as_well(servers, check, kind):
    async def ask():
        client = kind(api_key=servers.key, base_url=servers.locked_url)
        return await client.rerank(
            model=servers.model, query=servers.query, documents=servers.documents
        )

    check(found(asyncio.run(ask())))


def test_documents_come_back(servers):
    client = cohere.Client(api_key=servers.key, base_url=servers.locked_url)
    answer = client.rerank(
        model=servers.model,
        query=servers.query,
        documents=[{"text": text, "page": page} for page, text in enumerate(servers.documents)],
        return_documents=True,
    )
    assert [each.document.text for each in answer.results] == [
        servers.documents[index] for index, _ in servers.ranking
    ]


def test_an_unknown_model_is_told(client, servers):
    with pytest.raises(cohere.core.ApiError, match="rerank-v9"):
        client.rerank(model="rerank-v9", query=servers.query, documents=servers.documents)


def test_a_wrong_key_is_told(servers):
    client = CLIENTS[-1](api_key="wrong", base_url=servers.locked_url)
    with pytest.raises(cohere.core.ApiError) as told:
        client.rerank(model=servers.model, query=servers.query, documents=servers.documents)
    assert told.value.status_code == 401
    assert "key" in str(told.value.body)
