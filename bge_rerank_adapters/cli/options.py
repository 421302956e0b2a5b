"""Options that several commands have, each described once."""

import inspect
from collections.abc import Callable
from enum import StrEnum
from functools import wraps
from typing import Annotated, Any

import typer

from bge_rerank_adapters.settings import EngineSettings

Model = Annotated[str, typer.Option(help='A folder, a name on the hub, or "tiny".')]
Device = Annotated[str, typer.Option(help='"auto", "cpu", "cuda", "cuda:1", "mps", ...')]
Dtype = Annotated[
    str, typer.Option(help='"auto", "float32", "bfloat16", "float16", or on a processor "int8".')
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on standard error but errors.")]
Asked = dict[str, Any]
"""Engine settings by their names, as the shell gave them."""


class LongDocuments(StrEnum):
    """What becomes of a document that is too long."""

    TRUNCATE = "truncate"
    WINDOW = "window"


def _option(help_text: str, *names: str, **limits: Any) -> Any:
    return typer.Option(
        *names, help=help_text, show_default=False, rich_help_panel="Engine settings", **limits
    )


# Types of the engine settings that every command has which loads a model; none is given unless
# the shell gives it, so defaults are the engine's.
_OPTIONS: dict[str, Any] = {
    "max_length": Annotated[int | None, _option("Most tokens of a pair; else 512.", min=1)],
    "query_max_length": Annotated[int | None, _option("Most tokens of the query.", min=1)],
    "long_documents": Annotated[
        LongDocuments | None, _option("Cut off the end, as if not given, or score windows.")
    ],
    "window_tokens": Annotated[int | None, _option("Most document tokens of a window.", min=1)],
    "window_overlap_tokens": Annotated[
        int | None, _option("Tokens that neighbouring windows share.", min=0)
    ],
    "family": Annotated[
        str | None, _option("encoder, decoder, layerwise or lightweight; else found out.")
    ],
    "prompt": Annotated[str | None, _option("What a decoder is asked after the document.")],
    "query_instruction": Annotated[str | None, _option("Put before each query.")],
    "passage_instruction": Annotated[str | None, _option("Put before each document.")],
    "cutoff_layers": Annotated[
        int | None, _option("Layer that is read: layerwise and lightweight family.", min=1)
    ],
    "compress_ratio": Annotated[
        int | None, _option("Tokens that are made one: lightweight family.", min=1)
    ],
    "compress_layers": Annotated[
        list[int] | None, _option("Before which layer; may be repeated: lightweight family.")
    ],
    "backend": Annotated[str | None, _option("native or flagembedding.")],
    "revision": Annotated[str | None, _option("Branch, tag or commit on the hub.")],
    "cache_dir": Annotated[str | None, _option("Folder of the hub's cache.")],
    "local_files_only": Annotated[bool, _option("Never ask the hub.", "--local-files-only")],
}


def with_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each engine setting but model, device and dtype.

    Args:
        command: Has a parameter `engine`, which gets those that the shell gives, by their names.
    """

    @wraps(command)
    def told(**given: Any) -> None:
        values = {name: given.pop(name) for name in _OPTIONS}
        # No option is false, zero or empty but by default; a text may be empty on purpose.
        asked = {
            name: value
            for name, value in values.items()
            if value is not None and value is not False and value != []
        }
        command(**given, engine=asked)

    own = inspect.signature(command, eval_str=True).parameters
    added = {
        name: inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False if name == "local_files_only" else None,
            annotation=annotation,
        )
        for name, annotation in _OPTIONS.items()
    }
    kept = [
        each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, each in own.items()
        if name != "engine"
    ]
    told.__signature__ = inspect.Signature([*kept, *added.values()])  # type: ignore[attr-defined]
    told.__annotations__ = {each.name: each.annotation for each in (*kept, *added.values())}
    return told


def engine_settings(model: str, *, device: str, dtype: str, engine: Asked) -> EngineSettings:
    """Return the settings that the options name.

    Raises:
        SettingsError: One of them is not allowed.
    """
    return EngineSettings(model=model, device=device, dtype=dtype, **plain(engine))


def plain(engine: Asked) -> Asked:
    """Return the settings as the engine takes them: choices as texts."""
    return {name: str(each) if isinstance(each, StrEnum) else each for name, each in engine.items()}
