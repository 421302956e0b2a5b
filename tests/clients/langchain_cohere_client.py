"""langchain-cohere's compressor, over the version of Cohere's package that it brings."""

import cohere
import pytest
from langchain_cohere import CohereRerank
from langchain_core.documents import Document


def compressor(servers, *, model=None, key=None, top_n=3):
    """Give the client ready made, which every release takes."""
    kind = getattr(cohere, "ClientV2", cohere.Client)
    client = kind(api_key=key or servers.key, base_url=servers.locked_url)
    given = {"cohere_api_key": "unused"} if kind is cohere.Client else {}
    return CohereRerank(client=client, model=model or servers.model, top_n=top_n, **given)


@pytest.mark.parametrize("top_n", [1, 3, 99])
def test_documents_come_back_ranked(servers, check, top_n):
    documents = [
        Document(page_content=text, metadata={"index": index})
        for index, text in enumerate(servers.documents)
    ]
    found = compressor(servers, top_n=top_n).compress_documents(documents, servers.query)
    check([(each.metadata["index"], each.metadata["relevance_score"]) for each in found], top_n)


def test_plain_texts_are_ranked(servers, check):
    found = compressor(servers).rerank(servers.documents, servers.query, top_n=None)
    check([(each["index"], each["relevance_score"]) for each in found])


def test_an_error_is_told(servers):
    with pytest.raises(Exception, match="rerank-v9"):
        compressor(servers, model="rerank-v9").rerank(servers.documents, servers.query)
    with pytest.raises(Exception, match="key"):
        compressor(servers, key="wrong").rerank(servers.documents, servers.query)
