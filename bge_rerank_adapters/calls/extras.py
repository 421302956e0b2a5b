"""Checks that the packages of an extra are installed."""

from importlib import import_module


def require(*modules: str, of: str, extra: str) -> None:
    """Raise `ImportError` with the pip command to run if a module cannot be imported.

    Args:
        modules: Names of the modules.
        of: The part of this package that needs them.
        extra: The extra that installs them.
    """
    for name in modules:
        try:
            import_module(name)
        except ImportError as error:
            raise ImportError(
                f"bge_rerank_adapters.{of} needs {name}; "
                f'run: pip install "bge-rerank-adapters[{extra}]"'
            ) from error
