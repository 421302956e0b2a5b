"""Which files of a repository are downloaded, and what is said of those that cannot be used."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects

from bge_rerank_adapters import CheckpointError, CheckpointNotFoundError
from bge_rerank_adapters.engine.checkpoints.hub import find_folder
from bge_rerank_adapters.settings import EngineSettings

SECRET = "hf_do-not-tell"  # noqa: S105
PLAIN = ["README.md", "config.json", "tokenizer.json", "tokenizer_config.json"]
TRAINING = [
    "checkpoint-500/model.safetensors",
    "checkpoint-500/optimizer.safetensors",
    "checkpoint-500/config.json",
    "optimizer.safetensors",
    "optimizer.bin",
    "training_args.bin",
    "1_Dense/model.safetensors",
    "onnx/model.onnx",
]


@pytest.fixture
def repository(monkeypatch, tmp_path) -> Callable[[list[str]], None]:
    """Put a repository with these files on the hub; they are empty, and chosen as the hub does."""

    def put(names: list[str]) -> None:
        def download(name: str, *, allow_patterns, ignore_patterns=None, **_) -> str:
            for each in filter_repo_objects(
                names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            ):
                (tmp_path / each).parent.mkdir(exist_ok=True)
                (tmp_path / each).touch()
            return str(tmp_path)

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: names)

    return put


def downloaded() -> set[str]:
    folder = find_folder(EngineSettings(model="an/owner"))
    return {each.relative_to(folder).as_posix() for each in folder.rglob("*") if each.is_file()}


def test_of_a_repository_with_training_leftovers_only_the_root_is_downloaded(repository):
    repository([*PLAIN, "model.safetensors", *TRAINING])
    assert downloaded() == {*PLAIN, "model.safetensors"} - {"README.md"}


def test_what_sentence_transformers_and_peft_add_is_downloaded(repository):
    added = [
        *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
        *("sentence_xlm-roberta_config.json", "adapter_config.json", "adapter_model.safetensors"),
    ]
    repository([*PLAIN, *added])
    assert set(added) <= downloaded()


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["pytorch_model.bin"], "has its weights as pytorch_model.bin only, a pickle"),
        (["onnx/model.onnx"], "has its weights as onnx/model.onnx only, an ONNX model"),
        (
            ["bge-f16.gguf", "bge-q4.gguf"],
            "has its weights as bge-f16.gguf and 1 more only, a GGUF model",
        ),
        (["fp16/model.safetensors"], "has safetensors in a subfolder only (fp16/model.safe"),
    ],
)
def test_a_repository_without_safetensors_is_told_by_what_it_has(repository, names, told):
    repository([*PLAIN, *names, "training_args.bin"])
    with pytest.raises(CheckpointError) as info:
        find_folder(EngineSettings(model="an/owner", token=SECRET))
    assert str(info.value).startswith(f"an/owner on the hub {told}")
    assert SECRET not in str(info.value)


def test_a_list_of_files_that_cannot_be_had_is_no_error_of_its_own(repository, monkeypatch):
    repository(PLAIN)

    def fail(*_, **__):
        raise OfflineModeIsEnabled("offline")

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", fail)
    assert "config.json" in downloaded()


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "/ro"),
        OSError(errno.EROFS, "Read-only file system", "/ro"),
        NotADirectoryError(errno.ENOTDIR, "Not a directory", "/ro"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/ro"),
    ],
    ids=lambda error: errno.errorcode[error.errno],
)
def test_a_cache_that_cannot_be_written_is_told_as_such(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(CheckpointNotFoundError) as info:
        find_folder(EngineSettings(model="an/owner"))
    text = str(info.value)
    assert "could not be written to the cache" in text
    assert "'/ro'" in text
    assert "HF_HOME" in text
    assert "connection" not in text


LOAD = "from bge_rerank_adapters import Reranker; Reranker({!r}, device='cpu')"


def told_by_a_process(model: str, **environment: str) -> str:
    """Return the last line that a fresh process with this environment ends with."""
    outcome = subprocess.run(
        [sys.executable, "-c", LOAD.format(model)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 1
    return outcome.stderr.strip().splitlines()[-1]


def test_a_home_of_the_hub_that_is_no_folder_is_told_by_the_real_library(tmp_path: Path):
    (tmp_path / "file").touch()
    told = told_by_a_process("an/owner", HF_HOME=str(tmp_path / "file"))
    assert "could not be written to the cache" in told
    assert str(tmp_path / "file") in told


def test_offline_mode_is_named(tmp_path: Path):
    told = told_by_a_process("an/owner", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in told


def test_a_home_directory_that_is_not_known_is_told(monkeypatch):
    def fail(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", fail)
    with pytest.raises(CheckpointNotFoundError, match=r"'~/model' begins with '~'.*is HOME set"):
        find_folder(EngineSettings(model="~/model"))
