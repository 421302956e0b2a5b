"""The entries of `config.json` that describe the rotary position embedding.

Keys, defaults and precedence are those of transformers 5.23 (`modeling_rope_utils.py`), which
writes `rope_parameters`; the older keys `rope_theta` and `rope_scaling` are read as well.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from bge_rerank_adapters.engine.models.causal.entries import Entries
from bge_rerank_adapters.engine.models.causal.rotary import (
    Llama3Rotary,
    PlainRotary,
    Rotary,
    YarnRotary,
)
from bge_rerank_adapters.errors import CheckpointError, UnsupportedCheckpointError

_NEW, _OLD = "rope_parameters", "rope_scaling"
_PART = "partial_rotary_factor"
_ORIGINAL = "original_max_position_embeddings"
_FLAG = 'backend="flagembedding" may run it'


class _Rope(NamedTuple):
    """What the parsers of all types read.

    Attributes:
        given: `rope_parameters`, or `rope_scaling` of older config files.
        base: `rope_theta`.
        config: The whole `config.json`.
    """

    given: Entries
    base: float
    config: Entries

    @property
    def positions(self) -> float:
        """Maximum length of the original training."""
        # Transformers prefers the one outside.
        if _ORIGINAL in self.config.values:
            return self.config.number(_ORIGINAL, above=0)
        return self.given.number(_ORIGINAL, self.config.whole("max_position_embeddings"), above=0)


def parse_rotary(config: Entries, *, kinds: Sequence[str] | None = None) -> Rotary:
    """Return the rotary position embedding that a `config.json` describes.

    Args:
        config: The checkpoint's `config.json`.
        kinds: The types that FlagEmbedding's modelling code supports, if the architecture is one
            of its own; `None` is an architecture of transformers.

    Raises:
        CheckpointError: An entry is missing or unusable, or two contradict each other.
        UnsupportedCheckpointError: The type is not supported.
    """
    given = _given(config)
    if kinds is not None:
        _check_old(config)
    _check_whole(config, given)
    # With a base of 1 or less, angles would not fall from channel to channel.
    base = given.number("rope_theta", config.number("rope_theta", 10000.0, above=1), above=1)
    kind = given.values.get("rope_type", given.values.get("type", "default"))
    known = {name: _KINDS[name] for name in kinds or _KINDS}
    parse = known.get(kind) if isinstance(kind, str) else None
    if parse is None:
        raise UnsupportedCheckpointError(
            f"{config.path}: rotary positions of the type {kind!r} are not known for this model "
            f"type; supported are {', '.join(known)}. {_FLAG}."
        )
    return parse(_Rope(given, base, config))


def _given(config: Entries) -> Entries:
    """Return the object with the entries, under its new or its old name."""
    new, old = config.within(_NEW), config.within(_OLD)
    if new.values and old.values and new.values != old.values:
        raise CheckpointError(
            f"{config.path}: {_NEW} {new.values!r} and {_OLD} {old.values!r} contradict each "
            f"other; leave only the one that the model was trained with."
        )
    given = old if old.values else new
    kinds = [given.values[name] for name in ("rope_type", "type") if name in given.values]
    if len(kinds) > 1 and kinds[0] != kinds[1]:
        raise CheckpointError(
            f"{config.path}: {given.inside} has the rope_type {kinds[0]!r} and the type "
            f"{kinds[1]!r}, which contradict each other; leave only the right one."
        )
    for name, value in given.values.items():
        if isinstance(value, dict):
            raise UnsupportedCheckpointError(
                f"{config.path}: {given.inside} has an object for {name}, as models have whose "
                f"layers differ in their rotary positions, which are not supported; {_FLAG}."
            )
    return given


def _check_old(config: Entries) -> None:
    """Refuse the new name where FlagEmbedding's modelling code reads the old ones alone."""
    new = config.within(_NEW).values
    plain = {"rope_type": "default", "rope_theta": config.values.get("rope_theta", 10000.0)}
    if new and new != plain and new != config.within(_OLD).values:
        raise UnsupportedCheckpointError(
            f"{config.path}: {_NEW} {dict(new)!r} is not read by FlagEmbedding's modelling code of "
            f"this model type, which reads rope_theta and {_OLD}; write those if the model was "
            "trained with them."
        )


def _check_whole(config: Entries, given: Entries) -> None:
    """Refuse partial rotary embeddings, which some models derived from Llama have."""
    for entries in (config, given):
        part = entries.values.get(_PART)
        if part is not None and part != 1.0:
            raise UnsupportedCheckpointError(
                f"{config.path}: {_PART} {part!r} rotates a part of each head, which is not "
                f"supported for this model type; it must be 1.0 or left out. {_FLAG}."
            )


def _default(rope: _Rope) -> Rotary:
    return PlainRotary(rope.base)


def _linear(rope: _Rope) -> Rotary:
    return PlainRotary(rope.base, rope.given.number("factor", above=0))


def _llama3(rope: _Rope) -> Rotary:
    low, high = (rope.given.number(f"{name}_freq_factor", above=0) for name in ("low", "high"))
    if not low < high:
        raise rope.given.refusal("low_freq_factor", f"below high_freq_factor {high:g}")
    factor = rope.given.number("factor", above=0)
    return Llama3Rotary(base=rope.base, factor=factor, low=low, high=high, positions=rope.positions)


def _yarn(rope: _Rope) -> Rotary:
    given, positions = rope.given, rope.positions
    implied = rope.config.whole("max_position_embeddings") / positions
    factor = _number(given, "factor") or implied
    return YarnRotary(
        base=rope.base,
        factor=factor,
        fast=_number(given, "beta_fast") or 32,
        slow=_number(given, "beta_slow") or 1,
        positions=positions,
        whole=given.flag("truncate", True),
        scale=_yarn_scale(given, factor),
    )


def _number(entries: Entries, name: str) -> float | None:
    """Return a positive number, or `None` if it is missing or null."""
    return None if entries.values.get(name) is None else entries.number(name, above=0)


def _yarn_scale(given: Entries, factor: float) -> float:
    attention = _number(given, "attention_factor")
    if attention is not None:
        return attention

    def scale(strength: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * strength * math.log(factor) + 1.0

    own, all_channels = _number(given, "mscale"), _number(given, "mscale_all_dim")
    if own and all_channels:
        return scale(own) / scale(all_channels)
    return scale(1.0)


_KINDS: dict[str, Callable[[_Rope], Rotary]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
