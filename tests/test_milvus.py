"""The drop-in for pymilvus' BGERerankFunction, beside the original."""

import copy
import gc
import inspect
import json
import pickle
import re
import weakref

import numpy as np
import pytest
import torch

from bge_rerank_adapters import DeviceError, InputTypeError, SettingsError
from bge_rerank_adapters.calls.ranking import sigmoid
from bge_rerank_adapters.milvus import BGERerankFunction, RerankResult
from tests.checkpoints import build_xlm_roberta, read_queries, read_sentences
from tests.test_imports import run_python
from tests.texts import DOCUMENTS, QUERY

query, documents = QUERY, DOCUMENTS
SENTENCES = list(read_sentences().values())[:40]


@pytest.fixture(scope="module")
def function() -> BGERerankFunction:
    return BGERerankFunction("tiny", use_fp16=False, device="cpu")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """milvus-model's own function and ours, on the same small float32 checkpoint."""
    pytest.importorskip("milvus_model")
    pytest.importorskip("FlagEmbedding")
    from milvus_model.reranker.bgereranker import BGERerankFunction as Original

    # FlagEmbedding tells the family from the folder's name.
    folder = str(build_xlm_roberta(tmp_path_factory.mktemp("m") / "bge-reranker-v2-m3"))
    settings = {"model_name": folder, "use_fp16": False, "device": "cpu"}
    return lambda **more: (Original(**settings, **more), BGERerankFunction(**settings, **more))


def test_the_documented_snippet(capsys):
    bge_rf = BGERerankFunction(model_name="tiny", device="cpu")
    results = bge_rf(query=query, documents=documents, top_k=3)
    for result in results:
        print(f"Index: {result.index}")  # noqa: T201
        print(f"Score: {result.score:.6f}")  # noqa: T201
        print(f"Text: {result.text}\n")  # noqa: T201
    printed = capsys.readouterr().out
    first = r"Index: 1\nScore: 0\.\d{6}\nText: The Dartmouth Conference in 1956"
    assert re.match(first, printed)
    assert len(results) == 3
    assert printed.count("Index:") == 3


def test_scores_equal_the_originals(original):
    for normalize in (True, False):
        theirs, ours = original(normalize=normalize)
        for question in list(read_queries().values())[:3]:
            wanted = theirs(question, SENTENCES, top_k=10)
            got = ours(question, SENTENCES, top_k=10)
            assert [each.index for each in got] == [each.index for each in wanted]
            assert [each.text for each in got] == [each.text for each in wanted]
            assert [each.score for each in got] == pytest.approx(
                [each.score for each in wanted], abs=1e-4
            )
        spread = [each.score for each in ours(question, SENTENCES, top_k=0)]
        assert spread[0] - spread[-1] > 0.1, "too flat to compare"


def test_the_constructor_and_the_call_have_the_originals_parameters():
    reranker = pytest.importorskip("milvus_model.reranker.bgereranker")
    for name in ("__init__", "__call__"):
        theirs = inspect.signature(getattr(reranker.BGERerankFunction, name)).parameters
        ours = inspect.signature(getattr(BGERerankFunction, name)).parameters
        wanted = [(each.name, each.default) for each in theirs.values() if each.name != "kwargs"]
        got = [(each.name, each.default) for each in ours.values()]
        assert got[: len(wanted)] == wanted


@pytest.mark.parametrize("text", ["plain", 'it\'s "quoted"\nand 🐼', ""])
def test_results_look_like_the_originals(text):
    base = pytest.importorskip("milvus_model.base")
    ours, theirs = RerankResult(text, 0.25, 3), base.RerankResult(text, 0.25, 3)
    assert (str(ours), repr(ours)) == (str(theirs), repr(theirs))
    assert ours.to_dict() == theirs.to_dict()
    assert (ours.text, ours.score, ours.index) == (theirs.text, theirs.score, theirs.index)


def test_results_are_plain_values_best_first(function):
    results = function(query, documents, top_k=None)
    dumped = json.loads(json.dumps([each.to_dict() for each in results]))
    assert [set(each) for each in dumped] == [{"text", "score", "index"}] * 4
    assert [each.text for each in results] == [documents[each.index] for each in results]
    scores = [each.score for each in results]
    assert scores == sorted(scores, reverse=True)
    assert {(type(each.score), type(each.index)) for each in results} == {(float, int)}


