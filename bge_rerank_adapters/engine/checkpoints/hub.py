"""Finds or downloads the folder of a checkpoint."""

import logging
from pathlib import Path

from bge_rerank_adapters.engine.checkpoints.formats import describe_weights
from bge_rerank_adapters.engine.checkpoints.not_found import download_failed, not_a_hub_name
from bge_rerank_adapters.errors import CheckpointError, CheckpointNotFoundError
from bge_rerank_adapters.settings import EngineSettings
from bge_rerank_adapters.settings.checkpoints import TINY

_log = logging.getLogger(__name__)

TINY_FOLDER = Path(__file__).parent / "tiny"
# Vocabularies of slow tokenizers, which transformers converts.
SLOW_VOCABULARIES = ("sentencepiece.bpe.model", "tokenizer.model", "vocab.txt", "vocab.json")
# No weights but safetensors: reading a pickle can run any code.
_FILES = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    *SLOW_VOCABULARIES,
    "merges.txt",
    "*.safetensors",
    "model.safetensors.index.json",
    # Files of sentence-transformers and of peft's adapters.
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "adapter_config.json",
]
# Training leaves checkpoints in subfolders, and optimizer states as large as the weights. All files
# that are needed are in the root.
_NOT_FILES = ["*/*", "optimizer*", "scheduler*", "rng_state*"]


def find_folder(settings: EngineSettings) -> Path:
    """Return the folder of the settings' checkpoint, downloaded first if need be.

    Raises:
        CheckpointNotFoundError: It is neither a folder, nor in the cache, nor can it be downloaded.
            The hub library's error is its `cause`, and is not chained.
        CheckpointError: The hub has it, but without safetensors.
    """
    try:
        local = check_name(settings.model)
        folder = local or _download(settings)
    except CheckpointNotFoundError as error:
        # Raised again without the frames below, which do not help the user.
        raise error.with_traceback(None) from None
    except Exception as error:  # noqa: BLE001 - the hub library's HTTP library may raise any
        raise download_failed(settings, error) from None
    if local is None and not any(folder.glob("*.safetensors")):
        _check_other_weights(settings)
    return folder


def check_name(model: str) -> Path | None:
    """Return the local folder that a model's name stands for; `None` for a name on the hub.

    Raises:
        CheckpointNotFoundError: It is a path without a folder, or a name without an owner.
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
    if "://" in model:
        name = "/".join(model.rstrip("/").split("/")[-2:])
        raise CheckpointNotFoundError(
            f"model {model!r} is an address; give a folder, or a name on the hub: did you mean "
            f"{name!r}?"
        )
    if folder.exists() or _looks_like_path(model):
        problem = "is a file, not a folder" if folder.exists() else "does not exist"
        raise CheckpointNotFoundError(
            f"model {model!r} {problem}; give the folder that holds config.json, "
            "tokenizer.json and model.safetensors, or a name on the hub."
        )
    check_owner(model)
    return None


def check_owner(model: str) -> None:
    """Raise `CheckpointNotFoundError` for a name without an owner that is no folder.

    A path without a folder passes: the folder may be made later.
    """
    known = model == TINY or "/" in model or _looks_like_path(model)
    if not known and not Path(model).exists():
        raise not_a_hub_name(model)


def _looks_like_path(model: str) -> bool:
    # Names on the hub are "owner/name". Some old ones have no owner; none of these is a reranker.
    return model.startswith((".", "/", "~")) or "\\" in model or model.count("/") > 1


def _download(settings: EngineSettings) -> Path:
    # Imported here, since it takes long and local folders do not need it.
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
    """Refuse a repository without safetensors.

    Raises:
        CheckpointError: It has weights of another format; the message names it.
    """
    if settings.local_files_only:
        return
    from huggingface_hub import HfApi

    try:
        names = HfApi(token=settings.token).list_repo_files(
            settings.model, revision=settings.revision
        )
    except Exception as error:  # noqa: BLE001 - then loading the folder fails instead
        _log.debug("The files of %s could not be listed: %s", settings.model, type(error).__name__)
        return
    if found := describe_weights(names):
        raise CheckpointError(f"{settings.model} on the hub {found}.")
