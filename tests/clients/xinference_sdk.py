"""Xinference's client, which asks what the model is before it uses it."""

import pytest
from xinference_client import RESTfulClient


def model(servers, *, name=None, key=None):
    client = RESTfulClient(servers.locked_url, api_key=key or servers.key)
    return client.get_model(name or servers.model)


@pytest.mark.parametrize("top_n", [None, 1, 3])
def test_it_is_the_engines_ranking(servers, check, top_n):
    answer = model(servers).rerank(servers.documents, servers.query, top_n=top_n)
    check([(each["index"], each["relevance_score"]) for each in answer["results"]], top_n)


def test_what_else_it_sends_is_honoured(servers):
    answer = model(servers).rerank(
        servers.documents, servers.query, return_documents=True, return_len=True
    )
    assert [each["document"]["text"] for each in answer["results"]] == [
        servers.documents[index] for index, _ in servers.ranking
    ]


def test_an_error_is_told(servers):
    with pytest.raises(RuntimeError, match="rerank-v9"):
        model(servers, name="rerank-v9")
    with pytest.raises(RuntimeError, match="key"):
        model(servers, key="wrong")
    handle = model(servers)
    handle._model_uid = "rerank-v9"
    with pytest.raises(RuntimeError, match="rerank-v9"):
        handle.rerank(servers.documents, servers.query)
