"""From the name of a checkpoint to the folder that holds it."""

import logging
from pathlib import Path

from bge_rerank_adapters.engine.checkpoints.formats import describe_weights
from bge_rerank_adapters.engine.checkpoints.not_found import not_a_hub_name, not_to_be_had
from bge_rerank_adapters.errors import CheckpointError, CheckpointNotFoundError
from bge_rerank_adapters.settings import EngineSettings
from bge_rerank_adapters.settings.checkpoints import TINY

_log = logging.getLogger(__name__)

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
    # What sentence-transformers adds, and peft's adapters.
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "adapter_config.json",
]
# Training leaves checkpoints in subfolders, and the states of its optimizer, large as the weights;
# nothing that is run lies deeper than the root.
_NOT_FILES = ["*/*", "optimizer*", "scheduler*", "rng_state*"]


def find_folder(settings: EngineSettings) -> Path:
    """Return the folder of the settings' checkpoint, downloaded first if need be.

    Raises:
        CheckpointNotFoundError: It is neither a folder, nor in the cache, nor to be had. It stands
            alone: what the hub's library raised is its `cause`, and is not chained.
        CheckpointError: The hub has it, but its weights in a form that is not run here.
    """
    try:
        local = check_name(settings.model)
        folder = local or _download(settings)
    except CheckpointNotFoundError as error:
        # Raised anew without the frames below, which tell a user nothing.
        raise error.with_traceback(None) from None
    except Exception as error:  # noqa: BLE001 - those of whichever HTTP library the hub's uses
        raise not_to_be_had(settings, error) from None
    if local is None and not any(folder.glob("*.safetensors")):
        _check_other_weights(settings)
    return folder


def check_name(model: str) -> Path | None:
    """Return the folder that a model's name stands for; `None` for one that is asked of the hub.

    Raises:
        CheckpointNotFoundError: It is a path where no folder is, or a name without an owner.
    """
    if model == TINY:
        return TINY_FOLDER
    try:
        folder = Path(model).expanduser()
    except RuntimeError as error:
        raise CheckpointNotFoundError(
            f"model {model!r} begins with '~', and the home directory that it stands for is not "
            "known (is HOME set?); give the whole path."
        ) from error
    if folder.is_dir():
        return folder
    if folder.exists() or _looks_like_path(model):
        problem = "is a file, not a folder" if folder.exists() else "does not exist"
        raise CheckpointNotFoundError(
            f"model {model!r} {problem}; give the folder that holds config.json, "
            "tokenizer.json and model.safetensors, or a name on the hub."
        )
    check_owner(model)
    return None


def check_owner(model: str) -> None:
    """Raise `CheckpointNotFoundError` for a name that is no folder's and, without owner, no hub's.

    A path where no folder is passes: one may come to be there.
    """
    known = model == TINY or "/" in model or _looks_like_path(model)
    if not known and not Path(model).exists():
        raise not_a_hub_name(model)


def _looks_like_path(model: str) -> bool:
    # Names on the hub are "owner/name". The hub also knows some without an owner, from before it
    # asked for one, and none of them is a reranker.
    return model.startswith((".", "/", "~")) or "\\" in model or model.count("/") > 1


def _download(settings: EngineSettings) -> Path:
    # Imported here: it takes long and local folders do without it.
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            settings.model,
            revision=settings.revision,
            cache_dir=settings.cache_dir,
            token=settings.token,
            local_files_only=settings.local_files_only,
            allow_patterns=_FILES,
            ignore_patterns=_NOT_FILES,
        )
    )


def _check_other_weights(settings: EngineSettings) -> None:
    """Say in what form a repository has its weights, where none came.

    Raises:
        CheckpointError: It has them in another form than safetensors.
    """
    if settings.local_files_only:
        return
    from huggingface_hub import HfApi

    try:
        names = HfApi(token=settings.token).list_repo_files(
            settings.model, revision=settings.revision
        )
    except Exception as error:  # noqa: BLE001 - then the folder's own error has to do
        _log.debug("The files of %s could not be listed: %s", settings.model, type(error).__name__)
        return
    if found := describe_weights(names):
        raise CheckpointError(f"{settings.model} on the hub {found}.")
