"""What goes to a device and comes back: one copy a pack each way, and no wait in between."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bge_rerank_adapters import Reranker
from bge_rerank_adapters.engine.models import loading
from bge_rerank_adapters.engine.models.causal import model as causal_model
from bge_rerank_adapters.engine.models.causal.readout import Readout, ReadPair
from bge_rerank_adapters.engine.models.encoder import model as encoder_model
from bge_rerank_adapters.engine.models.layers import attention_check, transfers
from bge_rerank_adapters.engine.models.layers.transfers import Transfers
from bge_rerank_adapters.settings import EngineSettings
from tests.checkpoints import build_bert, build_xlm_roberta
from tests.family_checkpoints import build_family
from tests.logs import own_records
from tests.texts import DOCUMENTS, QUERY

pytestmark = pytest.mark.timeout(120)

CPU, META = torch.device("cpu"), torch.device("meta")
PAIRS = [(QUERY, document) for document in DOCUMENTS]
# Checkpoint, settings, and how often a pack may be given numbers: a lightweight model's documents
# have other places once they are compressed.
MODELS = {
    "xlm-roberta": (build_xlm_roberta, {}, 1),
    "bert": (build_bert, {}, 1),
    "decoder": (lambda folder: build_family(folder, "decoder"), {}, 1),
    "layerwise": (lambda folder: build_family(folder, "layerwise"), {}, 1),
    "lightweight": (lambda folder: build_family(folder, "lightweight"), {}, 1),
    "compressed": (
        lambda folder: build_family(folder, "lightweight"),
        {"compress_ratio": 2, "compress_layers": [2, 4]},
        3,
    ),
}
Build = Callable[[Path], Path]


@pytest.fixture(params=MODELS)
def case(request, tmp_path) -> tuple[Path, dict[str, object], int]:
    build, settings, most = MODELS[request.param]
    return build(tmp_path / request.param), settings, most


class Copies(TorchDispatchMode):
    """Counts what is copied from one device to another, and what has to wait for a device."""

    WAITING = (
        "_local_scalar_dense",
        "item",
        "nonzero",
        "masked_select",
        "is_nonzero",
        "equal",
        "unique",
    )

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        devices = {each.device for each in (*args, out) if isinstance(each, torch.Tensor)}
        if name in ("to", "_to_copy", "copy_") and len(devices) > 1:
            self.copies += 1
        if any(name.startswith(each) for each in self.WAITING):
            self.waits.append(name)
        return out


def load_on(device: torch.device, folder: Path, settings: dict[str, object]):
    """Return tokenised pairs and a model on a device, which need not hold numbers."""
    settings = EngineSettings(model=str(folder), dtype="float32", **settings)
    checkpoint = loading.read_checkpoint(folder, settings)
    tokenizer = loading.load_pair_tokenizer(checkpoint, settings)
    model = loading.load_model(checkpoint, settings, tokenizer=tokenizer, device=device)
    return tokenizer.tokenize(PAIRS).distinct, model


def test_a_pack_is_one_copy_to_the_device_and_no_size_depends_on_what_it_computes(
    case, monkeypatch
):
    # A meta tensor has no numbers: whatever would have to wait for one fails.
    monkeypatch.setattr(attention_check, "is_trusted", lambda _: True)
    folder, settings, most = case
    pairs, model = load_on(META, folder, settings)
    with Copies() as counted:
        coming = model.launch(pairs)
    assert counted.copies == most
    assert counted.waits == []
    with pytest.raises((RuntimeError, NotImplementedError)):
        coming()


def test_a_call_that_reads_several_layers_waits_once(tmp_path, monkeypatch):
    reads: list[tuple[int, ...]] = []

    class Counting(Transfers):
        def download(self, values):
            reads.append(values.shape)
            return super().download(values)

    monkeypatch.setattr(causal_model, "transfers_for", Counting)
    pairs, model = load_on(CPU, build_family(tmp_path, "layerwise"), {})
    asked = [ReadPair.of(pair, Readout((3, 4, 6))) for pair in pairs]
    logits = model.logits(asked)
    assert reads == [(3, len(pairs))]
    assert [each.layers[-1] for each in logits] == pytest.approx(model.logits(pairs), abs=1e-5)
    assert len({each.layers for each in logits}) == len(pairs)


class LateTransfers(Transfers):
    """Stands for pinned memory: numbers are there once they are asked for, and not before."""

    overlap = True
    downloads = 0

    def download(self, values):
        type(self).downloads += 1
        return lambda: values.clone().tolist()


@pytest.fixture
def late(monkeypatch) -> Iterator[type[LateTransfers]]:
    for module in (encoder_model, causal_model):
        monkeypatch.setattr(module, "transfers_for", LateTransfers)
    monkeypatch.setattr(LateTransfers, "downloads", 0)
    return LateTransfers


def test_models_that_run_ahead_give_the_very_same_logits(case, request):
    folder, settings, _ = case
    options = {"device": "cpu", "dtype": "float32", "pack_tokens": 64, **settings}
    with Reranker(str(folder), **options) as engine:
        wanted = engine.logits(QUERY, DOCUMENTS)
    late = request.getfixturevalue("late")
    with Reranker(str(folder), **options) as engine:
        assert all(worker.model.runs_ahead for worker in engine._core.workers)
        assert engine.logits(QUERY, DOCUMENTS) == wanted
        assert late.downloads == engine.stats().packs > 1


# The check at load


@contextmanager
def pinned_as(kind: type[Transfers], monkeypatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(transfers, "PinnedTransfers", lambda _: kind(CPU))
        yield


class Stale(LateTransfers):
    def download(self, values):
        return lambda: [0] * len(values)


class Shifted(LateTransfers):
    def upload(self, arrays):
        return [each + 1 for each in super().upload(arrays)]


class Refused(LateTransfers):
    def upload(self, arrays):
        raise RuntimeError("CUDA error: operation not supported\nmore")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Stale, "values change"),
        (Shifted, "values change on the way"),
        (Refused, "operation not supported"),
    ],
)
def test_copies_that_are_wrong_or_refused_are_not_used(monkeypatch, caplog, kind, reason):
    with pinned_as(kind, monkeypatch):
        found = transfers.transfers_for(torch.device("cuda", 0))
    assert type(found) is Transfers
    assert not found.overlap
    [record] = own_records(caplog)
    assert reason in record.getMessage()
    assert "more" not in record.getMessage()


def test_copies_that_are_right_are_used(monkeypatch, caplog):
    with pinned_as(LateTransfers, monkeypatch), caplog.at_level(logging.WARNING):
        assert type(transfers.transfers_for(torch.device("cuda", 0))) is LateTransfers
    assert not own_records(caplog)


@pytest.mark.parametrize("kind", ["cpu", "mps", "xpu"])
def test_on_other_devices_copies_wait_though_they_would_pass_the_check(kind, monkeypatch):
    with pinned_as(LateTransfers, monkeypatch):
        assert not transfers.transfers_for(torch.device(kind)).overlap


def test_uploaded_arrays_are_what_they_were():
    arrays = [np.arange(3, dtype=np.int64), np.arange(5, dtype=np.int64) * 7]
    for kind in (Transfers, transfers.HostTransfers):
        found = kind(CPU).upload(arrays)
        assert [each.tolist() for each in found] == [each.tolist() for each in arrays]
        assert {each.dtype for each in found} == {torch.int64}
