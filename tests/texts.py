"""The question of 1956 and its four documents, from the Milvus documentation (rerankers-bge.md)."""

from bge_rerank_adapters.engine.checkpoints.published import PUBLISHED_SCORES

QUERY = PUBLISHED_SCORES[0].pairs[0][0]
DOCUMENTS = [document for _, document in PUBLISHED_SCORES[0].pairs]
