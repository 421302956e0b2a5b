"""Options of several commands; the engine's are made from the table of its settings."""

from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from bge_rerank_adapters.settings import EngineSettings
from bge_rerank_adapters.settings.options import keyword, with_keywords
from bge_rerank_adapters.settings.table import Row, rows

ENGINE_ROWS = rows(EngineSettings)
Given = dict[str, Any]
"""Engine settings by name, from command-line options."""


def _help(row: Row) -> str:
    return f"{row.text.replace('`', '')}."


def help_or_default(row: Row) -> str:
    """Return an option's help text with what applies if it is not given."""
    return f"{row.text.replace('`', '')}; else {_default(row)}."


def _default(row: Row) -> str:
    return (row.none or str(row.default)).replace("`", "")


Model = Annotated[str, typer.Option(help=_help(ENGINE_ROWS["model"]))]
Device = Annotated[str, typer.Option(help=_help(ENGINE_ROWS["device"]))]
Dtype = Annotated[str, typer.Option(help=_help(ENGINE_ROWS["dtype"]))]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Write nothing but errors to standard error.")
]

# Commands list model, device and dtype themselves; secrets must not get into a shell's history.
_ADDED = {
    name: row
    for name, row in ENGINE_ROWS.items()
    if name not in {"model", "device", "dtype"} and not row.secret
}


def with_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each engine setting but model, device, dtype and secrets.

    Args:
        command: Has a parameter `engine`, which gets the given ones by name.
    """

    @wraps(command)
    def run(**given: Any) -> None:
        values = {name: given.pop(name) for name in _ADDED}
        # None, False and [] mean not given; an empty text is a value.
        given_settings = {
            name: read(name, value)
            for name, value in values.items()
            if value is not None and value is not False and value != []
        }
        command(**given, engine=given_settings)

    # Typer reads a command's options from its signature.
    added = [_parameter(row) for row in _ADDED.values()]
    signature = with_keywords(command, added, instead_of="engine")
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in signature.parameters.values()}
    return run


def _parameter(row: Row) -> Any:
    is_flag = row.format.option is bool
    names = [f"--{row.name.replace('_', '-')}"] if is_flag else []
    option = typer.Option(
        *names,
        help=_help(row),
        # None if not given, so that the engine's own default applies.
        show_default=not is_flag and _default(row),
        min=row.format.least,
        rich_help_panel="Engine settings",
    )
    kind = bool if is_flag else row.format.option | None
    return keyword(row.name, default=False if is_flag else None, annotation=Annotated[kind, option])


def read(name: str, value: object) -> Any:
    """Return the value of an option, parsed if it is a text.

    Raises:
        typer.BadParameter: It cannot be parsed.
    """
    if not isinstance(value, str):
        return value
    try:
        return ENGINE_ROWS[name].format.read(value)
    except ValueError as error:
        raise typer.BadParameter(
            f"{error}, got {value!r}", param_hint=f"--{name.replace('_', '-')}"
        ) from error


def engine_settings(model: str, *, device: str, dtype: str, engine: Given) -> EngineSettings:
    """Return the engine's settings from options.

    Raises:
        SettingsError: One of them is not allowed.
    """
    return EngineSettings(model=model, device=read("device", device), dtype=dtype, **engine)
