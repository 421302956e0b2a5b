"""The families of BGE rerankers, and which settings belong to which."""

from collections.abc import Mapping
from typing import Any

from bge_rerank_adapters.errors import SettingsError

BACKENDS = ("native", "flagembedding")
FAMILIES = ("encoder", "decoder", "layerwise", "lightweight")
_DECODERS = ("decoder", "layerwise", "lightweight")
# Settings that only some families have; all others belong to every one.
_BELONGS = {
    "prompt": _DECODERS,
    "cutoff_layers": ("layerwise", "lightweight"),
    "compress_ratio": ("lightweight",),
    "compress_layers": ("lightweight",),
}


def check_family_settings(family: str, settings: Mapping[str, Any]) -> None:
    """Check that all settings that are given belong to a family.

    Args:
        family: One of `FAMILIES`.
        settings: Of the engine, by their names; `None` is not given.

    Raises:
        SettingsError: One does not; the message names it.
    """
    for name, families in _BELONGS.items():
        if settings[name] is not None and family not in families:
            raise SettingsError(
                f"{name}={settings[name]!r} is a setting of the {' and '.join(families)} "
                f"{'family' if len(families) == 1 else 'families'}, but this checkpoint is of the "
                f"{family} family; leave {name} out."
            )
    if settings["dtype"] == "int8" and family != "encoder":
        raise SettingsError(
            f"dtype 'int8' runs checkpoints of the encoder family alone, not of the {family} "
            'family; use dtype="auto", "bfloat16" or "float32".'
        )


def check_backend_settings(settings: Mapping[str, Any]) -> None:
    """Check that what FlagEmbedding itself cannot do is not asked of it.

    Args:
        settings: Of the engine, by their names.

    Raises:
        SettingsError: It is; the message names the setting.
    """
    if settings["backend"] == "native":
        return
    for name, value in (("long_documents", "window"), ("dtype", "int8")):
        if settings[name] == value:
            raise SettingsError(
                f"{name}={value!r} needs backend='native', got {settings['backend']!r}; "
                "leave one of the two out."
            )
