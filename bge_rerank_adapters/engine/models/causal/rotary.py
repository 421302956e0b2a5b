"""Rotary positions: by what angle a token's position turns queries and keys.

Keys and formulas are those of transformers 5 (`modeling_rope_utils.py`); the older spelling
(`rope_theta` and `rope_scaling`) is read as well. Sources of the kinds: Su et al. 2021
(arXiv:2104.09864), Llama 3 (arXiv:2407.21783), YaRN (arXiv:2309.00071).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bge_rerank_adapters.errors import CheckpointError, UnsupportedCheckpointError


class Rotary(Protocol):
    """A kind of rotary positions."""

    @property
    def scale(self) -> float:
        """Factor of every turned query and key."""
        ...

    def frequencies(self, width: int) -> Tensor:
        """Return by what angle a step turns each pair of channels; float32, shape (width / 2,).

        Args:
            width: Of a head; even.
        """
        ...


@dataclass(frozen=True, slots=True)
class PlainRotary:
    """Wavelengths that grow geometrically, with positions divided by a factor.

    Attributes:
        base: Of the wavelengths.
        factor: What positions are divided by.
    """

    base: float
    factor: float = 1.0
    scale: float = 1.0

    def frequencies(self, width: int) -> Tensor:
        """Return the angles of a step; see `Rotary`."""
        steps = torch.arange(0, width, 2, dtype=torch.float32) / width
        return 1.0 / self.base**steps / self.factor


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Rotary:
    """Long wavelengths are stretched by a factor, short ones are kept, others lie between.

    Attributes:
        base: Of the wavelengths.
        factor: How far the longest are stretched.
        low: Turns within `positions` up to which a wavelength is stretched in full.
        high: Turns from which on it is kept; above `low`.
        positions: Longest text that the model was first trained on.
    """

    base: float
    factor: float
    low: float
    high: float
    positions: float
    scale: float = 1.0

    def frequencies(self, width: int) -> Tensor:
        """Return the angles of a step; see `Rotary`."""
        plain = PlainRotary(self.base).frequencies(width)
        turns = self.positions * plain / (2 * math.pi)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
        return kept * plain + (1.0 - kept) * plain / self.factor


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnRotary:
    """As Llama 3's, but with a ramp over channels, and with scaled queries and keys.

    Attributes:
        base: Of the wavelengths.
        factor: How far the longest are stretched.
        fast: Turns within `positions` from which on a channel's wavelength is kept.
        slow: Turns up to which it is stretched in full.
        positions: Longest text that the model was first trained on.
        whole: Whether the ramp begins and ends at whole channels.
        scale: Factor of every turned query and key.
    """

    base: float
    factor: float
    fast: float
    slow: float
    positions: float
    whole: bool
    scale: float

    def frequencies(self, width: int) -> Tensor:
        """Return the angles of a step; see `Rotary`."""
        plain = PlainRotary(self.base).frequencies(width)
        begin, end = self._channel(self.fast, width), self._channel(self.slow, width)
        if self.whole:
            begin, end = math.floor(begin), math.ceil(end)
        begin, end = max(begin, 0), min(end, width - 1)
        # Ends that coincide would be divided by zero.
        channels = torch.arange(width // 2, dtype=torch.float32)
        ramp = (channels - begin) / ((end - begin) or 0.001)
        stretched = ramp.clamp(0.0, 1.0)
        return stretched * plain / self.factor + (1.0 - stretched) * plain

    def _channel(self, turns: float, width: int) -> float:
        """Return the pair of channels that turns so often within `positions`."""
        wavelength = self.positions / (turns * 2 * math.pi)
        return width * math.log(wavelength) / (2 * math.log(self.base))


def parse_rotary(
    config: Mapping[str, Any], *, folder: Path, kinds: Sequence[str] | None = None
) -> Rotary:
    """Return the rotary positions that a `config.json` asks for.

    Args:
        config: The checkpoint's.
        folder: Holds it.
        kinds: Those that the architecture's own code has; `None` is all that are known here.

    Raises:
        CheckpointError: An entry is missing or unusable.
        UnsupportedCheckpointError: It asks for a kind that is not known here.
    """
    path = folder / "config.json"
    known = {name: _KINDS[name] for name in kinds or _KINDS}
    try:
        # In one entry by transformers 5, in two before.
        entries = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        base = float(entries.get("rope_theta") or config.get("rope_theta") or 10000.0)
        positions = float(
            entries.get("original_max_position_embeddings") or config["max_position_embeddings"]
        )
        kind = entries.get("rope_type") or entries.get("type") or "default"
        parse = known.get(kind) if isinstance(kind, str) else None
        rotary = None if parse is None else parse(entries, base, positions, config)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: missing or unusable: {error!r}.") from error
    if rotary is None:
        raise UnsupportedCheckpointError(
            f"{path}: rotary positions of the type {kind!r} are not known; supported are "
            f'{", ".join(_KINDS)}. backend="flagembedding" may run it.'
        )
    return rotary


def _default(
    entries: Mapping[str, Any], base: float, positions: float, config: Mapping[str, Any]
) -> Rotary:
    del entries, positions, config
    return PlainRotary(base)


def _linear(
    entries: Mapping[str, Any], base: float, positions: float, config: Mapping[str, Any]
) -> Rotary:
    del positions, config
    return PlainRotary(base, float(entries["factor"]))


def _llama3(
    entries: Mapping[str, Any], base: float, positions: float, config: Mapping[str, Any]
) -> Rotary:
    del config
    low, high = float(entries["low_freq_factor"]), float(entries["high_freq_factor"])
    if not low < high:
        raise ValueError(f"low_freq_factor {low} must be below high_freq_factor {high}")
    factor = float(entries["factor"])
    return Llama3Rotary(base=base, factor=factor, low=low, high=high, positions=positions)


def _yarn(
    entries: Mapping[str, Any], base: float, positions: float, config: Mapping[str, Any]
) -> Rotary:
    factor = float(entries.get("factor") or float(config["max_position_embeddings"]) / positions)
    return YarnRotary(
        base=base,
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


_KINDS: dict[str, Callable[[Mapping[str, Any], float, float, Mapping[str, Any]], Rotary]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
