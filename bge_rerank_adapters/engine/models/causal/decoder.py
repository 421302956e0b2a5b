"""The decoder family: the logit of "Yes" after query, document and prompt.

It follows FlagEmbedding 1.4.2 (`inference/reranker/decoder_only/base.py`).
"""

from pathlib import Path
from typing import Any

import torch

from bge_rerank_adapters.engine.checkpoints.adapter import Adapter
from bge_rerank_adapters.engine.models.causal.config import parse_causal
from bge_rerank_adapters.engine.models.causal.model import CausalModel
from bge_rerank_adapters.engine.models.causal.tensors import HeadRow
from bge_rerank_adapters.engine.models.lora import open_weights

_HEAD = "lm_head.weight"


class DecoderModel(CausalModel):
    """A language model on one device, of which only one token's logit is computed."""

    def __init__(
        self,
        config: dict[str, Any],
        folder: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        adapter: Adapter | None = None,
        yes_id: int,
    ) -> None:
        """Load the weights.

        Args:
            config: The checkpoint's `config.json`.
            folder: Holds its safetensors.
            device: Where to run.
            dtype: A floating-point dtype.
            adapter: What is merged with the weights, if anything.
            yes_id: The token whose logit is read.

        Raises:
            CheckpointError: Tensors are missing, damaged or of the wrong shape.
            UnsupportedCheckpointError: The config asks for something that is not known.
        """
        parsed = parse_causal(config, folder=folder)
        with open_weights(folder, adapter) as weights:
            # A stored head is used even if the config ties it to the embeddings: transformers 5
            # ties them only if they are equal.
            tied = parsed.tied and _HEAD not in weights
            name = "model.embed_tokens.weight" if tied else _HEAD
            head = HeadRow(name, yes_id, parsed.vocabulary)
            super().__init__(
                parsed, weights, device=device, dtype=dtype, depth=parsed.layers, head=head
            )
