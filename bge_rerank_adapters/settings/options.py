"""Signatures and docstrings of functions that take engine settings as `**options`."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

from bge_rerank_adapters.settings.engine import EngineSettings
from bge_rerank_adapters.settings.other_names import unexpected_option
from bge_rerank_adapters.settings.table import rows, with_entries

F = TypeVar("F", bound=Callable[..., Any])


def shows_options(options: type) -> Callable[[F], F]:
    """Return a decorator for functions that take some of the engine's settings as `**options`.

    It puts them into the signature, which `inspect` and notebooks show, and into the docstring, in
    place of the line that begins with `**options:`. Type checkers read the annotation
    `**options: Unpack[...]` instead.

    Args:
        options: A `TypedDict` of the settings and the types they accept.
    """
    types = get_type_hints(options)
    shown = [each for name, each in rows(EngineSettings).items() if name in types]

    def decorate(function: F) -> F:
        added = [
            keyword(each.name, default=each.default, annotation=types[each.name]) for each in shown
        ]
        function.__signature__ = with_keywords(function, added, instead_of="options")  # type: ignore[attr-defined]
        function.__doc__ = with_entries(function.__doc__, shown)
        return function

    return decorate


def keyword(name: str, *, default: Any, annotation: Any) -> inspect.Parameter:
    """Return a keyword-only parameter."""
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def with_keywords(
    function: Callable[..., Any], added: list[inspect.Parameter], *, instead_of: str
) -> inspect.Signature:
    """Return a function's signature with keyword parameters in place of one of its own."""
    own = inspect.signature(function, eval_str=True)
    kept = [each for name, each in own.parameters.items() if name != instead_of]
    return own.replace(parameters=[*kept, *added])


def check_options(function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuse options that a function does not list in its signature.

    Raises:
        TypeError: There is one; the message lists those that are allowed.
    """
    found = list(inspect.signature(function).parameters) if options else []
    allowed = [name for name in found if name != "self"]
    # Of a constructor users know the class.
    of = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]
    for name in options:
        if name not in allowed:
            raise unexpected_option(name, of=of, allowed=allowed)
