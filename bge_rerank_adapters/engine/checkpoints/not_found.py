"""The error for a checkpoint that was not found: short, without the hub library's tracebacks."""

import errno
from difflib import get_close_matches

from bge_rerank_adapters.errors import CheckpointNotFoundError
from bge_rerank_adapters.settings import EngineSettings
from bge_rerank_adapters.settings.checkpoints import CHECKPOINTS, DEFAULT_MODEL, TINY

_ADVICE = (
    "give a local folder that holds it, or local_files_only=True with a cache_dir that holds it, "
    f'or "{TINY}", the small checkpoint that comes with this package'
)
_KNOWN = {
    TINY: TINY,
    **{name.lower(): name for name in CHECKPOINTS},
    **{name.lower().partition("/")[2]: name for name in CHECKPOINTS},
}
# Error numbers of the file system, as opposed to the network.
_CANNOT_BE_WRITTEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}
_HTTP_LIBRARIES = ("httpx", "httpx2", "requests")
_CAUSE_CHARACTERS = 120


def not_a_hub_name(model: str) -> CheckpointNotFoundError:
    """Return the error for a name that is neither a folder nor valid on the hub, like `"tinny"`."""
    guess = _guess(model, similarity=0.7)
    advice = (
        f"did you mean {guess!r}?"
        if guess
        else f'give a folder, or a name with its owner like "{DEFAULT_MODEL}", or "{TINY}", the '
        "small checkpoint that comes with this package."
    )
    return CheckpointNotFoundError(
        f'model {model!r} is neither a folder nor a valid hub name ("owner/name"); {advice}'
    )


def download_failed(settings: EngineSettings, cause: Exception) -> CheckpointNotFoundError:
    """Return the error for a download that failed, with the reason and what to do.

    Args:
        settings: The engine's. No message has its token.
        cause: The hub library's error, which is kept as `cause`.
    """
    from huggingface_hub.errors import HFValidationError

    if isinstance(cause, HFValidationError):
        return not_a_hub_name(settings.model)
    problem, advice = _diagnosis(settings, cause)
    guess = _guess(settings.model, similarity=0.9)
    hint = f" (did you mean {guess!r}?)" if guess else ""
    return CheckpointNotFoundError(f"model {settings.model!r}{hint} {problem}; {advice}.", cause)


def _guess(model: str, *, similarity: float) -> str | None:
    """Return the most similar known name, if it is similar enough and not the same."""
    found = get_close_matches(model.lower(), _KNOWN, n=1, cutoff=similarity)
    guess = _KNOWN[found[0]] if found else None
    return None if guess == model else guess


def _diagnosis(settings: EngineSettings, cause: Exception) -> tuple[str, str]:
    """Return what is wrong, and what to do about it."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    chain = _chain(cause)
    if settings.local_files_only:
        problem = "is not in the local cache, and local_files_only forbids asking the hub"
        return problem, _ADVICE
    if any(isinstance(each, OfflineModeIsEnabled) for each in chain):
        problem = "is not in the local cache, and HF_HUB_OFFLINE forbids asking the hub"
        return problem, f"unset it, or {_ADVICE}"
    if isinstance(cause, HfHubHTTPError) and cause.response is not None:
        return _refusal(settings, cause)
    full = next((each for each in chain if _is_file_error(each)), None)
    if full is not None:
        problem = f"could not be written to the cache ({_brief(full)})"
        return problem, "give a cache_dir to write to, or set HF_HOME to such a folder"
    root = chain[-1] if isinstance(chain[-1], OSError) else cause
    return f"could not be downloaded from the hub ({_what_failed(chain)}{_brief(root)})", _ADVICE


def _refusal(settings: EngineSettings, cause: Exception) -> tuple[str, str]:
    """Return problem and advice for an error response of the hub."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    rights = "give a token= with the right to read it, or set HF_TOKEN"
    if isinstance(cause, GatedRepoError):
        page = f"https://huggingface.co/{settings.model}"
        return "is gated on the hub", f"ask for access on {page}, then {rights}"
    if isinstance(cause, RevisionNotFoundError):
        problem = f"has no revision {settings.revision!r} on the hub"
        return problem, "give one of its branches, tags or commits, or leave revision out"
    if isinstance(cause, RepositoryNotFoundError):
        return "is not on the hub, or is private", f"check its spelling, or {rights}"
    status = cause.response.status_code  # type: ignore[attr-defined]
    if status in (401, 403):
        return f"may not be read with this token (HTTP {status})", rights
    return f"could not be downloaded from the hub (HTTP {status})", f"try again later, or {_ADVICE}"


def _chain(error: BaseException) -> list[BaseException]:
    """Return an error followed by its causes, the root cause last."""
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) and before not in chain:
        chain.append(before)
    return chain


def _is_file_error(error: BaseException) -> bool:
    # Errors of the file system have a filename, those of the network do not.
    return isinstance(error, OSError) and (
        error.errno in _CANNOT_BE_WRITTEN or error.filename is not None
    )


def _what_failed(chain: list[BaseException]) -> str:
    of_the_network = any(
        isinstance(each, OSError) or type(each).__module__.startswith(_HTTP_LIBRARIES)
        for each in chain
    )
    return "no connection: " if of_the_network else ""


def _brief(error: BaseException) -> str:
    """Return the type of an error and the first sentence of its message."""
    first = str(error).partition("\n")[0].partition(". ")[0].removesuffix(".")
    return f"{type(error).__name__}: {first[:_CAUSE_CHARACTERS]}" if first else type(error).__name__
