"""The decoder family: the logit of "Yes" after query, document and prompt.

As FlagEmbedding 1.4.2 computes it (`inference/reranker/decoder_only/base.py`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bge_rerank_adapters.engine.models.causal.config import parse_gemma
from bge_rerank_adapters.engine.models.causal.model import CausalModel, CausalReader
from bge_rerank_adapters.engine.models.devices import default_pack_tokens
from bge_rerank_adapters.engine.models.weights import open_weights
from bge_rerank_adapters.engine.text.tokenizer import TokenPair

_HEAD = "lm_head.weight"


class DecoderModel:
    """A language model on one device, of whose logits one is computed.

    Attributes:
        device: Where it runs.
        dtype: Of weights and activations.
        streams: 1: it runs a pack as a whole.
        pack_tokens: Token budget of a pack that suits the device.
    """

    streams = 1

    def __init__(
        self,
        config: dict[str, Any],
        folder: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        yes_id: int,
    ) -> None:
        """Load the weights.

        Args:
            config: The checkpoint's `config.json`.
            folder: Holds its safetensors.
            device: Where to run.
            dtype: A floating-point dtype.
            yes_id: The token whose logit is read.

        Raises:
            CheckpointError: Tensors are missing, damaged or of the wrong shape.
            UnsupportedCheckpointError: The config asks for something that is not known.
        """
        parsed = parse_gemma(config, folder=folder)
        self.device, self.dtype = device, dtype
        self.pack_tokens = default_pack_tokens(device)
        with open_weights(folder) as weights:
            self._model = CausalModel(
                parsed, weights, device=device, dtype=dtype, depth=parsed.layers
            )
            read = CausalReader(weights, parsed, device, dtype)
            # A head that is stored counts, even where the config says that it is the embeddings:
            # transformers 5 ties the two only where they are equal.
            tied = config.get("tie_word_embeddings", True) and _HEAD not in weights
            name = "model.embed_tokens.weight" if tied else _HEAD
            shape = (parsed.vocabulary, parsed.hidden)
            self._head = read.row(name, yes_id, shape)

    @torch.inference_mode()
    def logits(self, pairs: Sequence[TokenPair]) -> list[float]:
        """Return the logit of each pair of a pack.

        Args:
            pairs: n >= 1 pairs.

        Returns:
            n floats, which are NaN or infinite where the model gives that.
        """
        logits: list[float] = (self._model.last_states(pairs).float() @ self._head).tolist()
        return logits
