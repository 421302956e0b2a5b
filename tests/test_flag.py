"""Models run through FlagEmbedding itself, behind the engine's own methods."""

import sys
import threading
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bge_rerank_adapters import (
    CheckpointError,
    DeviceError,
    Reranker,
    SettingsError,
    UnsupportedCheckpointError,
)
from bge_rerank_adapters.engine.checkpoints.hub import TINY_FOLDER
from bge_rerank_adapters.langchain import BGEDocumentCompressor
from bge_rerank_adapters.milvus import BGERerankFunction
from tests.checkpoints import (
    VOCABULARY_SIZE,
    build_bert,
    build_xlm_roberta,
    read_sentences,
)
from tests.family_checkpoints import CASES, build_family, case_pairs
from tests.test_families import PARITY, REFERENCE, pair_logits, worst

pytest.importorskip("FlagEmbedding")

QUERY = "Who coached the Panthers?"
SENTENCES = list(read_sentences().values())[:20]
NEW = transformers.__version__ != "4.44.2"
FLAG = {"backend": "flagembedding", "device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return build_xlm_roberta(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def decoder(tmp_path):
    return build_family(tmp_path, "decoder")


def native(folder, **settings) -> Reranker:
    return Reranker(str(folder), device="cpu", dtype="float32", **settings)


def test_an_encoder_gives_its_native_logits_in_silence(encoder, capfd):
    with Reranker(str(encoder), **FLAG) as flag, native(encoder) as ours:
        theirs = flag.rerank(QUERY, SENTENCES, top_k=5)
        assert flag.rerank(QUERY, []) == []
        assert len(flag.rerank(QUERY, SENTENCES[:1])) == 1
        wanted = ours.rerank(QUERY, SENTENCES, top_k=5)
    assert [each.index for each in theirs] == [each.index for each in wanted]
    assert [each.logit for each in theirs] == pytest.approx(
        [each.logit for each in wanted], abs=PARITY
    )
    shown = capfd.readouterr()
    assert "it/s" not in shown.out + shown.err
    assert "Score" not in shown.out + shown.err


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.family == "decoder"])
def test_decoders_give_the_recorded_logits(name, tmp_path, capfd):
    case = CASES[name]
    if name == "decoder-bos-is-pad" or (NEW and "hidden_activation" in str(case.build)):
        pytest.skip("another tokenizer, or an activation that transformers 5 replaces")
    folder = build_family(tmp_path, case.family, **case.build)
    with Reranker(str(folder), **FLAG, **case.settings) as flag:
        assert worst(pair_logits(flag, case_pairs()), REFERENCE["cases"][name]) <= PARITY
    shown = capfd.readouterr()
    assert "it/s" not in shown.out + shown.err


@pytest.mark.parametrize("name", ["layerwise-middle", "lightweight-ratio-2"])
def test_classes_that_need_another_transformers_say_which(name, tmp_path):
    case = CASES[name]
    folder = build_family(tmp_path, case.family, **case.build)
    if not NEW:
        with Reranker(str(folder), **FLAG, **case.settings) as flag:
            assert worst(pair_logits(flag, case_pairs()), REFERENCE["cases"][name]) <= PARITY
        return
    with pytest.raises(UnsupportedCheckpointError, match=r"transformers 4\.44\.2") as caught:
        Reranker(str(folder), **FLAG, **case.settings)
    assert str(folder) in str(caught.value)
    assert transformers.__version__ in str(caught.value)
    assert 'backend="native"' in str(caught.value)


def test_cut_documents_and_surrogates_as_natively(encoder):
    documents = [" ".join(SENTENCES), "short", "a \ud800 b"]
    with (
        Reranker(str(encoder), max_length=64, **FLAG) as flag,
        native(encoder, max_length=64) as ours,
    ):
        theirs, wanted = (
            sorted(each.rerank(QUERY, documents), key=lambda result: result.index)
            for each in (flag, ours)
        )
    assert [each.truncated for each in theirs] == [True, False, False]
    assert [each.truncated for each in wanted] == [True, False, False]


def test_adapters_take_the_backend(encoder):
    compressor = BGEDocumentCompressor(model=str(encoder), **FLAG)
    function = BGERerankFunction(
        str(encoder), use_fp16=False, device="cpu", backend="flagembedding"
    )
    with native(encoder) as ours:
        wanted = ours.rerank(QUERY, SENTENCES, top_k=1)[0]
    [result] = function(QUERY, SENTENCES, top_k=1)
    assert result.index == wanted.index
    assert compressor.scorer.rerank(QUERY, SENTENCES, top_k=1)[0].index == wanted.index


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"long_documents": "window"}, "long_documents='window' needs backend='native'"),
        ({"dtype": "int8"}, "dtype='int8' needs backend='native'"),
    ],
)
def test_what_flagembedding_cannot_do_is_refused_by_name(encoder, settings, message):
    with pytest.raises(SettingsError, match=message):
        Reranker(str(encoder), backend="flagembedding", **settings)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtypes_that_it_would_silently_replace_are_refused(encoder, dtype):
    with pytest.raises(DeviceError, match='use dtype="float32"'):
        Reranker(str(encoder), backend="flagembedding", device="cpu", dtype=dtype)


