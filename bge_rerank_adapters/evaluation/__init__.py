"""Measures whether reranking helps on given documents, at which depth, and at what cost.

```python
from bge_rerank_adapters.evaluation import bm25, evaluate, read_collection
from bge_rerank_adapters.settings import EngineSettings

collection = read_collection("scifact")  # a BEIR folder
report = evaluate(collection, bm25(collection, depth=50), {"tiny": EngineSettings(model="tiny")})
print(report)
```

Metrics are those of trec_eval, computed by ir-measures.
"""

from bge_rerank_adapters.calls.trec import Run, read_run, write_run
from bge_rerank_adapters.evaluation.collection import Collection, read_collection, sample_collection
from bge_rerank_adapters.evaluation.experiment import evaluate
from bge_rerank_adapters.evaluation.first_stage import bm25
from bge_rerank_adapters.evaluation.metrics import Comparison, Metrics, compare, measure
from bge_rerank_adapters.evaluation.report import Report, best_threshold
from bge_rerank_adapters.evaluation.scored import Scored

__all__ = [
    "Collection",
    "Comparison",
    "Metrics",
    "Report",
    "Run",
    "Scored",
    "best_threshold",
    "bm25",
    "compare",
    "evaluate",
    "measure",
    "read_collection",
    "read_run",
    "sample_collection",
    "write_run",
]
