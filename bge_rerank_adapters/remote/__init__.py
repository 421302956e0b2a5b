"""Reranking on a server, with the interface of `Reranker`.

```python
from bge_rerank_adapters import RemoteReranker
from bge_rerank_adapters.langchain import BGEDocumentCompressor

reranker = RemoteReranker("http://gpu-box:8080")
compressor = BGEDocumentCompressor(reranker=reranker, top_k=3)
```

It needs httpx, but not torch, transformers or numpy, so a small image suffices:
`pip install --no-deps bge-rerank-adapters`, then httpx and the host.
"""

try:
    import httpx  # noqa: F401 - so that the error names the extra
except ImportError as error:
    raise ImportError(
        'bge_rerank_adapters.remote needs httpx; run: pip install "bge-rerank-adapters[remote]"'
    ) from error

from bge_rerank_adapters.remote.reranker import RemoteReranker
from bge_rerank_adapters.remote.settings import RemoteSettings
from bge_rerank_adapters.remote.stats import RemoteStats

__all__ = ["RemoteReranker", "RemoteSettings", "RemoteStats"]
