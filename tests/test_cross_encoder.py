"""The drop-in for sentence-transformers' CrossEncoder, against the real one on the same weights."""

import inspect
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bge_rerank_adapters import Reranker, RerankError, SettingsError
from bge_rerank_adapters.cross_encoder import CrossEncoder
from tests.checkpoints import build_bert, build_xlm_roberta, read_queries, read_sentences
from tests.family_checkpoints import build_family
from tests.texts import DOCUMENTS, QUERY

sentence_transformers = pytest.importorskip("sentence_transformers", minversion="6.2")

PARITY = 1e-4
SECRET = "hf_secret"  # noqa: S105
FLOAT32 = {"dtype": "float32"}
LONG_QUERY = " ".join(list(read_queries().values())[:40])
PAIRS = [
    *zip(list(read_queries().values())[:12], list(read_sentences().values())[:12], strict=True),
    ("", "No question."),
    (" ".join(LONG_QUERY.split()[:180]), "A short one."),
]


@pytest.fixture(scope="module", params=[build_xlm_roberta, build_bert])
def folder(request, tmp_path_factory) -> Path:
    return request.param(tmp_path_factory.mktemp("cross") / "checkpoint")


@pytest.fixture(scope="module")
def theirs(folder):
    return sentence_transformers.CrossEncoder(str(folder), device="cpu")


@pytest.fixture(scope="module")
def ours(folder):
    return CrossEncoder(str(folder), device="cpu", model_kwargs=FLOAT32)


def near(wanted):
    return pytest.approx(np.asarray(wanted).tolist(), abs=PARITY)


def test_scores_are_those_of_sentence_transformers(ours, theirs):
    scores, wanted = ours.predict(PAIRS), theirs.predict(PAIRS)
    assert (type(scores), scores.dtype, scores.shape) == (np.ndarray, wanted.dtype, wanted.shape)
    assert scores.tolist() == near(wanted)
    identity = torch.nn.Identity()
    scores = ours.predict(PAIRS, activation_fn=identity).tolist()
    assert scores == near(theirs.predict(PAIRS, activation_fn=identity))
    assert max(scores) - min(scores) > 100 * PARITY


@pytest.mark.parametrize("inputs", [PAIRS[:3], PAIRS[0], list(PAIRS[0]), [], np.array(PAIRS[:3])])
@pytest.mark.parametrize(
    "options", [{}, {"convert_to_tensor": True}, {"convert_to_numpy": False}], ids=str
)
def test_results_have_the_types_of_sentence_transformers(ours, theirs, inputs, options):
    found, wanted = (each.predict(inputs, **options) for each in (ours, theirs))
    assert type(found) is type(wanted)
    assert getattr(found, "dtype", None) == getattr(wanted, "dtype", None)
    assert getattr(found, "shape", None) == getattr(wanted, "shape", None)
    if isinstance(found, list):
        assert [(type(each), each.shape) for each in found] == [
            (type(each), each.shape) for each in wanted
        ]
    assert np.asarray(found).tolist() == near(wanted)


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"return_documents": True, "prompt": "Q: "}])
def test_rankings_are_those_of_sentence_transformers(ours, theirs, options):
    found, wanted = (each.rank(QUERY, DOCUMENTS, **options) for each in (ours, theirs))
    assert [each["corpus_id"] for each in found] == [each["corpus_id"] for each in wanted]
    assert [each.keys() for each in found] == [each.keys() for each in wanted]
    assert [each.get("text") for each in found] == [each.get("text") for each in wanted]
    assert [each["score"] for each in found] == near([each["score"] for each in wanted])
    assert {type(each["score"]) for each in found} == {float}
    assert ours.rank(QUERY, []) == []


def test_lengths_are_those_of_sentence_transformers(ours, theirs, folder):
    assert ours.max_seq_length == theirs.max_seq_length
    long = [(QUERY, " ".join(read_sentences().values())[:6000])]
    assert ours.predict(long).tolist() == near(theirs.predict(long))
    cut = CrossEncoder(str(folder), device="cpu", model_kwargs=FLOAT32, max_length=96)
    wanted = sentence_transformers.CrossEncoder(str(folder), device="cpu", max_length=96)
    assert cut.max_seq_length == 96
    assert cut.predict(long).tolist() == near(wanted.predict(long))
    cut.max_seq_length = ours.max_seq_length
    assert cut.predict(long).tolist() == ours.predict(long).tolist()


def test_prompts_and_activation_of_the_author_and_of_the_caller(folder, tmp_path):
    saved = tmp_path / "saved"
    prompts = {"ask": "Question: ", "other": "Other: "}
    sentence_transformers.CrossEncoder(
        str(folder),
        device="cpu",
        prompts=prompts,
        default_prompt_name="ask",
        activation_fn=torch.nn.Tanh(),
    ).save_pretrained(str(saved))
    theirs = sentence_transformers.CrossEncoder(str(saved), device="cpu")
    ours = CrossEncoder(str(saved), device="cpu", model_kwargs=FLOAT32)
    assert ours.prompts == theirs.prompts
    for options in (
        {},
        {"prompt_name": "other"},
        {"prompt": ""},
        {"prompt": "Now: "},
        {"activation_fn": torch.nn.Sigmoid()},
    ):
        assert ours.predict(PAIRS, **options).tolist() == near(theirs.predict(PAIRS, **options))
    with pytest.raises(SettingsError, match="'missing' is none of the prompts"):
        ours.predict(PAIRS, prompt_name="missing")
    both = {"prompts": {"ask": "Mine: "}, "device": "cpu"}
    wanted = sentence_transformers.CrossEncoder(str(saved), **both).predict(PAIRS)
    found = CrossEncoder(str(saved), model_kwargs=FLOAT32, **both).predict(PAIRS)
    assert found.tolist() == near(wanted)


