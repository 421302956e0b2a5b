"""Haystack's rankers of hosted APIs: Cohere, Jina, text-embeddings-inference and vLLM."""

import pytest
from haystack import Document
from haystack.utils import Secret
from haystack_integrations.components.rankers.cohere import CohereRanker
from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker
from haystack_integrations.components.rankers.jina import JinaRanker
from haystack_integrations.components.rankers.vllm import VLLMRanker

KINDS = ["cohere", "jina", "tei", "vllm", "vllm at the root"]


def ranker(kind, servers, *, top_k=99, model=None, key=None):
    model, secret = model or servers.model, Secret.from_token(key or servers.key)
    url = servers.locked_url
    if kind == "cohere":
        return CohereRanker(model=model, api_key=secret, api_base_url=url, top_k=top_k)
    if kind == "jina":
        return JinaRanker(model=model, api_key=secret, base_url=f"{url}/v1/rerank", top_k=top_k)
    if kind == "tei":
        return HuggingFaceTEIRanker(url=url, token=secret, top_k=top_k, max_retries=0)
    base = url if kind == "vllm at the root" else f"{url}/v1"
    return VLLMRanker(model=model, api_key=secret, api_base_url=base, top_k=top_k)


def documents(servers):
    return [
        Document(content=text, meta={"index": index})
        for index, text in enumerate(servers.documents)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [1, 3, 99])
def test_documents_come_back_ranked(kind, servers, check, top_k):
    made = ranker(kind, servers, top_k=top_k)
    found = made.run(query=servers.query, documents=documents(servers))["documents"]
    check([(each.meta["index"], each.score) for each in found], top_k)


def test_jinas_counts_tokens(servers):
    found = ranker("jina", servers).run(query=servers.query, documents=documents(servers))
    assert found["meta"]["usage"] == {
        "prompt_tokens": servers.tokens,
        "total_tokens": servers.tokens,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_told(kind, servers):
    wrong = [({"key": "wrong"}, "key|401")]
    if kind != "tei":  # which names no model
        wrong.append(({"model": "rerank-v9"}, "rerank-v9|404"))
    for given, told in wrong:
        with pytest.raises(Exception, match=told):
            ranker(kind, servers, **given).run(query=servers.query, documents=documents(servers))
