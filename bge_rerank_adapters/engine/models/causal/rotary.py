"""Rotary position embeddings (RoPE), which rotate queries and keys by a token's position.

Formulas are those of transformers 5 (`modeling_rope_utils.py`). Sources of the types: Su et al.
2021 (arXiv:2104.09864), Llama 3 (arXiv:2407.21783), YaRN (arXiv:2309.00071).
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Rotary(Protocol):
    """A type of rotary position embedding."""

    @property
    def scale(self) -> float:
        """Factor of every rotated query and key."""
        ...

    def frequencies(self, width: int) -> Tensor:
        """Return the angle per position of each pair of channels; float32, shape (width / 2,).

        Args:
            width: Width of a head; even.
        """
        ...


@dataclass(frozen=True, slots=True)
class PlainRotary:
    """The original type, with linear scaling: positions are divided by a factor.

    Attributes:
        base: `rope_theta`.
        factor: What positions are divided by.
    """

    base: float
    factor: float = 1.0
    scale: float = 1.0

    def frequencies(self, width: int) -> Tensor:
        """Return the angles per position; see `Rotary`."""
        steps = torch.arange(0, width, 2, dtype=torch.float32) / width
        return 1.0 / self.base**steps / self.factor


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Rotary:
    """Llama 3's type: long wavelengths are stretched, short ones kept, others interpolated.

    Attributes:
        base: `rope_theta`.
        factor: Factor by which the longest wavelengths are stretched.
        low: Rotations within `positions` up to which a wavelength is fully stretched.
        high: Rotations from which on it is kept; above `low`.
        positions: Maximum length of the original training.
    """

    base: float
    factor: float
    low: float
    high: float
    positions: float
    scale: float = 1.0

    def frequencies(self, width: int) -> Tensor:
        """Return the angles per position; see `Rotary`."""
        plain = PlainRotary(self.base).frequencies(width)
        turns = self.positions * plain / (2 * math.pi)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
        return kept * plain + (1.0 - kept) * plain / self.factor


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnRotary:
    """YaRN: like Llama 3's, but interpolated over channels, and with scaled queries and keys.

    Attributes:
        base: `rope_theta`.
        factor: Factor by which the longest wavelengths are stretched.
        fast: Rotations within `positions` from which on a channel's wavelength is kept.
        slow: Rotations up to which it is fully stretched.
        positions: Maximum length of the original training.
        whole: Whether the interpolation begins and ends at whole channels.
        scale: Factor of every rotated query and key.
    """

    base: float
    factor: float
    fast: float
    slow: float
    positions: float
    whole: bool
    scale: float

    def frequencies(self, width: int) -> Tensor:
        """Return the angles per position; see `Rotary`."""
        plain = PlainRotary(self.base).frequencies(width)
        begin, end = self._channel(self.fast, width), self._channel(self.slow, width)
        if self.whole:
            begin, end = math.floor(begin), math.ceil(end)
        begin, end = max(begin, 0), min(end, width - 1)
        # Avoids a division by zero where both ends are equal.
        channels = torch.arange(width // 2, dtype=torch.float32)
        ramp = (channels - begin) / ((end - begin) or 0.001)
        stretched = ramp.clamp(0.0, 1.0)
        return stretched * plain / self.factor + (1.0 - stretched) * plain

    def _channel(self, turns: float, width: int) -> float:
        """Return the pair of channels that makes this many rotations within `positions`."""
        wavelength = self.positions / (turns * 2 * math.pi)
        return width * math.log(wavelength) / (2 * math.log(self.base))
