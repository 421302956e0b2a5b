"""From a checkpoint's name to its folder, without a network."""

import os
import pickle
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from bge_rerank_adapters import Reranker
from bge_rerank_adapters.engine.checkpoints.hub import TINY_FOLDER, find_folder
from bge_rerank_adapters.errors import CheckpointNotFoundError
from bge_rerank_adapters.settings import EngineSettings
from bge_rerank_adapters.settings.checkpoints import CHECKPOINTS, DEFAULT_MODEL

SECRET = "hf_do-not-tell"  # noqa: S105
# What the hub's HTTP library raises, whichever that is, is an `HTTPError` beside this one.
HTTP_ERROR = HfHubHTTPError.__bases__[0]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The calls of the hub's downloader; set `.error` to have it fail."""

    class Hub:
        def __init__(self):
            self.calls: list = []
            self.error: Exception | None = None

        def __call__(self, name, **kwargs):
            self.calls.append((name, kwargs))
            if self.error:
                raise self.error
            return str(tmp_path)

    fake = Hub()
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: [])
    return fake


def test_tiny_is_the_bundled_one_even_beside_a_folder_of_that_name(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert find_folder(EngineSettings(model="tiny")) == TINY_FOLDER
    assert find_folder(EngineSettings(model="./tiny")).resolve() == (tmp_path / "tiny").resolve()
    assert hub.calls == []


def test_home_and_path_objects(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert find_folder(EngineSettings(model="~/model")) == tmp_path / "model"
    assert find_folder(EngineSettings(model=tmp_path / "model")) == tmp_path / "model"


@pytest.mark.parametrize(
    "model", ["./gone", "/gone/where", "~/gone-folder", "a/b/c", "..", "c:\\m"]
)
def test_a_missing_path_is_not_looked_for_on_the_hub(model, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if model == "..":
        assert find_folder(EngineSettings(model=model)) == Path("..")
        return
    with pytest.raises(CheckpointNotFoundError, match="does not exist; give the folder that holds"):
        find_folder(EngineSettings(model=model))
    assert hub.calls == []


def test_an_address_is_told_the_name_that_it_ends_with(hub):
    with pytest.raises(CheckpointNotFoundError, match=r"is an address; .* did you mean 'BAAI/m'\?"):
        find_folder(EngineSettings(model="https://hub.example/BAAI/m/"))
    assert hub.calls == []


def test_a_file_is_not_a_folder(tmp_path, hub):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(FileNotFoundError, match="is a file, not a folder"):
        find_folder(EngineSettings(model=file))


@pytest.mark.parametrize("known", CHECKPOINTS.values(), ids=lambda each: each.name)
def test_published_checkpoints_are_asked_for_by_name(known, hub):
    find_folder(EngineSettings(model=known.name))
    assert [name for name, _ in hub.calls] == [known.name]


def test_settings_reach_the_hub(hub, tmp_path):
    settings = EngineSettings(
        revision="v1", cache_dir=tmp_path / "cache", token=SECRET, local_files_only=True
    )
    assert find_folder(settings) == tmp_path
    [(name, kwargs)] = hub.calls
    patterns = kwargs.pop("allow_patterns")
    kwargs.pop("ignore_patterns")
    assert name == DEFAULT_MODEL
    assert kwargs == {
        "revision": "v1",
        "cache_dir": str(tmp_path / "cache"),
        "token": SECRET,
        "local_files_only": True,
    }
    wanted = {"config.json", "tokenizer.json", "model.safetensors", "model-00001-of-2.safetensors"}
    assert all(any(fnmatch(file, each) for each in patterns) for file in wanted)
    pickles = {"pytorch_model.bin", "model.pt", "model.pkl", "modeling.py", "model.onnx"}
    assert not any(fnmatch(file, each) for file in pickles for each in patterns)


WAYS_OUT = ("local folder", "local_files_only=True with a cache_dir", '"tiny"')


def told(hub, error: Exception | None, *, ways_out=WAYS_OUT, **settings) -> str:
    hub.error = error
    with pytest.raises(CheckpointNotFoundError) as caught:
        find_folder(EngineSettings(token=SECRET, **settings))
    text = str(caught.value)
    assert text.endswith(".")
    assert SECRET not in text
    assert "\n" not in text
    assert ". " not in text, "one sentence"
    for way_out in ways_out:
        assert way_out in text
    assert caught.value.cause is error
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    return text


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("long\nstory. And more."),
        ConnectionError("down"),
        OSError("cut"),
        HTTP_ERROR("proxy"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_without_a_connection_the_ways_out_are_named_in_one_sentence(hub, error):
    text = told(hub, error)
    named = f"(no connection: {type(error).__name__}: "
    assert text.startswith(f"model '{DEFAULT_MODEL}' could not be downloaded from the hub {named}")


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def test_the_first_cause_is_named_and_not_what_the_hub_makes_of_it(hub):
    error = caused_by(LocalEntryNotFoundError("cannot find it"), OSError(-2, "Name not known"))
    assert "(no connection: OSError: [Errno -2] Name not known)" in told(hub, error)


def test_what_is_no_fault_of_the_network_is_not_blamed_on_it(hub):
    assert "from the hub (KeyError: 'siblings')" in told(hub, KeyError("siblings"))


def test_a_cache_that_cannot_be_written_is_told(hub):
    error = PermissionError(13, "Permission denied", "/cache")
    text = told(hub, error, ways_out=["give a cache_dir to write to"])
    assert "could not be written to the cache (PermissionError: [Errno 13] Permission" in text


def test_offline_mode_is_named_with_its_variable(hub):
    error = caused_by(LocalEntryNotFoundError("no"), OfflineModeIsEnabled("on. Unset it."))
    assert "not in the local cache, and HF_HUB_OFFLINE forbids" in told(hub, error)


def test_the_cache_alone_is_named_as_such(hub):
    text = told(hub, LocalEntryNotFoundError("no"), local_files_only=True)
    assert "is not in the local cache, and local_files_only forbids" in text


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("GatedRepoError", 403, "is gated on the hub; ask for access on https://huggingface.co/"),
        ("RevisionNotFoundError", 404, "has no revision 'v9' on the hub; give one of its branches"),
        ("RepositoryNotFoundError", 401, "is not on the hub, or is private; check its spelling, "),
        ("HfHubHTTPError", 403, "may not be read with this token (HTTP 403); give a token="),
        ("HfHubHTTPError", 503, "HTTP 503); try again later, or give a local folder"),
    ],
)
def test_refusals_of_the_hub_are_told_apart(hub, name, status, message):
    from huggingface_hub import errors

    error = getattr(errors, name).__new__(getattr(errors, name))
    error.response = type("Response", (), {"status_code": status})()
    assert message in told(hub, error, ways_out=(), revision="v9")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("tinny", "tiny"),
        ("Tiny", "tiny"),
        ("bge-reranker-v2-m3", DEFAULT_MODEL),
        ("BGE-Reranker-v2-M3", DEFAULT_MODEL),
        ("bge-reranker-larg", "BAAI/bge-reranker-large"),
    ],
)
def test_a_name_without_an_owner_is_refused_with_the_one_meant(name, meant, hub):
    with pytest.raises(CheckpointNotFoundError) as caught:
        find_folder(EngineSettings(model=name))
    assert f"model {name!r} is neither a folder nor a valid hub name" in str(caught.value)
    assert str(caught.value).endswith(f"did you mean {meant!r}?")
    assert hub.calls == []


