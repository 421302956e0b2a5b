"""A reranking server: one ASGI app for one machine, one Ray Serve application for many.

```sh
bge-rerank serve --model BAAI/bge-reranker-v2-m3             # one process, uvicorn
uvicorn bge_rerank_adapters.serve:app                        # the same, set up by BGE_RERANK_...
serve run bge_rerank_adapters.serve:deployment               # Ray Serve, replicas on many machines
```

It answers `POST /v1/rerank` and `/v2/rerank` as Cohere and Jina do, `POST /rerank` as
text-embeddings-inference does, and `/health`, `/metrics`, `/info`, `/v1/models`, `/docs`.

`app` and `deployment` are made from the environment on first use; `create_app` makes an app from
settings, or with a loaded engine.
"""

from typing import TYPE_CHECKING, Any

from bge_rerank_adapters.calls.extras import require

require("fastapi", "prometheus_client", of="serve", extra="serve")

from bge_rerank_adapters.serve.application import create_app  # noqa: E402 - the check must come first
from bge_rerank_adapters.serve.settings import ReplicaSettings, ServerSettings  # noqa: E402

if TYPE_CHECKING:
    from fastapi import FastAPI

    app: FastAPI
    deployment: Any

__all__ = ["ReplicaSettings", "ServerSettings", "app", "create_app", "deployment"]


def __getattr__(name: str) -> Any:
    """Make `app` or `deployment` from the environment on first use."""
    if name == "app":
        made: Any = create_app(ServerSettings.from_environment())
    elif name == "deployment":
        from bge_rerank_adapters.serve.replicas import bind

        made = bind(ServerSettings.from_environment(), ReplicaSettings.from_environment())
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = made
    return made


def __dir__() -> list[str]:
    return __all__
