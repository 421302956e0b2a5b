"""infinity's own client, generated from its server's description."""

import pytest
from infinity_client import AuthenticatedClient
from infinity_client.api.default import rerank
from infinity_client.errors import UnexpectedStatus
from infinity_client.models import RerankInput


def ask(servers, *, key=None, **other):
    client = AuthenticatedClient(
        base_url=servers.locked_url, token=key or servers.key, raise_on_unexpected_status=True
    )
    given = {"query": servers.query, "documents": servers.documents, "model": servers.model}
    return rerank.sync(client=client, body=RerankInput(**given | other))


@pytest.mark.parametrize("top_n", [None, 1, 3])
def test_it_is_the_engines_ranking(servers, check, top_n):
    answer = ask(servers, top_n=top_n)
    check([(each.index, each.relevance_score) for each in answer.results], top_n)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == servers.tokens


def test_raw_scores_are_logits(servers):
    answer = ask(servers, raw_scores=True)
    found = [each.relevance_score for each in answer.results]
    assert found == pytest.approx(servers.logits, abs=1e-5)


def test_documents_come_back(servers):
    answer = ask(servers, return_documents=True)
    assert len(answer.results) == len(servers.documents)
    assert all(each.document for each in answer.results)


def test_an_error_is_told(servers):
    for given, told in (({"model": "rerank-v9"}, "rerank-v9"), ({"key": "wrong"}, "key")):
        with pytest.raises(UnexpectedStatus, match=told):
            ask(servers, **given)