def test_an_old_activation_is_read(folder, tmp_path):
    old = Path(shutil.copytree(folder, tmp_path / "old"))
    config = json.loads((old / "config.json").read_text("utf-8"))
    config["sbert_ce_default_activation_function"] = "torch.nn.modules.linear.Identity"
    (old / "config.json").write_text(json.dumps(config), "utf-8")
    wanted = sentence_transformers.CrossEncoder(str(old), device="cpu").predict(PAIRS)
    found = CrossEncoder(str(old), device="cpu", model_kwargs=FLOAT32).predict(PAIRS)
    assert found.tolist() == near(wanted)


@pytest.mark.parametrize("method", ["__init__", "predict", "rank"])
def test_arguments_are_those_of_sentence_transformers(method):
    found, wanted = (
        [
            (each.name, each.kind, each.default)
            for each in inspect.signature(getattr(kind, method)).parameters.values()
            if each.kind is not each.VAR_KEYWORD
        ]
        for kind in (CrossEncoder, sentence_transformers.CrossEncoder)
    )
    assert found == wanted


def test_the_engine_is_shared_and_copies_carry_settings(folder):
    encoder = CrossEncoder(str(folder), device="cpu", token=SECRET)
    assert CrossEncoder(str(folder), device="cpu", token=SECRET).reranker is encoder.reranker
    dumped = pickle.dumps(encoder)
    assert SECRET.encode() not in dumped
    other = pickle.loads(dumped)  # noqa: S301
    assert other.predict(PAIRS).tolist() == encoder.predict(PAIRS).tolist()
    encoder.close()
    assert encoder.predict(PAIRS[0]) == other.predict(PAIRS[0])


def test_the_bundled_checkpoint_and_a_bar(capfd):
    encoder = CrossEncoder("tiny", device="cpu", model_kwargs=FLOAT32)
    with Reranker("tiny", device="cpu", dtype="float32") as engine:
        wanted = engine.score(QUERY, DOCUMENTS)
    pairs = [(QUERY, text) for text in DOCUMENTS]
    assert encoder.predict(pairs).tolist() == near(wanted)
    assert capfd.readouterr().err == ""
    assert encoder.predict(pairs, show_progress_bar=True).tolist() == near(wanted)
    assert f"{len(pairs)}/{len(pairs)}" in capfd.readouterr().err


def test_importing_it_loads_no_torch():
    code = "import sys, bge_rerank_adapters.cross_encoder; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_causal_models_are_refused(tmp_path):
    for model in (str(build_family(tmp_path, "decoder")), "BAAI/bge-reranker-v2-gemma"):
        with pytest.raises(RerankError, match="encoder family"):
            CrossEncoder(model, device="cpu")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_labels": 3}, SettingsError, "num_labels must be 1, got 3.*sentence_transformers"),
        ({"config_kwargs": {"num_labels": 2}}, SettingsError, "num_labels must be 1"),
        ({"backend": "onnx"}, SettingsError, "backend is not supported here"),
        ({"modules": []}, SettingsError, "modules"),
        (
            {"model_kwargs": {"subfolder": "x"}},
            SettingsError,
            "model_kwargs takes dtype.*subfolder",
        ),
        ({"device": ["cpu", "cpu"]}, SettingsError, "one device"),
        ({"token": False}, SettingsError, "token"),
        ({"automodel_args": {}}, TypeError, "called 'model_kwargs' now"),
        ({"default_activation_function": None}, TypeError, "called 'activation_fn' now"),
        ({"default_prompt_name": "x"}, SettingsError, "'x' is none of the prompts"),
        ({"max_length": 0}, SettingsError, "max_"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        CrossEncoder("tiny", **({"device": "cpu"} | options))


def test_bad_calls_are_named():
    encoder = CrossEncoder("tiny", device="cpu")
    for call, error, message in (
        (lambda: encoder.predict([("a", 1)]), TypeError, r"inputs\[0\]"),
        (lambda: encoder.predict("ab"), TypeError, "tuple"),
        (lambda: encoder.predict([{"text": "a"}]), TypeError, r"inputs"),
        (lambda: encoder.predict([("a", "b")], device="cuda"), SettingsError, "device 'cuda'"),
        (lambda: encoder.predict([("a", "b")], pool={}), SettingsError, "pool"),
        (lambda: encoder.predict([("a", "b")], batch_size=0), SettingsError, "batch_size"),
        (lambda: encoder.predict(sentences=[]), TypeError, "inputs"),
        (lambda: encoder.rank("a", ["b"], top_k=0), SettingsError, "top_k"),
        (lambda: encoder.rank("a", "b"), TypeError, "documents"),
    ):
        with pytest.raises(error, match=message):
            call()
    for name in ("fit", "save_pretrained", "start_multi_process_pool", "to", "model"):
        with pytest.raises(AttributeError, match=f"CrossEncoder.{name} is not supp.*sentence_tr"):
            getattr(encoder, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        encoder.nothing  # noqa: B018