def test_top_k_is_5_and_a_falsy_one_is_all(function):
    assert len(function(query, SENTENCES)) == 5
    assert [len(function(query, SENTENCES, top_k=k)) for k in (0, None, 2, 99)] == [40, 40, 2, 40]
    assert function(query, []) == []
    assert len(function(query, SENTENCES, top_k=np.int64(0))) == 40
    for wrong in (-1, 2.5, "3", np.array([1, 2])):
        with pytest.raises(SettingsError, match="top_k must be"):
            function(query, documents, top_k=wrong)


def test_without_normalising_the_score_is_the_logit(function):
    raw = BGERerankFunction("tiny", use_fp16=False, device="cpu", normalize=False)
    scores, logits = function(query, documents), raw(query, documents)
    assert [each.index for each in logits] == [each.index for each in scores]
    assert [sigmoid(each.score) for each in logits] == [each.score for each in scores]
    assert min(each.score for each in logits) < 0


def test_inputs_are_untouched_and_duplicates_tie(function):
    given = [*SENTENCES[:3], SENTENCES[0], "", SENTENCES[2]]
    before = copy.deepcopy(given)
    results = {each.index: each.score for each in function("Who won?", given, top_k=0)}
    assert given == before
    assert sorted(results) == list(range(6))
    assert (results[0], results[2]) == (results[3], results[5])


@pytest.mark.parametrize(("bad", "message"), [("one", "wrap a single"), (["a", None], r"nts\[1\]")])
def test_documents_are_checked(function, bad, message):
    with pytest.raises(InputTypeError, match=message):
        function(query, bad)
    with pytest.raises(InputTypeError, match="The query must be a str"):
        function(None, documents)


def test_the_device_may_be_a_list_and_devices_overrides_it():
    settings = {"model_name": "tiny", "use_fp16": False}
    assert BGERerankFunction(**settings, device=["cpu"]).device == "cpu"
    assert BGERerankFunction(**settings, device="cuda:99", devices="cpu").device == "cpu"
    assert BGERerankFunction(**settings, device="cpu", devices=None).device == "cpu"
    for absent in ({"device": 99}, {"device": "cpu", "devices": ["cuda:99"]}, {"devices": "99"}):
        with pytest.raises(DeviceError, match="'cuda:99' is not available"):
            BGERerankFunction(**settings, **absent)


def test_devices_and_numbers_of_torch_and_numpy_are_taken(function):
    settings = {"model_name": "tiny", "use_fp16": False, "batch_size": np.int64(8)}
    assert BGERerankFunction(**settings, device=torch.device("cpu")).device == "cpu"
    assert BGERerankFunction(**settings, device=[torch.device("cpu")]).device == "cpu"
    with pytest.raises(DeviceError, match="'cuda:98' is not available"):
        BGERerankFunction(**settings, device=np.int64(98))
    less = BGERerankFunction(**settings, device="cpu", max_length=np.int64(128)).reranker.settings
    assert (less.max_length, less.query_max_length) == (128, None)


def test_precision():
    assert BGERerankFunction("tiny", use_fp16=False, device="cpu").reranker.dtype == "float32"
    half = BGERerankFunction("tiny", use_fp16=False, device="cpu", dtype="bfloat16")
    assert half.reranker.dtype == "bfloat16"
    assert BGERerankFunction("tiny", device="cpu").reranker.settings.dtype == "auto"


def test_lengths():
    defaults = BGERerankFunction("tiny", use_fp16=False, device="cpu").reranker.settings
    assert (defaults.max_length, defaults.query_max_length) == (512, 256)
    less = BGERerankFunction("tiny", use_fp16=False, device="cpu", max_length=128).reranker.settings
    assert (less.max_length, less.query_max_length) == (128, None)


