"""Checks for the optional packages of evaluation."""

from importlib import import_module


def require(*modules: str) -> None:
    """Raise `ImportError` with the pip command to run if a module is missing."""
    for name in modules:
        try:
            import_module(name)
        except ImportError as error:
            raise ImportError(
                f"bge_rerank_adapters.evaluation needs {name}; "
                'run: pip install "bge-rerank-adapters[eval]"'
            ) from error
