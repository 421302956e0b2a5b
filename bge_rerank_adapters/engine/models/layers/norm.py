"""The norms of encoders and decoders."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """A layer norm over the width of a token's vector.

    Attributes:
        weight: Shape (hidden,).
        bias: Shape (hidden,).
        epsilon: Added to the variance.
    """

    weight: Tensor
    bias: Tensor
    epsilon: float

    def __call__(self, states: Tensor) -> Tensor:
        """Return the normed states, of shape (rows, hidden) as given."""
        return functional.layer_norm(
            states, self.weight.shape, self.weight, self.bias, self.epsilon
        )


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """Divides by the root of the mean square, in float32, and scales.

    Attributes:
        weight: float32, shape (hidden,); includes the 1 that some models add to it.
        epsilon: Added to the mean square.
    """

    weight: Tensor
    epsilon: float

    def __call__(self, states: Tensor) -> Tensor:
        """Return the normed states, in their own dtype."""
        normed = functional.rms_norm(states.float(), self.weight.shape, self.weight, self.epsilon)
        return normed.to(states.dtype)
