"""LiteLLM's rerank call, by each provider whose API the server speaks."""

import asyncio

import litellm
import pytest

# The provider's name, and what its base address ends with.
PROVIDERS = [
    ("cohere", ""),
    ("cohere", "/v1/rerank"),
    ("cohere", "/v2/rerank"),
    ("jina_ai", "/v1"),
    ("hosted_vllm", ""),
    ("hosted_vllm", "/v1"),
    ("huggingface", ""),
    # Of documents that are sent back, which LiteLLM asks for, infinity's are bare texts.
    ("infinity", "/infinity"),
]


def given(provider, path, servers, **other):
    return {
        "model": f"{provider}/{servers.model}",
        "api_base": servers.locked_url + path,
        "api_key": servers.key,
        "query": servers.query,
        "documents": servers.documents,
    } | other


def found(answer):
    return [(each["index"], each["relevance_score"]) for each in answer.results]


@pytest.mark.parametrize(("provider", "path"), PROVIDERS)
@pytest.mark.parametrize("top_n", [None, 1, 3])
def test_it_is_the_engines_ranking(provider, path, servers, check, top_n):
    answer = litellm.rerank(**given(provider, path, servers, top_n=top_n))
    check(found(answer), top_n)


@pytest.mark.parametrize(("provider", "path"), PROVIDERS)
def test_asynchronously_as_well(provider, path, servers, check):
    check(found(asyncio.run(litellm.arerank(**given(provider, path, servers)))))


@pytest.mark.parametrize(("provider", "path"), PROVIDERS)
def test_documents_come_back(provider, path, servers):
    answer = litellm.rerank(**given(provider, path, servers, return_documents=True))
    if (provider, path) not in {("cohere", ""), ("cohere", "/v2/rerank")}:  # v2 has no such field
        assert [each["document"]["text"] for each in answer.results] == [
            servers.documents[index] for index, _ in servers.ranking
        ]


def test_infinitys_form_without_documents_is_the_common_one(servers, check):
    answer = litellm.rerank(**given("infinity", "", servers, return_documents=False))
    check(found(answer))


@pytest.mark.parametrize(("provider", "path"), PROVIDERS)
def test_an_error_is_told(provider, path, servers):
    with pytest.raises(Exception, match="key"):
        litellm.rerank(**given(provider, path, servers, api_key="wrong"))
    if provider != "huggingface":  # which names no model
        with pytest.raises(Exception, match="rerank-v9"):
            litellm.rerank(**given(provider, path, servers, model=f"{provider}/rerank-v9"))
