"""LlamaIndex's rerankers of hosted APIs, those that are installed."""

import pytest
from llama_index.core.schema import NodeWithScore, TextNode

KINDS = ["cohere", "jinaai", "tei", "siliconflow"]


def reranker(kind, servers, *, top_n=99, model=None, key=None):
    model, key = model or servers.model, key or servers.key
    url = servers.locked_url
    module = pytest.importorskip(f"llama_index.postprocessor.{kind}_rerank")
    if kind == "cohere":
        return module.CohereRerank(model=model, api_key=key, base_url=url, top_n=top_n)
    if kind == "jinaai":
        return module.JinaRerank(model=model, api_key=key, base_url=f"{url}/v1", top_n=top_n)
    if kind == "siliconflow":
        address = f"{url}/v1/rerank"
        return module.SiliconFlowRerank(model=model, api_key=key, base_url=address, top_n=top_n)
    return module.TextEmbeddingInference(base_url=url, auth_token=f"Bearer {key}", top_n=top_n)


def nodes(servers):
    return [
        NodeWithScore(node=TextNode(text=text, id_=str(index)), score=0.5)
        for index, text in enumerate(servers.documents)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_n", [1, 3, 99])
def test_nodes_come_back_ranked(kind, servers, check, top_n):
    found = reranker(kind, servers, top_n=top_n).postprocess_nodes(
        nodes(servers), query_str=servers.query
    )
    check([(int(each.node.node_id), each.score) for each in found], top_n)


@pytest.mark.parametrize("kind", ["cohere", "jinaai", "siliconflow"])
def test_an_error_is_told(kind, servers):
    for given, told in (({"model": "rerank-v9"}, "rerank-v9"), ({"key": "wrong"}, "key")):
        with pytest.raises(Exception, match=told):
            reranker(kind, servers, **given).postprocess_nodes(
                nodes(servers), query_str=servers.query
            )


def test_of_its_tei_client_an_error_is_at_least_one(servers):
    """It reads no status, and asks of the body only that it be as long as the nodes are many."""
    with pytest.raises(AssertionError):
        reranker("tei", servers, key="wrong").postprocess_nodes(
            nodes(servers), query_str=servers.query
        )
