"""Names of the files with an experiment's results, and their folder."""

import re
from collections.abc import Iterable
from pathlib import Path

from bge_rerank_adapters.errors import SettingsError

FIRST_STAGE = "first stage"
"""The name in reports of the run that is reranked."""


def file_name(name: str) -> str:
    """Return a file name for an engine's results."""
    return re.sub(r"[^\w.=+-]+", "-", name).strip("-.") or "engine"


def check_file_names(names: Iterable[str]) -> None:
    """Refuse engines' names with equal file names, the first stage's included.

    Raises:
        SettingsError: Two are equal; case is ignored, as many file systems do.
    """
    taken = {file_name(FIRST_STAGE): FIRST_STAGE}
    for name in names:
        key = file_name(name).casefold()
        if key in taken:
            raise SettingsError(
                f"Results of {name!r} and {taken[key]!r} would both be in files named "
                f"{file_name(name)!r}; give engines names that differ in letters or digits."
            )
        taken[key] = name


def make_folder(folder: str | Path) -> Path:
    """Return a folder for results, created if it is missing.

    Raises:
        SettingsError: It cannot be created.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"The folder {path} cannot be made ({error.strerror}); choose another."
        ) from error
    return path
