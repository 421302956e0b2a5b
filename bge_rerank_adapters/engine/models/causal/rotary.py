"""Rotary position embeddings (RoPE), which rotate queries and keys by a token's position.

Keys and formulas are those of transformers 5 (`modeling_rope_utils.py`); the older keys
`rope_theta` and `rope_scaling` are read as well. Sources of the types: Su et al. 2021
(arXiv:2104.09864), Llama 3 (arXiv:2407.21783), YaRN (arXiv:2309.00071).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bge_rerank_adapters.errors import CheckpointError, UnsupportedCheckpointError


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


class _Rope(NamedTuple):
    """What the parsers of all types read.

    Attributes:
        entries: `rope_parameters`, or `rope_scaling` of older config files.
        base: `rope_theta`.
        positions: Maximum length of the original training.
        config: The whole `config.json`.
    """

    entries: Mapping[str, Any]
    base: float
    positions: float
    config: Mapping[str, Any]


def parse_rotary(
    config: Mapping[str, Any], *, folder: Path, kinds: Sequence[str] | None = None
) -> Rotary:
    """Return the rotary position embedding that a `config.json` describes.

    Args:
        config: The checkpoint's `config.json`.
        folder: Its folder.
        kinds: The types that the architecture supports; `None` is all.

    Raises:
        CheckpointError: An entry is missing or unusable.
        UnsupportedCheckpointError: The type is not supported.
    """
    path = folder / "config.json"
    known = {name: _KINDS[name] for name in kinds or _KINDS}
    try:
        # transformers 5 writes one entry, older releases two.
        entries = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        base = float(entries.get("rope_theta") or config.get("rope_theta") or 10000.0)
        positions = float(
            entries.get("original_max_position_embeddings") or config["max_position_embeddings"]
        )
        kind = entries.get("rope_type") or entries.get("type") or "default"
        parse = known.get(kind) if isinstance(kind, str) else None
        rotary = None if parse is None else parse(_Rope(entries, base, positions, config))
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: missing or unusable: {error!r}.") from error
    if rotary is None:
        raise UnsupportedCheckpointError(
            f"{path}: rotary positions of the type {kind!r} are not known; supported are "
            f'{", ".join(_KINDS)}. backend="flagembedding" may run it.'
        )
    return rotary


def _default(rope: _Rope) -> Rotary:
    return PlainRotary(rope.base)


def _linear(rope: _Rope) -> Rotary:
    return PlainRotary(rope.base, float(rope.entries["factor"]))


def _llama3(rope: _Rope) -> Rotary:
    low, high = (float(rope.entries[f"{name}_freq_factor"]) for name in ("low", "high"))
    if not low < high:
        raise ValueError(f"low_freq_factor {low} must be below high_freq_factor {high}")
    factor = float(rope.entries["factor"])
    return Llama3Rotary(base=rope.base, factor=factor, low=low, high=high, positions=rope.positions)


def _yarn(rope: _Rope) -> Rotary:
    entries, positions = rope.entries, rope.positions
    factor = float(
        entries.get("factor") or float(rope.config["max_position_embeddings"]) / positions
    )
    return YarnRotary(
        base=rope.base,
        factor=factor,
        fast=float(entries.get("beta_fast") or 32),
        slow=float(entries.get("beta_slow") or 1),
        positions=positions,
        whole=bool(entries.get("truncate", True)),
        scale=_yarn_scale(entries, factor),
    )


def _yarn_scale(entries: Mapping[str, Any], factor: float) -> float:
    given = entries.get("attention_factor")
    if given is not None:
        return float(given)

    def scale(strength: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * strength * math.log(factor) + 1.0

    own, all_channels = entries.get("mscale"), entries.get("mscale_all_dim")
    if own and all_channels:
        return scale(float(own)) / scale(float(all_channels))
    return scale(1.0)


_KINDS: dict[str, Callable[[_Rope], Rotary]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