def test_bfloat16_reaches_a_decoder(decoder):
    with Reranker(str(decoder), backend="flagembedding", device="cpu", dtype="bfloat16") as flag:
        assert flag.dtype == "bfloat16"
        assert flag._core.workers[0].model._reranker.model.dtype == torch.bfloat16
        assert 0.0 <= flag.score(QUERY, SENTENCES[:1])[0] <= 1.0


@pytest.mark.skipif(
    not NEW,
    reason="on transformers 4 FlagEmbedding sets no special tokens around pairs for a tokenizer "
    "of no model's own class, as the bundled checkpoint's is",
)
def test_float32_is_float32_whatever_is_stored():
    """The bundled weights are stored in float16, and transformers 5 would keep them so."""
    stored = load_file(TINY_FOLDER / "model.safetensors")
    assert torch.float16 in {tensor.dtype for tensor in stored.values()}
    with Reranker("tiny", **FLAG) as flag, native("tiny") as ours:
        assert flag.logits(QUERY, SENTENCES) == pytest.approx(
            ours.logits(QUERY, SENTENCES), abs=PARITY
        )


def changed(folder: Path, target: Path, change) -> Path:
    """Copy a checkpoint with its tensors changed."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_checkpoint_without_a_head_is_refused(encoder, tmp_path):
    """transformers makes one up, of random numbers."""
    headless = changed(
        encoder,
        tmp_path / "headless",
        lambda tensors: {k: v for k, v in tensors.items() if not k.startswith("classifier")},
    )
    with pytest.raises(CheckpointError, match=r"lack the tensor classifier\.out_proj\.weight"):
        Reranker(str(headless), **FLAG)


@pytest.mark.parametrize("native_too", [True, False])
def test_several_labels_are_refused(tmp_path, native_too):
    if native_too:
        build_xlm_roberta(tmp_path, labels=3)
    else:
        build_electra(tmp_path, labels=3)
    with pytest.raises(UnsupportedCheckpointError, match="classifier of 3 labels"):
        Reranker(str(tmp_path), **FLAG)


def test_a_pickle_is_not_read(encoder, tmp_path):
    folder = changed(encoder, tmp_path / "pickled", lambda tensors: tensors)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin only, a pickle"):
        Reranker(str(folder), **FLAG)


def test_too_little_memory_is_told_as_such(encoder, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", fail)
    with pytest.raises(DeviceError, match="too little memory to load the model"):
        Reranker(str(encoder), **FLAG)


def test_several_devices_run_at_the_same_time_in_silence(encoder, capfd):
    with Reranker(str(encoder), **(FLAG | {"device": ["cpu", "cpu"]}), pack_tokens=1) as flag:
        module = sys.modules[type(flag._core.workers[0].model._reranker).__module__]
        shown = module.tqdm, module.trange
        both = threading.Barrier(2)
        for model in (worker.model for worker in flag._core.workers):
            meet(model._reranker, both)
        assert len(flag.score(QUERY, SENTENCES[:2])) == 2
        assert (module.tqdm, module.trange) == shown
    captured = capfd.readouterr()
    assert "it/s" not in captured.out + captured.err


def meet(reranker, barrier: threading.Barrier) -> None:
    """Let a reranker score only while another one does."""
    compute = reranker.compute_score

    def meeting(*args, **kwargs):
        barrier.wait(100)
        scores = compute(*args, **kwargs)
        barrier.wait(100)
        return scores

    reranker.compute_score = meeting


def test_a_missing_flagembedding_names_its_extra(encoder, monkeypatch):
    monkeypatch.setitem(sys.modules, "FlagEmbedding", None)
    with pytest.raises(ImportError, match=r'pip install "bge-rerank-adapters\[flagembedding\]"'):
        Reranker(str(encoder), **FLAG)


def build_electra(folder: Path, *, labels: int = 1) -> Path:
    """Write an ELECTRA cross-encoder, with BERT's tokenizer."""
    build_bert(folder)
    config = transformers.ElectraConfig(
        vocab_size=VOCABULARY_SIZE,
        embedding_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=labels,
    )
    transformers.ElectraForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_a_model_that_only_flagembedding_knows_runs(tmp_path):
    """Its class takes whatever transformers has a sequence classifier for."""
    build_electra(tmp_path)
    with pytest.raises(UnsupportedCheckpointError, match="is not supported"):
        native(tmp_path)
    with Reranker(str(tmp_path), **FLAG) as flag:
        assert len(flag.rerank(QUERY, SENTENCES)) == len(SENTENCES)
