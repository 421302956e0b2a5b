"""The decoder family: the logit of "Yes" after query, document and prompt.

It follows FlagEmbedding 1.4.2 (`inference/reranker/decoder_only/base.py`).
"""

from bge_rerank_adapters.engine.models.causal.config import parse_causal
from bge_rerank_adapters.engine.models.causal.model import CausalModel
from bge_rerank_adapters.engine.models.causal.tensors import CausalReader, HeadRow
from bge_rerank_adapters.engine.models.lora import open_weights
from bge_rerank_adapters.engine.models.source import ModelSource
from bge_rerank_adapters.engine.text.prompts import YES


class DecoderModel(CausalModel):
    """A language model on one device, of which only one token's logit is computed."""

    def __init__(self, source: ModelSource) -> None:
        """Load the weights.

        Raises:
            CheckpointError: Tensors are missing, damaged or of the wrong shape.
            UnsupportedCheckpointError: The config has an unsupported option.
        """
        config = parse_causal(source.config, folder=source.folder)
        yes_id = source.tokenizer.first_id(YES)
        with open_weights(source.folder, source.adapter) as weights:
            read = CausalReader(weights, config, source.device, source.dtype)
            head = HeadRow(read.head_name(), yes_id, config.vocabulary)
            super().__init__(read, depth=config.layers, head=head)
            read.check_all_read(config.layers)
