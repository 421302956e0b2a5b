"""The families of BGE rerankers and the settings that each allows, one row each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bge_rerank_adapters.errors import SettingsError

BACKENDS = ("native", "flagembedding")


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilySettings:
    """The settings that a family allows; `engine.models.families` says how its models are run.

    Attributes:
        name: The family's name.
        own: The settings it allows of those that not every family has.
        int8: Whether its models run in 8 bits.
        flag_name: FlagEmbedding's name of it (`inference/reranker/model_mapping.py`).
    """

    name: str
    own: tuple[str, ...] = ()
    int8: bool = False
    flag_name: str


_ROWS = (
    FamilySettings(name="encoder", int8=True, flag_name="encoder-only-base"),
    FamilySettings(name="decoder", own=("prompt",), flag_name="decoder-only-base"),
    FamilySettings(
        name="layerwise", own=("prompt", "cutoff_layers"), flag_name="decoder-only-layerwise"
    ),
    FamilySettings(
        name="lightweight",
        own=("prompt", "cutoff_layers", "compress_ratio", "compress_layers"),
        flag_name="decoder-only-lightweight",
    ),
)
FAMILY_SETTINGS = {row.name: row for row in _ROWS}
FAMILIES = tuple(FAMILY_SETTINGS)


def check_family_settings(family: str, settings: Mapping[str, Any]) -> None:
    """Check that a family allows all settings that are given.

    Args:
        family: One of `FAMILIES`.
        settings: The engine's settings by name; `None` counts as not given.

    Raises:
        SettingsError: It does not allow one; the message names it.
    """
    row = FAMILY_SETTINGS[family]
    for name in dict.fromkeys(name for each in _ROWS for name in each.own):
        if settings[name] is not None and name not in row.own:
            families = [each.name for each in _ROWS if name in each.own]
            raise SettingsError(
                f"{name}={settings[name]!r} is a setting of the {' and '.join(families)} "
                f"{'family' if len(families) == 1 else 'families'}, but this checkpoint is of the "
                f"{family} family; leave {name} out."
            )
    if settings["dtype"] == "int8" and not row.int8:
        able = " and ".join(each.name for each in _ROWS if each.int8)
        raise SettingsError(
            f"dtype 'int8' runs checkpoints of the {able} family alone, not of the {family} "
            'family; use dtype="auto", "bfloat16" or "float32".'
        )


def check_backend_settings(settings: Mapping[str, Any]) -> None:
    """Check that FlagEmbedding's backend is not asked for what it cannot do.

    Args:
        settings: The engine's settings by name.

    Raises:
        SettingsError: It is; the message names the setting.
    """
    if settings["backend"] == "native":
        return
    for name, value in (
        ("long_documents", "window"),
        ("query_truncation_side", "left"),
        ("dtype", "int8"),
    ):
        if settings[name] == value:
            raise SettingsError(
                f"{name}={value!r} needs backend='native', got {settings['backend']!r}; "
                "leave one of the two out."
            )
