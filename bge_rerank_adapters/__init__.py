"""BGE rerankers for LangChain, LlamaIndex, Milvus and plain Python.

`Reranker` is the scoring engine; `bge_rerank_adapters.langchain`, `.llama_index` and `.milvus`
adapt it to their hosts; `RemoteReranker` asks a server instead. Importing this package imports
neither torch nor httpx: these come with `Reranker` and `RemoteReranker`.
"""

from typing import TYPE_CHECKING, Any

from bge_rerank_adapters.calls.ranked_document import RankedDocument
from bge_rerank_adapters.calls.ranking import Ranking, Scorer
from bge_rerank_adapters.engine.stats import EngineStats
from bge_rerank_adapters.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ClosedError,
    DeviceError,
    InputTypeError,
    NonFiniteLogitError,
    Overloaded,
    RemoteError,
    RerankError,
    RerankTimeoutError,
    ScoringError,
    SettingsError,
    UnsupportedCheckpointError,
    WorkerDiedError,
)

if TYPE_CHECKING:
    from bge_rerank_adapters.engine.reranker import Reranker
    from bge_rerank_adapters.remote import RemoteReranker

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "CheckpointNotFoundError",
    "ClosedError",
    "DeviceError",
    "EngineStats",
    "InputTypeError",
    "NonFiniteLogitError",
    "Overloaded",
    "RankedDocument",
    "Ranking",
    "RemoteError",
    "RemoteReranker",
    "RerankError",
    "RerankTimeoutError",
    "Reranker",
    "Scorer",
    "ScoringError",
    "SettingsError",
    "UnsupportedCheckpointError",
    "WorkerDiedError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import `Reranker` with torch, or `RemoteReranker` with httpx, on first use."""
    if name == "Reranker":
        from bge_rerank_adapters.engine.reranker import Reranker

        globals()[name] = Reranker
        return Reranker
    if name == "RemoteReranker":
        from bge_rerank_adapters.remote import RemoteReranker

        globals()[name] = RemoteReranker
        return RemoteReranker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
