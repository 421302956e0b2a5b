"""FlagEmbedding's rerankers by one import: its classes, run by this package's engine.

```python
from bge_rerank_adapters.flag_embedding import FlagReranker  # instead of: from FlagEmbedding import

reranker = FlagReranker("BAAI/bge-reranker-v2-m3", use_fp16=True)
scores = reranker.compute_score([["Who wrote Faust?", "Goethe did."], ["Who?", "It rains."]])
```

Constructors, `compute_score`, defaults and results follow FlagEmbedding 1.4.2, which need not be
installed. There are these differences:

- `devices=None` is one device, not all of them; a list is several.
- `trust_remote_code=True` runs no code of a checkpoint: none is needed.
- `compute_score([])` is `[]`, not an IndexError, and there are no progress bars.
- `use_fp16` and `use_bf16` are the fastest half precision that the device runs, or float32 where
  that is faster; without them it is float32, in the layerwise and lightweight classes as well.
- An unknown argument, or a layer that the model does not have, is an error.
"""

from bge_rerank_adapters.flag_embedding.auto import FlagAutoReranker
from bge_rerank_adapters.flag_embedding.decoders import (
    FlagLLMReranker,
    LayerWiseFlagLLMReranker,
    LightWeightFlagLLMReranker,
)
from bge_rerank_adapters.flag_embedding.encoder import FlagReranker

__all__ = [
    "FlagAutoReranker",
    "FlagLLMReranker",
    "FlagReranker",
    "LayerWiseFlagLLMReranker",
    "LightWeightFlagLLMReranker",
]