@pytest.mark.parametrize(
    ("keyword", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": "32"}, "batch_size must be at least 1, got '32'"),
        ({"batch_size": True}, "batch_size"),
        ({"max_length": None}, "max_length must be a whole number of at least 1, got None"),
        ({"max_length": "512"}, "max_length must be a whole number of at least 1, got '512'"),
        ({"model_class": []}, r"model_class \[\] is not known"),
        ({"device": 1.5}, "device '1.5' is not known"),
        ({"trust_remote_code": True}, "trust_remote_code must be False"),
        ({"model_class": "decoder-only"}, "model_class 'decoder-only' is not known"),
        ({"query_instruction_format": "{}{}{}"}, "instruction format needs two fields"),
        ({"query_instruction_format": "{}"}, "instruction format needs two fields, .* got '{}'"),
        ({"passage_instruction_format": "{0}{0}"}, "instruction format needs two fields"),
        ({"passage_instruction_format": "none"}, "instruction format needs two fields"),
        ({"passage_instruction_format": "{instruction}"}, "instruction format needs two fields"),
        ({"device": "gpu"}, "device 'gpu' is not known"),
        ({"dtype": "float8"}, "dtype 'float8' is not known"),
        ({"query_max_length": 512}, "leaves no room for a document"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings_are_refused(keyword, message):
    with pytest.raises(SettingsError, match=message):
        BGERerankFunction("tiny", **keyword)


def test_an_unknown_keyword_is_refused_by_its_name():
    with pytest.raises(TypeError, match="normalise"):
        BGERerankFunction("tiny", normalise=True)


def test_flagembeddings_keywords_pass(function):
    other = BGERerankFunction(
        "tiny",
        use_fp16=False,
        device="cpu",
        batch_size=1,
        trust_remote_code=False,
        model_class="encoder-only-base",
    )
    assert other(query, documents) == function(query, documents)
    assert other.batch_size == 1


def test_instructions_go_before_the_texts_and_not_into_results(function):
    made = BGERerankFunction(
        "tiny",
        use_fp16=False,
        device="cpu",
        query_instruction_for_rerank="Find",
        query_instruction_format="{}: {}",
        passage_instruction_for_rerank="Text ",
    )
    plain = function(f"Find: {query}", [f"Text {each}" for each in documents])
    got = made(query, documents)
    assert [(each.index, each.score) for each in got] == [(e.index, e.score) for e in plain]
    assert [each.text for each in got] == [documents[each.index] for each in got]
    assert [e.score for e in got] != [e.score for e in function(query, documents)]


def test_instructions_equal_the_originals(original):
    theirs, ours = original(
        query_instruction_for_rerank="Find ", passage_instruction_for_rerank="Text: "
    )
    wanted = {each.index: each.score for each in theirs("What won?", SENTENCES, top_k=None)}
    got = {each.index: each.score for each in ours("What won?", SENTENCES, top_k=None)}
    assert got == pytest.approx(wanted, abs=1e-4)


def test_equal_settings_share_one_engine(function):
    same = BGERerankFunction("tiny", use_fp16=False, device=["cpu"], normalize=False, batch_size=8)
    assert same.reranker is function.reranker
    other = BGERerankFunction("tiny", use_fp16=False, device="cpu", max_length=256)
    assert other.reranker is not function.reranker


def test_a_closed_engine_is_loaded_again():
    settings = {"model_name": "tiny", "use_fp16": False, "device": "cpu", "max_length": 96}
    first, second = BGERerankFunction(**settings), BGERerankFunction(**settings)
    results = first(query, documents)
    first.reranker.close()
    assert second(query, documents) == results
    assert first(query, documents) == results
    assert first.reranker is second.reranker


def test_close_lets_go_and_a_later_call_loads_again():
    made = BGERerankFunction("tiny", use_fp16=False, device="cpu", max_length=97)
    results, engine = made(query, documents), weakref.ref(made.reranker)
    made.close()
    made.close()
    gc.collect()
    assert engine() is None
    assert made(query, documents) == results
    shared = BGERerankFunction("tiny", use_fp16=False, device="cpu", max_length=97)
    made.close()
    assert shared(query, documents) == results
    assert made.device == "cpu"


def test_pickles_and_copies_carry_settings_alone_and_share_the_engine(function):
    made = BGERerankFunction("tiny", use_fp16=False, device="cpu", token="hf_secret")  # noqa: S106
    pickled = pickle.dumps(made)
    assert len(pickled) < 10_000
    assert b"hf_secret" not in pickled
    for again in (pickle.loads(pickle.dumps(function)), copy.deepcopy(function)):  # noqa: S301
        assert again(query, documents) == function(query, documents)
        assert again.reranker is function.reranker


def test_no_host_is_imported_and_no_pip_is_run():
    code = """
import os, subprocess
def refuse(*args, **kwargs):
    raise SystemExit(f"a process was started: {args}")
subprocess.Popen = os.system = refuse
from bge_rerank_adapters.milvus import BGERerankFunction
results = BGERerankFunction("tiny", device="cpu")("Who wrote Faust?", ["It rains.", "Goethe did."])
hosts = ("pymilvus", "milvus_model", "FlagEmbedding", "pip", "langchain_core", "llama_index")
print(len(results), [name for name in hosts if name in sys.modules])
"""
    done = run_python(code)
    assert done.stdout.strip() == "2 []", done.stdout + done.stderr
    without = run_python(code, blocked=("pymilvus", "milvus_model", "FlagEmbedding"))
    assert without.stdout.strip() == "2 []", without.stderr
