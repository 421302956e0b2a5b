"""The settings of a scoring engine: every default and every check of them, in one place.

Nothing here imports torch, so an adapter can refuse a bad setting before anything is loaded.
"""

import numbers
import os
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any

from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.settings.checkpoints import DEFAULT_MODEL, known_family
from bge_rerank_adapters.settings.families import (
    BACKENDS,
    FAMILIES,
    check_backend_settings,
    check_family_settings,
)

DEVICE_TYPES = ("cpu", "cuda", "mps", "xpu", "npu", "hpu", "mtia")
LONG_DOCUMENTS = ("truncate", "window")
DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")
# Those that FlagEmbedding's lightweight class was made for.
_RATIOS = (1, 2, 4, 8)

_DEVICE = re.compile(rf"auto|({'|'.join(DEVICE_TYPES)})(:\d+)?")


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """All that decides what an engine computes, and where; equal settings may share one engine.

    Attributes:
        model: A checkpoint: a folder, a hub name, or `"tiny"` for the bundled one.
        device: `"auto"`, `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`, `"xpu"`, ...; a tuple of them
            runs one copy of the model on each.
        dtype: `"auto"`, `"float32"`, `"bfloat16"`, `"float16"` or, on a processor, `"int8"`.
        max_length: Most tokens of a pair, special tokens included; at most the model's positions.
        query_max_length: Most tokens of the query; `None` is three quarters of `max_length`.
        long_documents: `"truncate"`, or `"window"` for the best of overlapping windows.
        window_tokens: Most document tokens of a window; `None` is all that fit beside the query.
        window_overlap_tokens: Tokens that neighbouring windows share; `None` is a quarter.
        revision: Branch, tag or commit of a checkpoint on the hub.
        cache_dir: Folder of the hub's cache; `None` is the hub library's own.
        local_files_only: Never ask the hub, use folders and the cache alone.
        token: Secret for a private or gated checkpoint; in no repr or dump, though it counts
            where settings are compared.
        backend: `"native"`, or `"flagembedding"` to run FlagEmbedding's own classes.
        family: `"encoder"`, `"decoder"`, `"layerwise"` or `"lightweight"`; `None` is found from the
            checkpoint's config.
        prompt: What a decoder is asked after the document; `None` is the family's own.
        query_instruction: Put before each query; `None` is `"A: "` in the decoder families, and
            nothing in the encoder family.
        passage_instruction: Put before each document; `None` is `"B: "`, or nothing.
        cutoff_layers: After how many layers the logit is read, in the layerwise and lightweight
            families; `None` is the last.
        compress_ratio: How many of a document's tokens are made one in the lightweight family: 1,
            2, 4 or 8; `None` is 1, which leaves them as they are.
        compress_layers: Before which layers, counted from 0, that is done; `None` is `(8,)`.
        pack_tokens: Token budget of one forward pass; `"auto"` fits it to the device.
        max_queued_pairs: Most pairs that may wait; past it a call raises `Overloaded`.
    """

    model: str = DEFAULT_MODEL
    device: str | tuple[str, ...] = "auto"
    dtype: str = "auto"
    max_length: int = 512
    query_max_length: int | None = None
    long_documents: str = "truncate"
    window_tokens: int | None = None
    window_overlap_tokens: int | None = None
    revision: str | None = None
    cache_dir: str | None = None
    local_files_only: bool = False
    token: str | None = field(default=None, repr=False)
    backend: str = "native"
    family: str | None = None
    prompt: str | None = None
    query_instruction: str | None = None
    passage_instruction: str | None = None
    cutoff_layers: int | None = None
    compress_ratio: int | None = None
    compress_layers: tuple[int, ...] | None = None
    pack_tokens: int | str = "auto"
    max_queued_pairs: int = 100_000

    def __post_init__(self) -> None:
        """Check and normalise every setting."""
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        if self.query_max_length is not None and self.query_max_length >= self.max_length:
            raise SettingsError(
                f"query_max_length ({self.query_max_length}) leaves no room for a document within "
                f"max_length ({self.max_length}); make it smaller, or max_length larger."
            )
        family = self.family or known_family(self.model)
        if family:
            check_family_settings(family, vars(self))
        check_backend_settings(vars(self))
        self._check_windows()
        if self.compress_layers is not None and self.compress_ratio is None:
            raise SettingsError(
                f"compress_layers={self.compress_layers!r} had no effect without compress_ratio; "
                "set compress_ratio as well, or leave it out."
            )

    def _check_windows(self) -> None:
        sizes = {"window_tokens", "window_overlap_tokens"}
        given = sorted(name for name in sizes if getattr(self, name) is not None)
        if given and self.long_documents != "window":
            raise SettingsError(
                f"{' and '.join(given)} had no effect with long_documents="
                f'{self.long_documents!r}; set long_documents="window" as well, or leave it out.'
            )
        check_window_sizes(
            self.window_tokens, self.window_overlap_tokens, max_length=self.max_length
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings without the token, which is a secret."""
        return _unpickle_settings, (self.to_dict(),)

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices, one or more, as a tuple."""
        return (self.device,) if isinstance(self.device, str) else self.device

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values for JSON, without the token."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "token"}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in plain.items()
        }

    def without_token(self) -> "EngineSettings":
        """Return the same settings with the secret left out."""
        return replace(self, token=None)


def _unpickle_settings(plain: dict[str, Any]) -> EngineSettings:
    return EngineSettings(**plain)


def _text(name: str, value: object) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value.strip():
        raise SettingsError(f"{name} must be a non-empty str or a path, got {value!r}.")
    return value


