"""From the name of a checkpoint to the folder that holds it."""

from pathlib import Path

from bge_rerank_adapters.errors import CheckpointNotFoundError
from bge_rerank_adapters.settings import EngineSettings
from bge_rerank_adapters.settings.checkpoints import TINY

TINY_FOLDER = Path(__file__).parent / "tiny"
# Weights as safetensors alone: a pickle can run any code when it is read.
_FILES = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "*.safetensors",
    "model.safetensors.index.json",
]
_WAYS_OUT = (
    "give the path of a local folder that holds the checkpoint, or use local_files_only=True with "
    'a cache_dir that holds it, or use "tiny", the small checkpoint that comes with this package'
)


def find_folder(settings: EngineSettings) -> Path:
    """Return the folder of the settings' checkpoint, downloaded first if need be.

    Raises:
        CheckpointNotFoundError: It is neither a folder, nor in the cache, nor to be had.
    """
    if settings.model == TINY:
        return TINY_FOLDER
    folder = Path(settings.model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or _looks_like_path(settings.model):
        problem = "is a file, not a folder" if folder.exists() else "does not exist"
        raise CheckpointNotFoundError(
            f"model {settings.model!r} {problem}; give the folder that holds config.json, "
            "tokenizer.json and model.safetensors, or a name on the hub."
        )
    return _download(settings)


def _looks_like_path(model: str) -> bool:
    # Names on the hub are "name" or "owner/name".
    return model.startswith((".", "/", "~")) or "\\" in model or model.count("/") > 1


def _download(settings: EngineSettings) -> Path:
    # Imported here: it takes long and local folders do without it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = snapshot_download(
            settings.model,
            revision=settings.revision,
            cache_dir=settings.cache_dir,
            token=settings.token,
            local_files_only=settings.local_files_only,
            allow_patterns=_FILES,
        )
    except HFValidationError as error:
        raise CheckpointNotFoundError(
            f"model {settings.model!r} is neither a folder nor a valid hub name: {_WAYS_OUT}."
        ) from error
    except Exception as error:  # among them those of whichever HTTP library the hub's uses
        raise CheckpointNotFoundError(
            f"model {settings.model!r} {_reason(settings, error)}: {_WAYS_OUT}."
        ) from error
    return Path(folder)


def _reason(settings: EngineSettings, error: Exception) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if settings.local_files_only:
        return "is not in the local cache, and local_files_only forbids asking the hub"
    if isinstance(error, GatedRepoError):
        return "is gated on the hub; ask for access and give token="
    if isinstance(error, RevisionNotFoundError):
        return f"has no revision {settings.revision!r} on the hub"
    if isinstance(error, RepositoryNotFoundError):
        return "is not on the hub, or is private and needs token="
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return f"could not be had from the hub (HTTP {error.response.status_code})"
    return f"could not be had from the hub ({type(error).__name__}: no connection, or it was cut)"
