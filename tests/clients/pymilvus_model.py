"""pymilvus.model's function for text-embeddings-inference."""

import pytest
from pymilvus.model import reranker


def test_the_tei_function_is_the_engines_ranking(servers, check):
    function = reranker.TEIRerankFunction(api_url=servers.open_url)
    found = function(servers.query, servers.documents)
    # It gives five, whatever it is asked for.
    check([(each.index, each.score) for each in found], 5)
    assert [each.text for each in found] == [
        servers.documents[index] for index, _ in servers.ranking[:5]
    ]


def test_an_error_of_the_tei_function_is_told(servers):
    function = reranker.TEIRerankFunction(api_url=servers.locked_url)
    with pytest.raises(RuntimeError, match="key"):
        function(servers.query, servers.documents)
