"""The settings of a scoring engine: one table of every name, default, check and text.

To add one, give `EngineSettings` a row and `FurtherOptions` its type, and use it. Tests compare the
adapters' fields and docs/settings.md with these two, and name what is missing.

Nothing here imports torch, so an adapter can refuse a bad setting before anything is loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.settings import checks
from bge_rerank_adapters.settings.checkpoints import DEFAULT_MODEL, known_family
from bge_rerank_adapters.settings.families import (
    BACKENDS,
    FAMILIES,
    check_backend_settings,
    check_family_settings,
)
from bge_rerank_adapters.settings.parsing import AUTO_OR_COUNT, COUNT, COUNTS, FLAG, TEXTS, WHOLE
from bge_rerank_adapters.settings.table import Table, documented, rows, setting

LONG_DOCUMENTS = ("truncate", "window")
QUERY_TRUNCATION_SIDES = ("right", "left")
# The ratios that FlagEmbedding's lightweight class supports.
_RATIOS = (1, 2, 4, 8)


class FurtherOptions(TypedDict, total=False):
    """Settings that drop-ins for other libraries take by the names that they have here."""

    query_truncation_side: str
    long_documents: str
    window_tokens: int | None
    window_overlap_tokens: int | None
    revision: str | None
    cache_dir: str | None
    local_files_only: bool
    token: str | None
    backend: str
    prompt: str | None
    cutoff_layers: int | Sequence[int] | None
    compress_ratio: int | None
    compress_layers: int | Sequence[int] | None
    pack_tokens: int | str
    max_queued_pairs: int


class EngineOptions(FurtherOptions, total=False):
    """All settings but the model, with the types that are taken."""

    device: str | Sequence[str]
    dtype: str
    max_length: int
    query_max_length: int | None
    family: str | None
    query_instruction: str | None
    passage_instruction: str | None


@documented
@dataclass(frozen=True, kw_only=True)
class EngineSettings(Table):
    """Everything that decides what an engine computes and where; equal settings share engines.

    The token is left out of reprs, dumps and pickles, but is compared.

    Attributes:
        **rows: One for each row of the table.
    """

    model: str = setting(
        DEFAULT_MODEL,
        checks.text,
        'A folder, a name on the hub, or `"tiny"` for the bundled checkpoint',
    )
    device: str | tuple[str, ...] = setting(
        "auto",
        checks.device,
        '`"auto"`, `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`, `"xpu"`, ..., or a list for a copy of '
        "the model on each",
        format=TEXTS,
    )
    dtype: str = setting(
        "auto",
        checks.dtype,
        '`"float32"`, `"bfloat16"`, `"float16"` or `"auto"`: the fastest of these that the device '
        'runs natively, by its capability flags; on a CPU also `"int8"`, which becomes `"auto"` '
        "where 8-bit layers are slower",
    )
    max_length: int = setting(
        512,
        checks.count,
        "Maximum tokens of a pair, special tokens included; clamped to the model's positions",
        format=COUNT,
    )
    query_max_length: int | None = setting(
        None,
        checks.optional(checks.count),
        "Maximum tokens of the query; the document gets the rest",
        none="three quarters of `max_length`",
        format=COUNT,
    )
    query_truncation_side: str = setting(
        "right",
        checks.one_of(*QUERY_TRUNCATION_SIDES, shown=str),
        'Which side of a query that is too long is cut off: `"right"`, or `"left"` to keep the '
        "end, where a chat has its question; an instruction before the query stays",
    )
    long_documents: str = setting(
        "truncate",
        checks.one_of(*LONG_DOCUMENTS, shown=str),
        'Of a document that is too long: `"truncate"` cuts off its end, `"window"` scores '
        "overlapping windows and keeps the best",
    )
    window_tokens: int | None = setting(
        None,
        checks.optional(checks.count),
        "Maximum document tokens of a window",
        none="all that fit beside the query",
        format=COUNT,
    )
    window_overlap_tokens: int | None = setting(
        None,
        checks.optional(checks.at_least(0)),
        "Minimum tokens that neighbouring windows share",
        none="a quarter of a window",
        format=WHOLE,
    )
    revision: str | None = setting(
        None, checks.optional(checks.text), "Branch, tag or commit on the hub", none="the newest"
    )
    cache_dir: str | None = setting(
        None,
        checks.optional(checks.text),
        "Folder of the hub's cache",
        none="the hub library's own",
    )
    local_files_only: bool = setting(
        False, checks.flag, "Use folders and the cache alone, and never ask the hub", format=FLAG
    )
    token: str | None = setting(
        None,
        checks.secret,
        "Secret for private and gated checkpoints on the hub",
        none="the one that the hub library knows, if any",
        secret=True,
    )
    backend: str = setting(
        "native",
        checks.one_of(*BACKENDS),
        '`"native"`, or `"flagembedding"` to run FlagEmbedding\'s own classes',
    )
    family: str | None = setting(
        None,
        checks.one_of(*FAMILIES, or_none=True),
        '`"encoder"`, `"decoder"`, `"layerwise"` or `"lightweight"`',
        none="found from the checkpoint's config",
    )
    prompt: str | None = setting(
        None,
        checks.any_text_or_none,
        "Text after the document, which asks a decoder for its answer (all families but encoders)",
        none="the family's own",
    )
    query_instruction: str | None = setting(
        None,
        checks.any_text_or_none,
        "Text before each query",
        none='`"A: "` in the decoder families, else the prompt that the checkpoint has, if any',
    )
    passage_instruction: str | None = setting(
        None,
        checks.any_text_or_none,
        "Text before each document",
        none='`"B: "` in the decoder families, else nothing',
    )
    cutoff_layers: int | None = setting(
        None,
        checks.optional(checks.one_layer),
        "The layer whose logit is read, or a list of one (layerwise and lightweight families)",
        none="the last",
        format=COUNT,
    )
    compress_ratio: int | None = setting(
        None,
        checks.one_of(*_RATIOS, or_none=True),
        "How many tokens of a document are merged into one: 1, 2, 4 or 8 (lightweight family)",
        none="1, which merges none",
        format=COUNT,
    )
    compress_layers: tuple[int, ...] | None = setting(
        None,
        checks.optional(checks.layers),
        "Layers, counted from 0, before which tokens are merged (lightweight family)",
        none="`[8]`",
        format=COUNTS,
    )
    pack_tokens: int | str = setting(
        "auto",
        checks.auto_or_count,
        'Token budget of one forward pass; `"auto"` fits it to the device',
        format=AUTO_OR_COUNT,
    )
    max_queued_pairs: int = setting(
        100_000,
        checks.count,
        "Maximum pairs that may wait; a call beyond it raises `Overloaded` at once",
        format=COUNT,
    )

    if TYPE_CHECKING:
        # Values may be given as the checks accept them, such as a list for a tuple.
        def __init__(self, *, model: str = DEFAULT_MODEL, **options: Unpack[EngineOptions]) -> None:
            """Check every setting."""

    def __post_init__(self) -> None:
        """Check and normalise every setting, then their combinations."""
        super().__post_init__()
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

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices, one or more, as a tuple."""
        return (self.device,) if isinstance(self.device, str) else self.device

    def without_token(self) -> "EngineSettings":
        """Return the same settings with the secret left out."""
        return replace(self, token=None)


def check_setting(name: str, value: object) -> Any:
    """Return the value of one engine setting, checked and normalised.

    Raises:
        SettingsError: It is not allowed with any other settings.
    """
    return rows(EngineSettings)[name].check(name, value)


def check_window_sizes(
    window_tokens: int | None, window_overlap_tokens: int | None, *, max_length: int
) -> None:
    """Refuse an overlap with which windows could not advance.

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
    return tuple(rows(EngineSettings))
