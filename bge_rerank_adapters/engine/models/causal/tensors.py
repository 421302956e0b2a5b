"""Reads the parts of a decoder from its checkpoint's tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bge_rerank_adapters.engine.models.causal.config import CausalConfig
from bge_rerank_adapters.engine.models.layers.linear import Linear, linear_maker
from bge_rerank_adapters.engine.models.layers.norm import RmsNorm
from bge_rerank_adapters.engine.models.weights import Weights
from bge_rerank_adapters.errors import CheckpointError, UnsupportedCheckpointError

HEAD, _WORDS = "lm_head.weight", "embed_tokens.weight"
# What old releases of transformers stored with each layer, computed from the config.
_BUFFER = "rotary_emb.inv_freq"


@dataclass(frozen=True, slots=True)
class HeadRow:
    """The row of a head's weight that gives the logit.

    Attributes:
        tensor: Name of the weight.
        row: Index of the row.
        rows: Number of rows of the weight.
    """

    tensor: str
    row: int = 0
    rows: int = 1


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """The weights of one decoder layer; a norm is `None` if the architecture lacks it.

    Attributes:
        attention_norm: Norm before the attention.
        query: Projection to all query heads.
        query_norm: Norm of each query head.
        key_value: Projection to all keys, then all values.
        key_norm: Norm of each key head.
        attention_output: Output projection of the attention.
        attention_end_norm: Norm after the attention.
        feed_norm: Norm before the feed-forward block.
        gate_up: Gate projection, then up projection.
        down: Down projection.
        feed_end_norm: Norm after the feed-forward block.
    """

    attention_norm: RmsNorm
    query: Linear
    query_norm: RmsNorm | None
    key_value: Linear
    key_norm: RmsNorm | None
    attention_output: Linear
    attention_end_norm: RmsNorm | None
    feed_norm: RmsNorm
    gate_up: Linear
    down: Linear
    feed_end_norm: RmsNorm | None


@dataclass(frozen=True, slots=True)
class CausalReader:
    """Reads the parts of a decoder from its tensors."""

    weights: Weights
    config: CausalConfig
    device: torch.device
    dtype: torch.dtype

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor on the device, in the reader's dtype unless another is given."""
        stored = self.weights.tensor(name, shape)
        # Always copied: a view of the file would become invalid when it is closed.
        return stored.to(self.device, dtype or self.dtype, copy=True)

    def row(self, name: str, index: int, shape: tuple[int, ...]) -> Tensor:
        """Return one row of a tensor of this shape, in float32."""
        row = self.weights.tensor(name, shape)[index]
        return row.to(self.device, torch.float32, copy=True)

    def words(self) -> Tensor:
        """Return the word embeddings; shape (vocabulary, hidden)."""
        name, vocabulary = self.words_name, self.config.vocabulary
        rows = self.weights.shape(name)[0]
        if rows != vocabulary:
            raise CheckpointError(
                f"{self.weights.path}: {name} has {rows} rows, but vocab_size in config.json is "
                f"{vocabulary}. If the embeddings were resized in training, write {rows} there; "
                "of a LoRA adapter, save what merge_and_unload() makes of it and give that folder."
            )
        return self.tensor(name, (vocabulary, self.config.hidden))

    def head_name(self) -> str:
        """Return the name of a language model's head, which may be the word embeddings.

        Raises:
            UnsupportedCheckpointError: An adapter changes only one of tied tensors.
        """
        words = self.inner + _WORDS
        if self.config.tied and not self.weights.keeps_tied(words, HEAD):
            raise UnsupportedCheckpointError(
                f"{self.weights.path} changes only one of {words} and {HEAD}, which config.json "
                "ties (tie_word_embeddings), and releases of peft differ in what becomes of the "
                "other; save what merge_and_unload() makes of it where it was trained, and give "
                "that folder."
            )
        # A stored head is used even if the config ties it to the embeddings: transformers 5 ties
        # them only if they are equal.
        return self.words_name if self.config.tied and HEAD not in self.weights else HEAD

    @property
    def words_name(self) -> str:
        """The name of the word embeddings: the head's, if they are stored as that alone."""
        name = self.inner + _WORDS
        only_head = self.config.tied and name not in self.weights and HEAD in self.weights
        return HEAD if only_head else name

    @property
    def inner(self) -> str:
        """What names begin with but the head's; `""` if the model was saved without its head."""
        bare = "model." + _WORDS not in self.weights and _WORDS in self.weights
        return "" if bare else "model."

    def check_all_read(self, depth: int, *, heads: Sequence[str] = ()) -> None:
        """Refuse tensors that are left out: with them, the author's model gives other scores.

        Args:
            depth: Number of layers that were read.
            heads: Names of heads that need not be read.

        Raises:
            UnsupportedCheckpointError: There is a tensor that the architecture does not have.
        """
        deeper = tuple(f"{self.inner}layers.{index}." for index in range(depth, self.config.layers))
        left = [
            name
            for name in self.weights.unread()
            if not (name.endswith(_BUFFER) or name.startswith(deeper) or name in heads)
        ]
        for name in left:
            if not (name.endswith(".bias") and self._is_zero(name)):
                more = f" and {len(left) - 1} more" if len(left) > 1 else ""
                raise UnsupportedCheckpointError(
                    f"{self.weights.path} has the tensor {name}{more}, which a model with this "
                    "config.json does not have; left out, scores would be others than those it "
                    "was trained for. Give the config.json that came with the weights, or take "
                    "the tensor out of the file if it is a leftover."
                )

    def _is_zero(self, name: str) -> bool:
        return not self.weights.tensor(name, self.weights.shape(name)).any()

    def norm(self, name: str, *, width: int | None = None) -> RmsNorm:
        """Return a norm in float32, of the hidden width unless another is given."""
        weight = self.tensor(f"{name}.weight", (width or self.config.hidden,), torch.float32)
        return RmsNorm(weight + float(self.config.norms_add_one), self.config.epsilon)

    def layer(self, index: int) -> DecoderLayer:
        """Return a layer, counted from 0."""
        name, config = f"{self.inner}layers.{index}", self.config
        queries = config.query_heads * config.head_width
        keys = config.key_heads * config.head_width
        hidden, inner, after = config.hidden, config.intermediate, config.norms_after
        bias, output_bias, feed_bias = config.input_bias, config.output_bias, config.feed_bias
        return DecoderLayer(
            attention_norm=self.norm(f"{name}.input_layernorm"),
            query=self._linear([f"{name}.self_attn.q_proj"], queries, hidden, bias=bias),
            query_norm=self._head_norm(f"{name}.self_attn.q_norm"),
            key_value=self._linear(
                [f"{name}.self_attn.k_proj", f"{name}.self_attn.v_proj"], keys, hidden, bias=bias
            ),
            key_norm=self._head_norm(f"{name}.self_attn.k_norm"),
            attention_output=self._linear(
                [f"{name}.self_attn.o_proj"], hidden, queries, bias=output_bias
            ),
            attention_end_norm=self.norm(f"{name}.post_attention_layernorm") if after else None,
            feed_norm=self.norm(
                f"{name}.pre_feedforward_layernorm" if after else f"{name}.post_attention_layernorm"
            ),
            gate_up=self._linear(
                [f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj"], inner, hidden, bias=feed_bias
            ),
            down=self._linear([f"{name}.mlp.down_proj"], hidden, inner, bias=feed_bias),
            feed_end_norm=self.norm(f"{name}.post_feedforward_layernorm") if after else None,
        )

    def _head_norm(self, name: str) -> RmsNorm | None:
        return self.norm(name, width=self.config.head_width) if self.config.head_norms else None

    def _linear(self, names: list[str], outputs: int, inputs: int, *, bias: bool) -> Linear:
        """Return linear layers of equal size as one layer with all their outputs."""
        weight = torch.cat([self.tensor(f"{name}.weight", (outputs, inputs)) for name in names])
        shift = None
        if bias:
            shift = torch.cat([self.tensor(f"{name}.bias", (outputs,)) for name in names])
        return linear_maker(self.device, self.dtype)(weight, shift)
