"""The layers after which a model with several heads gives a logit."""

from dataclasses import dataclass

from bge_rerank_adapters.engine.models.causal.entries import Entries
from bge_rerank_adapters.errors import SettingsError


@dataclass(frozen=True, slots=True)
class HeadLayers:
    """The layers that have a head, counted from 1.

    Attributes:
        first: The first of them.
        last: The model's number of layers.
        step: Distance from one to the next.
    """

    first: int
    last: int
    step: int = 1

    @property
    def layers(self) -> range:
        """All of them, in order."""
        return range(self.first, self.last + 1, self.step)

    def up_to(self, depth: int) -> range:
        """Return those among the first `depth` layers."""
        return range(self.first, depth + 1, self.step)

    def check(self, cutoff_layer: int | None) -> int:
        """Return how many layers to run.

        Args:
            cutoff_layer: The layer to read; `None` is the model's last.

        Raises:
            SettingsError: There is no head at that layer.
        """
        asked = self.last if cutoff_layer is None else cutoff_layer
        if asked in self.layers and asked >= 1:
            return asked
        every = "" if self.step == 1 else f" in steps of {self.step}"
        raise SettingsError(
            f"cutoff_layers must be a layer from {self.first} to {self.layers[-1]}{every}, after "
            f"which this checkpoint gives a logit, got {asked}."
        )


def check_head_layers(heads: HeadLayers, entries: Entries) -> HeadLayers:
    """Return the layers with a head, if there is one.

    Raises:
        CheckpointError: The first of them is beyond the last layer.
    """
    if heads.first > heads.last:
        raise entries.refusal("start_layer", f"at most num_hidden_layers ({heads.last})")
    return heads
