"""Reranking on many machines, as jobs of Ray Data.

```python
import ray

from bge_rerank_adapters.ray import explode, rerank_dataset

questions = ray.data.read_parquet("questions")  # rows of query_id, query and documents
ranked = rerank_dataset(questions, model="BAAI/bge-reranker-v2-m3", top_k=10, num_gpus=1)
explode(ranked).write_parquet("ranked")  # a row for each result
```

`rerank_files` does the same from files to files, and can continue an interrupted job.
"""

try:
    import ray.data as _ray_data  # noqa: F401 - `ray` alone lacks its dependencies
except ImportError as error:
    raise ImportError(
        'bge_rerank_adapters.ray needs ray[data]; run: pip install "bge-rerank-adapters[ray]"'
    ) from error

from bge_rerank_adapters.ray.dataset import explode, rerank_dataset, split_errors
from bge_rerank_adapters.ray.files import FilesReport, rerank_files

__all__ = ["FilesReport", "explode", "rerank_dataset", "rerank_files", "split_errors"]
