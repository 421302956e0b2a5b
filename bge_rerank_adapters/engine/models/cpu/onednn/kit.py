"""Kits of oneDNN's products, in floating point and in 8 bits."""

from torch.nn import functional

from bge_rerank_adapters.engine.models.cpu.onednn.int8 import (
    Int8FeedForward,
    Int8Linear,
)
from bge_rerank_adapters.engine.models.cpu.onednn.ranges import int8_works
from bge_rerank_adapters.engine.models.cpu.onednn.timing import int8_pays
from bge_rerank_adapters.engine.models.encoder.layer import LayerSource, LinearLayer, linear_layer
from bge_rerank_adapters.engine.models.encoder.plain import KitRequest, PlainKit
from bge_rerank_adapters.engine.models.encoder.tensors import stacked
from bge_rerank_adapters.engine.models.layers.activations import ACTIVATIONS
from bge_rerank_adapters.engine.models.layers.linear import PackedLinear, packed_works


class OneDnnKit(PlainKit):
    """Layers with weights prepacked by oneDNN, in float32 or bfloat16."""

    label = "oneDNN's layers"

    @classmethod
    def lack(cls, request: KitRequest) -> str | None:
        """Return why these layers cannot run such a model here, or `None` if they can."""
        if request.device.type != "cpu":
            return "they run on CPUs only"
        if not packed_works(request.dtype):
            return f"their product does not run here in {str(request.dtype).removeprefix('torch.')}"
        return None

    def layer(self, source: LayerSource) -> LinearLayer:
        """Return a layer."""
        return linear_layer(source, self.activation, PackedLinear)


class OneDnnInt8Kit(PlainKit):
    """Layers of oneDNN's 8-bit product, if a timing finds them faster than those in `dtype`."""

    label = "oneDNN's layers in int8"
    int8 = True

    @classmethod
    def lack(cls, request: KitRequest) -> str | None:
        """Return why these layers cannot run such a model here, or `None` if they can."""
        if request.device.type != "cpu":
            return "they run on CPUs only"
        if not int8_works():
            return "this build of torch, or this CPU, lacks oneDNN's 8-bit product"
        config = request.config
        sizes = config.hidden, config.intermediate
        if not int8_pays(request.dtype, *sizes, ACTIVATIONS[config.activation]):
            plain = str(request.dtype).removeprefix("torch.")
            return f"they are no faster here than those in {plain}"
        return None

    def layer(self, source: LayerSource) -> LinearLayer:
        """Return a layer.

        In the last layer only key and value have a calibrated range: all else is computed for first
        tokens, which are outliers.
        """
        tensors, last, sample = source
        if sample is None:
            raise ValueError("Layers in 8 bits need a sample.")
        # The product supports no other activation.
        calibrated = not last and self.activation is functional.gelu
        query, key_value = tensors.projections
        return LinearLayer(
            projections=(
                (Int8Linear(*query), Int8Linear(*key_value, sample=sample.states))
                if last
                else (Int8Linear(*stacked(query, key_value), sample=sample.states),)
            ),
            attention_output=Int8Linear(
                *tensors.attention_output, sample=None if last else sample.attended
            ),
            attention_norm=tensors.attention_norm,
            feed_forward=Int8FeedForward(
                Int8Linear(
                    *tensors.up, self.activation, sample=sample.middle if calibrated else None
                ),
                Int8Linear(
                    *tensors.down,
                    sample=sample.inner if calibrated else None,
                    after_gelu=calibrated,
                ),
            ),
            output_norm=tensors.output_norm,
        )
