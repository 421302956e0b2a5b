"""Checks for the optional packages of the server."""

from importlib import import_module


def require(*modules: str, extra: str = "serve") -> None:
    """Raise `ImportError` with the pip command to run if a module is missing."""
    for name in modules:
        try:
            import_module(name)
        except ImportError as error:
            raise ImportError(
                f"bge_rerank_adapters.serve needs {name}; "
                f'run: pip install "bge-rerank-adapters[{extra}]"'
            ) from error
