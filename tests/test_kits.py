"""Which layers an encoder runs with: chosen once, from a list that a back end joins by a line."""

import pytest
import torch

from bge_rerank_adapters import Reranker
from bge_rerank_adapters.engine.checkpoints.model_config import read_config
from bge_rerank_adapters.engine.models.cpu.onednn import kit as onednn
from bge_rerank_adapters.engine.models.cpu.streams import StreamedModel
from bge_rerank_adapters.engine.models.encoder import kit as kits
from bge_rerank_adapters.engine.models.encoder.config import parse_config
from bge_rerank_adapters.engine.models.encoder.kit import KITS, choose_kit, describe_kits
from bge_rerank_adapters.engine.models.encoder.plain import PlainKit
from tests.checkpoints import build_xlm_roberta, read_sentences

CPU = torch.device("cpu")
QUERY, *DOCUMENTS = list(read_sentences().values())[:12]


class Halves(PlainKit):
    """Suits half precision alone."""

    label = "halves"

    @classmethod
    def lack(cls, request):
        return None if request.dtype == torch.bfloat16 else "they are for bfloat16"


class Eights(PlainKit):
    label, int8 = "eights", True


@pytest.fixture
def config(tmp_path):
    return parse_config(read_config(build_xlm_roberta(tmp_path)), folder=tmp_path)


@pytest.mark.parametrize(
    ("listed", "dtype", "chosen"),
    [
        ((Halves, PlainKit), torch.bfloat16, Halves),
        ((Halves, PlainKit), torch.float32, PlainKit),
        ((Eights, Halves, PlainKit), torch.bfloat16, Halves),
        ((Eights, Halves, PlainKit), torch.int8, Eights),
        ((Halves, Eights, PlainKit), torch.int8, Halves),
        ((Halves, PlainKit), torch.int8, Halves),
    ],
)
def test_a_model_runs_with_the_first_kit_that_suits_it(monkeypatch, config, listed, dtype, chosen):
    monkeypatch.setattr(kits, "KITS", listed)
    monkeypatch.setattr(kits, "resolve_dtype", lambda *_: torch.bfloat16)
    kit = choose_kit(config, CPU, dtype)
    assert type(kit) is chosen
    assert kit.dtype == (torch.float32 if dtype == torch.float32 else torch.bfloat16)
    assert kit.layer_dtype == (torch.int8 if chosen is Eights else kit.dtype)
    assert kit.tensor_dtype == (torch.float32 if chosen is Eights else kit.dtype)


def test_what_is_said_where_8_bit_layers_do_not_pay(monkeypatch, config, caplog):
    monkeypatch.setattr(kits, "KITS", (Halves, Eights, PlainKit))
    monkeypatch.setattr(kits, "resolve_dtype", lambda *_: torch.bfloat16)
    with caplog.at_level("INFO"):
        choose_kit(config, CPU, torch.int8)
    assert "no 8-bit layers are faster here than halves" in caplog.text


def test_a_gpu_is_left_to_pytorchs_layers(config):
    assert type(choose_kit(config, torch.device("meta"), torch.float32)) is PlainKit


def test_a_back_end_is_a_class_and_a_line(monkeypatch):
    """The whole of what another one needs: it is chosen, run, streamed and described."""
    made = []

    class Own(PlainKit):
        label = "own layers"

        def layer(self, source):
            made.append(source.last)
            return super().layer(source)

        def pack_rows(self, tokens):
            return tokens

        def stream_count(self):
            return 2

    with Reranker("tiny", device="cpu", dtype="float32") as reranker:
        expected = reranker.logits(QUERY, DOCUMENTS)
    monkeypatch.setattr(kits, "KITS", (Own, *KITS))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with Reranker("tiny", device="cpu", dtype="float32") as reranker:
        model = reranker._core.workers[0].model
        assert isinstance(model, StreamedModel)
        assert model.streams == 2
        assert reranker.logits(QUERY, DOCUMENTS) == pytest.approx(expected, abs=1e-4)
    assert made == [False] * (len(made) - 1) + [True]
    assert ("own layers", "used") in describe_kits(CPU, torch.float32)


@pytest.mark.parametrize("pays", [True, False])
def test_each_kit_says_whether_and_why_it_is_not_used(monkeypatch, pays):
    monkeypatch.setattr(onednn, "int8_pays", lambda *_: pays)
    monkeypatch.setattr(onednn, "int8_works", lambda: True)
    monkeypatch.setattr(onednn, "packed_works", lambda _: True)
    # Own kernels in int8 are there on some CPUs.
    monkeypatch.setattr(
        kits, "KITS", tuple(kit for kit in KITS if not (kit.int8 and "Own" in kit.label))
    )
    said = dict(describe_kits(CPU, torch.float32))
    assert said["Own kernels for AMX"].startswith("not used: ")
    assert said["oneDNN's layers"] == "used"
    assert said["PyTorch's layers"] == "not used: another one is faster"
    expected = "used with int8" if pays else "not used: they are no faster here than"
    assert said["oneDNN's layers in int8"].startswith(expected)
