"""Options that several commands have, each described once."""

from enum import StrEnum
from typing import Annotated, Any

import typer

from bge_rerank_adapters.settings import EngineSettings

Model = Annotated[str, typer.Option(help='A folder, a name on the hub, or "tiny".')]
Device = Annotated[str, typer.Option(help='"auto", "cpu", "cuda", "cuda:1", "mps", ...')]
Dtype = Annotated[
    str, typer.Option(help='"auto", "float32", "bfloat16", "float16", or on a processor "int8".')
]
MaxLength = Annotated[int, typer.Option(help="Most tokens of a pair.", min=1)]
WindowTokens = Annotated[
    int | None, typer.Option(help="Most document tokens of a window.", min=1, show_default=False)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on standard error but errors.")]


class LongDocuments(StrEnum):
    """What becomes of a document that is too long."""

    TRUNCATE = "truncate"
    WINDOW = "window"


Long = Annotated[LongDocuments, typer.Option(help="Cut off the end, or score windows.")]


def engine_settings(
    model: str,
    *,
    device: str,
    dtype: str,
    max_length: int,
    long_documents: LongDocuments,
    window_tokens: int | None,
) -> EngineSettings:
    """Return the settings that the options name.

    Raises:
        SettingsError: One of them is not allowed.
    """
    values: dict[str, Any] = {"device": device, "dtype": dtype, "max_length": max_length}
    return EngineSettings(
        model=model,
        **values,
        long_documents=str(long_documents),
        window_tokens=window_tokens,
    )