def _optional_text(name: str, value: object) -> str | None:
    return None if value is None else _text(name, value)


def _secret(name: str, value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise SettingsError(f"{name} must be a str or None, got a {type(value).__name__}.")
    return value


def _device(name: str, value: object) -> str | tuple[str, ...]:
    if isinstance(value, list | tuple):
        devices = tuple(_one_device(name, each) for each in value)
        if not devices:
            raise SettingsError(f"{name} must name at least one device, got {value!r}.")
        return devices[0] if len(devices) == 1 else devices
    return _one_device(name, value)


def _one_device(name: str, value: object) -> str:
    text = str(value)
    if not _DEVICE.fullmatch(text):
        raise SettingsError(
            f'{name} {text!r} is not known; use "auto", or one of {", ".join(DEVICE_TYPES)}, '
            'with an index if need be ("cuda:1"), or a list of these.'
        )
    return text


def _dtype(name: str, value: object) -> str:
    text = str(value).removeprefix("torch.")
    if text not in DTYPES:
        raise SettingsError(f"{name} {text!r} is not known; use one of {', '.join(DTYPES)}.")
    return text


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise SettingsError(f"{name} must be a whole number of at least 1, got {value!r}.")
    return int(value)


def _optional_count(name: str, value: object) -> int | None:
    return None if value is None else _count(name, value)


def _auto_or_count(name: str, value: object) -> int | str:
    if isinstance(value, str) and value == "auto":
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise SettingsError(
            f'{name} must be "auto" or a whole number of at least 1, got {value!r}.'
        )
    return int(value)


def _optional_whole(name: str, value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 0:
        raise SettingsError(f"{name} must be a whole number of at least 0 or None, got {value!r}.")
    return int(value)


def _long_documents(name: str, value: object) -> str:
    if not isinstance(value, str) or value not in LONG_DOCUMENTS:
        raise SettingsError(f"{name} must be one of {', '.join(LONG_DOCUMENTS)}, got {value!r}.")
    return value


def _optional_line(name: str, value: object) -> str | None:
    """Check what stands beside a text: unlike a name it may be empty."""
    if not isinstance(value, str | None):
        raise SettingsError(f"{name} must be a str or None, got {value!r}.")
    return value


def _backend(name: str, value: object) -> str:
    if value not in BACKENDS:
        raise SettingsError(
            f"{name} must be one of {', '.join(map(repr, BACKENDS))}, got {value!r}."
        )
    return str(value)


def _family(name: str, value: object) -> str | None:
    return None if value is None else _one_of(name, value, FAMILIES)


def _one_of(name: str, value: object, allowed: tuple[Any, ...]) -> Any:
    # True and 2.0 are equal to numbers that are allowed.
    is_kind = isinstance(value, type(allowed[0])) and not isinstance(value, bool)
    if not is_kind or value not in allowed:
        raise SettingsError(
            f"{name} must be one of {', '.join(map(repr, allowed))}, or None, got {value!r}."
        )
    return value


def _one_layer(name: str, value: object) -> int | None:
    """Check a layer, which FlagEmbedding's users give as a list of one."""
    if isinstance(value, list | tuple):
        if len(value) != 1:
            raise SettingsError(
                f"{name} must be one layer, or a list of one, got {value!r}; each layer gives "
                "scores of its own, so make an engine for each."
            )
        value = value[0]
    return _optional_count(name, value)


def _ratio(name: str, value: object) -> int | None:
    return None if value is None else _one_of(name, value, _RATIOS)


def _layers(name: str, value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    layers = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not layers:
        raise SettingsError(f"{name} must name at least one layer, got {value!r}.")
    return tuple(sorted({_count(name, layer) for layer in layers}))


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise SettingsError(f"{name} must be True or False, got {value!r}.")
    return value


_CHECKS = {
    "model": _text,
    "device": _device,
    "dtype": _dtype,
    "max_length": _count,
    "query_max_length": _optional_count,
    "long_documents": _long_documents,
    "window_tokens": _optional_count,
    "window_overlap_tokens": _optional_whole,
    "revision": _optional_text,
    "cache_dir": _optional_text,
    "local_files_only": _flag,
    "token": _secret,
    "backend": _backend,
    "family": _family,
    "prompt": _optional_line,
    "query_instruction": _optional_line,
    "passage_instruction": _optional_line,
    "cutoff_layers": _one_layer,
    "compress_ratio": _ratio,
    "compress_layers": _layers,
    "pack_tokens": _auto_or_count,
    "max_queued_pairs": _count,
}


def check_setting(name: str, value: object) -> Any:
    """Return the value of one engine setting as `EngineSettings` would keep it.

    Raises:
        SettingsError: It is not allowed, whatever the other settings are.
    """
    return _CHECKS[name](name, value)


def check_window_sizes(
    window_tokens: int | None, window_overlap_tokens: int | None, *, max_length: int
) -> None:
    """Refuse an overlap of which no window could advance.

    Raises:
        SettingsError: The overlap is as long as a window or longer.
    """
    longest = max_length if window_tokens is None else window_tokens
    if window_overlap_tokens is not None and window_overlap_tokens >= longest:
        name = "max_length" if window_tokens is None else "window_tokens"
        raise SettingsError(
            f"window_overlap_tokens ({window_overlap_tokens}) must be below {name} ({longest}), "
            "or no window would bring anything new; make it smaller."
        )


def setting_names() -> tuple[str, ...]:
    """Return the names of all engine settings, in order."""
    return tuple(each.name for each in fields(EngineSettings))