def test_a_name_like_none_that_is_known_gets_no_guess(hub):
    with pytest.raises(CheckpointNotFoundError, match=r"a name with its owner like .*, or .tiny"):
        find_folder(EngineSettings(model="my-model"))


def test_a_typo_behind_the_owner_is_told_with_the_failure(hub):
    text = told(hub, ConnectionError("down"), model="BAAI/bge-reranker-v2-m33")
    assert text.startswith(
        f"model 'BAAI/bge-reranker-v2-m33' (did you mean '{DEFAULT_MODEL}'?) could not"
    )
    assert "did you mean" not in told(hub, ConnectionError("down"))
    assert "did you mean" not in told(hub, ConnectionError("down"), model="else/our-reranker")


@pytest.mark.parametrize("model", ["tinny", "BAAI/not-there", "./gone"])
def test_a_script_prints_a_dozen_lines_at_most(model, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"from bge_rerank_adapters import Reranker\n\nreranker = Reranker({model!r})\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    lines = run.stderr.splitlines()
    assert lines[-1].startswith("bge_rerank_adapters.errors.CheckpointNotFoundError: model ")
    assert len(lines) <= 12, run.stderr


def test_the_error_survives_pickling_without_its_cause():
    error = CheckpointNotFoundError("gone", cause=OSError("a connection"))
    copied = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    assert (type(copied), str(copied), copied.cause) == (CheckpointNotFoundError, "gone", None)


def test_a_name_that_the_hub_would_not_take():
    with pytest.raises(CheckpointNotFoundError, match="is neither a folder nor a valid"):
        find_folder(EngineSettings(model="not a name!", local_files_only=True))


def test_an_empty_cache_is_told_by_the_real_library(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="is not in the local cache"):
        Reranker(local_files_only=True, cache_dir=tmp_path, device="cpu")
