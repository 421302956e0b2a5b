"""BGE rerankers for LangChain, LlamaIndex, Milvus and plain Python.

`Reranker` is the scoring engine; `bge_rerank_adapters.langchain`, `.llama_index` and `.milvus`
fit it into their hosts. Importing this package loads no torch: that comes with `Reranker`.
"""

from typing import TYPE_CHECKING, Any

from bge_rerank_adapters.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ClosedError,
    DeviceError,
    InputTypeError,
    NonFiniteLogitError,
    Overloaded,
    RerankError,
    RerankTimeoutError,
    ScoringError,
    SettingsError,
    UnsupportedCheckpointError,
    WorkerDiedError,
)
from bge_rerank_adapters.ranking import RankedDocument, Ranking, Scorer
from bge_rerank_adapters.stats import EngineStats

if TYPE_CHECKING:
    from bge_rerank_adapters.engine import Reranker

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
    """Load the engine, and torch with it, when it is first asked for."""
    if name == "Reranker":
        from bge_rerank_adapters.engine import Reranker

        globals()[name] = Reranker
        return Reranker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
