"""The settings of an engine: every name, default and check, without torch or pydantic."""

from bge_rerank_adapters.settings.checks import DEVICE_TYPES, DTYPES
from bge_rerank_adapters.settings.engine import (
    LONG_DOCUMENTS,
    EngineOptions,
    EngineSettings,
    check_setting,
    check_window_sizes,
    setting_names,
)

__all__ = [
    "DEVICE_TYPES",
    "DTYPES",
    "LONG_DOCUMENTS",
    "EngineOptions",
    "EngineSettings",
    "check_setting",
    "check_window_sizes",
    "setting_names",
]
