"""What is wrong, missing or odd is refused with a message that helps, or has a defined result."""

import copy
import json
import math
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bge_rerank_adapters import (
    CheckpointError,
    CheckpointNotFoundError,
    DeviceError,
    InputTypeError,
    NonFiniteLogitError,
    Reranker,
    SettingsError,
    UnsupportedCheckpointError,
)
from tests.checkpoints import VOCABULARY_SIZE, build_bert, build_xlm_roberta
from tests.texts import DOCUMENTS, QUERY

WEIGHTS = "model.safetensors"
Edit = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_xlm_roberta(tmp_path_factory.mktemp("sound") / "checkpoint")


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """Return a copy of a sound checkpoint, for the test to spoil."""
    return Path(shutil.copytree(sound, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def small(sound: Path) -> Iterator[Reranker]:
    with Reranker(str(sound), device="cpu", dtype="float32") as engine:
        yield engine


def load(folder: Path | str, **settings) -> Reranker:
    return Reranker(str(folder), **{"device": "cpu", "dtype": "float32", **settings})


def edit_weights(folder: Path, edit: Edit) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(folder: Path, **entries: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **entries}), "utf-8")


def message(info: pytest.ExceptionInfo[BaseException], *parts: object) -> str:
    """Check that the message has all parts, and is one that a person can read at a glance."""
    text = str(info.value)
    missing = [part for part in parts if str(part) not in text]
    assert not missing, f"{missing} not in: {text}"
    assert "Traceback" not in text
    return text


def test_the_checkpoint_that_the_tests_spoil_is_sound_before(folder):
    with load(folder) as engine:
        assert len(engine.rerank(QUERY, DOCUMENTS)) == len(DOCUMENTS)


# Texts


def test_no_documents_give_an_empty_result(reranker):
    assert reranker.rerank(QUERY, []) == []
    assert reranker.rerank(QUERY, [], top_k=3, score_threshold=0.5) == []
    assert reranker.score(QUERY, ()) == reranker.logits(QUERY, []) == reranker.score_pairs([]) == []


def test_one_document_gives_a_list_of_one(reranker):
    (result,) = reranker.rerank(QUERY, DOCUMENTS[:1])
    assert (result.index, result.text) == (0, DOCUMENTS[0])
    assert result.logit == pytest.approx(reranker.logits(QUERY, DOCUMENTS)[0], abs=1e-5)


@pytest.mark.parametrize("empty", ["", " ", "\n\t \u3000", "\u200b"])
def test_an_empty_document_is_scored_and_keeps_its_place(reranker, empty):
    results = reranker.rerank(QUERY, [empty, DOCUMENTS[1], empty])
    assert sorted(result.index for result in results) == [0, 1, 2]
    assert results[0].index == 1
    assert [result.text for result in results[1:]] == [empty, empty]
    assert all(math.isfinite(result.logit) for result in results)
    assert not any(result.truncated for result in results)


@pytest.mark.parametrize("empty", ["", " \n"])
def test_an_empty_query_is_scored(reranker, empty):
    results = reranker.rerank(empty, [*DOCUMENTS, ""])
    assert sorted(result.index for result in results) == [0, 1, 2, 3, 4]
    assert all(0.0 <= result.score <= 1.0 for result in results)


def test_a_document_that_is_none_is_refused_by_its_position(reranker):
    with pytest.raises(InputTypeError) as info:
        reranker.rerank(QUERY, [DOCUMENTS[0], None, DOCUMENTS[1]])
    message(info, "documents[1]", "str", "None")
    assert isinstance(info.value, TypeError)


def test_a_query_that_is_none_is_refused(reranker):
    with pytest.raises(InputTypeError) as info:
        reranker.rerank(None, DOCUMENTS)
    message(info, "query", "str", "None")


@pytest.mark.parametrize("value", [7, 1.5, b"bytes", ["list"], {"title": "x"}, object()])
def test_anything_but_text_is_refused_by_its_type(reranker, value):
    kind = type(value).__name__
    with pytest.raises(InputTypeError) as info:
        reranker.score(QUERY, ["text", "text", value])
    message(info, "documents[2]", kind)
    with pytest.raises(InputTypeError) as info:
        reranker.logits(value, ["text"])
    message(info, "query", kind)
    with pytest.raises(InputTypeError) as info:
        reranker.score_pairs([("a", "b"), ("a", value)])
    message(info, "pairs[1]", "document", kind)


@pytest.mark.parametrize("documents", ["one text", b"bytes", None, 3])
def test_documents_that_are_no_list_are_refused_with_what_to_do(reranker, documents):
    with pytest.raises(InputTypeError) as info:
        reranker.rerank(QUERY, documents)
    message(info, "list of str", type(documents).__name__, "wrap")


class Table:
    """What pandas' DataFrame does when it is iterated over."""

    columns = ("id", "text")

    def __iter__(self):
        return iter(self.columns)


@pytest.mark.parametrize(
    ("documents", "action"),
    [
        ({"a": "one text", "b": "another"}, ".values()"),
        (OrderedDict(a="one text"), ".values()"),
        ({"one text", "another"}, "order"),
        (frozenset({"one text"}), "order"),
        (Table(), "df['text'].tolist()"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_documents_without_an_order_of_their_own_are_refused(reranker, documents, action):
    kind = type(documents).__name__
    with pytest.raises(InputTypeError) as info:
        reranker.rerank(QUERY, documents)
    message(info, "documents must be a list of str", kind, action)
    with pytest.raises(InputTypeError) as info:
        reranker.rerank_many([(QUERY, DOCUMENTS), (QUERY, documents)])
    message(info, "requests[1]", kind, action)
    with pytest.raises(InputTypeError) as info:
        reranker.score_pairs(documents)
    message(info, "pairs must be", kind, action)
    with pytest.raises(InputTypeError) as info:
        reranker.rerank_many(documents)
    message(info, "requests must be", kind, action)


def test_a_column_of_a_table_is_ranked_and_a_table_is_not(reranker):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"id": ["x"] * len(DOCUMENTS), "text": DOCUMENTS})
    with pytest.raises(InputTypeError, match=r"DataFrame; give one column .*tolist"):
        reranker.rerank(QUERY, table)
    wanted = reranker.rerank(QUERY, DOCUMENTS)
    assert reranker.rerank(QUERY, table["text"]) == wanted
    labelled = pandas.Series(DOCUMENTS, index=["columns", *"bcdefghij"[: len(DOCUMENTS) - 1]])
    assert reranker.rerank(QUERY, labelled) == wanted
    assert reranker.rerank(QUERY, dict.fromkeys(DOCUMENTS).keys()) == wanted


@pytest.mark.parametrize("lone", [np.array("x"), torch.tensor(1)], ids=["numpy", "torch"])
def test_an_array_without_dimensions_is_no_list(reranker, lone):
    for call in (partial(reranker.rerank, QUERY), reranker.score_pairs, reranker.rerank_many):
        with pytest.raises(InputTypeError, match="wrap a single"):
            call(lone)


class Same(str):
    """Texts that all claim to be equal."""

    __slots__ = ()

    def __eq__(self, other):
        return True

    def __hash__(self):
        return 1

    def __str__(self):
        return "something else"


def test_texts_of_a_class_of_their_own_are_scored_by_their_characters(reranker):
    wanted = reranker.rerank(QUERY, DOCUMENTS)
    assert reranker.rerank(Same(QUERY), [Same(text) for text in DOCUMENTS]) == wanted
    pairs = [(Same(QUERY), Same(text)) for text in DOCUMENTS]
    assert reranker.score_pairs(pairs) == reranker.score(QUERY, DOCUMENTS)
    many = reranker.rerank_many([(Same(QUERY), [Same(text) for text in DOCUMENTS])])
    assert many == [wanted]


def test_results_have_plain_texts(reranker):
    results = reranker.rerank(np.str_(QUERY), np.array(DOCUMENTS))
    assert results == reranker.rerank(QUERY, DOCUMENTS)
    assert {type(result.text) for result in results} == {str}
    given = "".join(["made ", "here"])
    assert reranker.rerank(QUERY, [given])[0].text is given


@pytest.mark.parametrize("pair", ["ab", ("only one",), ("a", "b", "c"), None, 3])
def test_a_pair_that_is_none_is_refused_by_its_position(reranker, pair):
    with pytest.raises(InputTypeError) as info:
        reranker.score_pairs([("a", "b"), pair])
    message(info, "pairs[1]", "(query, document)")


@pytest.mark.parametrize("request_", ["ab", ("only one",), ("a", ["b"], 3), None])
def test_a_request_that_is_none_is_refused_by_its_position(reranker, request_):
    with pytest.raises(InputTypeError) as info:
        reranker.rerank_many([(QUERY, DOCUMENTS), request_])
    message(info, "requests[1]", "(query, documents)")


def test_a_bad_document_of_many_requests_is_named_with_its_request(reranker):
    with pytest.raises(InputTypeError) as info:
        reranker.rerank_many([(QUERY, DOCUMENTS), (QUERY, ["fine", None])])
    message(info, "requests[1]", "documents[1]", "None")


async def test_the_async_method_refuses_the_same(reranker):
    with pytest.raises(InputTypeError) as info:
        await reranker.arerank(QUERY, ["fine", None])
    message(info, "documents[1]", "None")
    with pytest.raises(SettingsError):
        await reranker.arerank(QUERY, DOCUMENTS, top_k=0)


@pytest.mark.parametrize("lone", ["\ud800", "before \udc80 after"])
def test_lone_surrogates_are_scored_as_the_replacement_character(reranker, lone):
    valid = lone.translate(dict.fromkeys(range(0xD800, 0xE000), "\ufffd"))
    results = reranker.rerank(QUERY, [lone, *DOCUMENTS])
    (found,) = [result for result in results if result.index == 0]
    # Given back as it came, though it is read otherwise.
    assert found.text == lone
    assert reranker.logits(QUERY, [lone]) == reranker.logits(QUERY, [valid])
    assert reranker.logits(lone, DOCUMENTS[:1]) == reranker.logits(valid, DOCUMENTS[:1])


def test_a_lone_surrogate_does_not_change_its_neighbours(reranker):
    alone = reranker.logits(QUERY, DOCUMENTS)
    assert reranker.logits(QUERY, [*DOCUMENTS, "\ud800"])[:-1] == pytest.approx(alone, abs=1e-5)


def test_nul_and_control_characters_are_scored(reranker):
    documents = ["\0", "before\0after", "\x01\x02\x7f\x9f", "\ufeff\ufffe"]
    results = reranker.rerank("who\0?", documents)
    assert sorted(result.index for result in results) == [0, 1, 2, 3]
    assert {result.text for result in results} == set(documents)
    assert all(math.isfinite(result.logit) for result in results)


@pytest.mark.parametrize("unit", ["word ", "x", "\u4e2d", "\U0001f600", "\n"])
def test_a_document_of_a_megabyte_is_cut_and_scored(small, unit):
    document = unit * (1_000_000 // len(unit.encode()))
    results = small.rerank(QUERY, [document, DOCUMENTS[0]])
    (found,) = [result for result in results if result.index == 0]
    assert found.text == document
    assert math.isfinite(found.logit)
    if unit == "word ":
        assert found.truncated
    assert not next(result for result in results if result.index == 1).truncated


def test_what_lies_beyond_the_cut_does_not_count(small):
    long = "tiger river stone " * 1000
    assert small.logits(QUERY, [long]) == small.logits(QUERY, [long + "Dartmouth 1956"])


def test_a_query_longer_than_the_model_is_cut_and_leaves_room_for_the_document(small):
    query = "who was it that came " * 2000
    results = small.rerank(query, DOCUMENTS)
    assert len({result.logit for result in results}) == len(DOCUMENTS)
    assert small.logits(query, DOCUMENTS) == small.logits(query + "and why?", DOCUMENTS)


# Arguments


@pytest.mark.parametrize("top_k", [0, -1, -100])
def test_a_top_k_below_one_is_refused(reranker, top_k):
    with pytest.raises(SettingsError) as info:
        reranker.rerank(QUERY, DOCUMENTS, top_k=top_k)
    message(info, "top_k", top_k, "at least 1", "None")
    assert isinstance(info.value, ValueError)


@pytest.mark.parametrize(
    "top_k", [True, 1.5, "3", [1], np.array([3]), np.array([3, 4]), torch.tensor(1.5)], ids=repr
)
def test_a_top_k_that_is_no_whole_number_is_refused(reranker, top_k):
    with pytest.raises(SettingsError) as info:
        reranker.rerank(QUERY, DOCUMENTS, top_k=top_k)
    message(info, "top_k", "whole number", repr(top_k))


def test_a_bad_top_k_is_refused_even_where_there_is_nothing_to_rank(reranker):
    with pytest.raises(SettingsError):
        reranker.rerank(QUERY, [], top_k=0)
    with pytest.raises(SettingsError):
        reranker.rerank_many([], top_k=0)


@pytest.mark.parametrize("top_k", [5, 1000, np.int64(10)])
def test_a_top_k_above_the_number_of_documents_gives_all(reranker, top_k):
    assert reranker.rerank(QUERY, DOCUMENTS, top_k=top_k) == reranker.rerank(QUERY, DOCUMENTS)


@pytest.mark.parametrize("threshold", [-0.01, 1.01, -3, 50, math.nan, math.inf])
def test_a_threshold_outside_the_scores_is_refused(reranker, threshold):
    with pytest.raises(SettingsError) as info:
        reranker.rerank(QUERY, DOCUMENTS, score_threshold=threshold)
    message(info, "score_threshold", float(threshold), "from 0 to 1", "logit")


@pytest.mark.parametrize(
    "threshold",
    ["0.5", True, [0.5], np.array([0.5]), np.array([0.5, 0.6]), Decimal("sNaN"), 10**400],
    ids=lambda value: f"{value!r:.20}",
)
def test_a_threshold_that_is_no_number_is_refused(reranker, threshold):
    with pytest.raises(SettingsError) as info:
        reranker.rerank(QUERY, DOCUMENTS, score_threshold=threshold)
    message(info, "score_threshold", repr(threshold), "number")


def test_numbers_of_numpy_are_numbers(reranker, sound):
    results = reranker.rerank(QUERY, DOCUMENTS, top_k=2, score_threshold=0.25)
    limits = {"top_k": np.array(2), "score_threshold": np.float32(0.25)}
    for timeout_s in (np.int64(30), np.float32(30)):
        assert reranker.rerank(QUERY, DOCUMENTS, timeout_s=timeout_s, **limits) == results
    with load(sound, max_length=np.int64(256), pack_tokens=np.int32(4096)) as engine:
        plain = (engine.settings.max_length, engine.settings.pack_tokens)
    assert plain == (256, 4096)
    assert {type(number) for number in plain} == {int}


@pytest.mark.parametrize("timeout_s", [0, -1, math.nan, "2", True])
def test_a_timeout_that_is_no_time_is_refused(reranker, timeout_s):
    with pytest.raises(SettingsError) as info:
        reranker.rerank(QUERY, DOCUMENTS, timeout_s=timeout_s)
    message(info, "timeout_s", repr(timeout_s), "above 0")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("max_length", 0, "at least 1"),
        ("max_length", "512", "whole number"),
        ("query_max_length", -4, "at least 1"),
        ("pack_tokens", 0, "at least 1"),
        ("pack_tokens", "many", "whole number"),
        ("max_queued_pairs", 0, "at least 1"),
        ("local_files_only", "yes", "True or False"),
        ("model", "", "non-empty"),
        ("cache_dir", 3, "path"),
    ],
)
def test_a_setting_that_is_not_allowed_is_refused(name, value, allowed):
    with pytest.raises(SettingsError) as info:
        Reranker(**{"model": "tiny", name: value})
    message(info, name, repr(value), allowed)


def test_a_token_of_the_wrong_type_is_refused_without_being_shown():
    with pytest.raises(SettingsError) as info:
        Reranker("tiny", token=b"hf_secret")
    assert "secret" not in message(info, "token", "str", "bytes")


@pytest.mark.parametrize(
    "lengths",
    [
        {"max_length": 4},
        {"max_length": 32, "query_max_length": 28},
        {"max_length": 32, "query_max_length": 32},
        # More than the model has positions for, so that it comes down to 512.
        {"max_length": 1000, "query_max_length": 600},
    ],
    ids=str,
)
def test_lengths_that_leave_no_room_for_a_document_are_refused(sound, lengths):
    with pytest.raises(ValueError, match="no room for a document") as info:
        load(sound, **lengths)
    message(info, "max_length", "larger")


# Devices


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cpu:x", "tpu", "", "CUDA", None, 3])
def test_an_unknown_device_is_refused_with_those_there_are(device):
    with pytest.raises(SettingsError) as info:
        Reranker("tiny", device=device)
    message(info, "device", device, "auto", "cpu", "cuda")


def test_no_device_at_all_is_refused():
    with pytest.raises(SettingsError, match="at least one"):
        Reranker("tiny", device=[])


def test_a_torch_device_and_a_torch_dtype_are_taken_as_their_names(sound):
    with load(sound, device=torch.device("cpu"), dtype=torch.float32) as engine:
        assert (engine.device, engine.dtype) == ("cpu", "float32")


@pytest.mark.parametrize("device", ["cuda:99", "xpu:99", ["cpu", "cuda:99"]])
def test_an_absent_device_is_named_with_what_else_to_use(device):
    with pytest.raises(DeviceError) as info:
        Reranker("tiny", device=device)
    message(info, device if isinstance(device, str) else "cuda:99", "not available", '"cpu"')


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_is_refused_where_there_is_none():
    with pytest.raises(DeviceError) as info:
        Reranker("tiny", device="cuda")
    message(info, "'cuda'", "none found", '"auto"')


@pytest.mark.parametrize("dtype", ["float64", "half", "", None])
def test_an_unknown_dtype_is_refused_with_those_there_are(dtype):
    with pytest.raises(SettingsError) as info:
        Reranker("tiny", device="cpu", dtype=dtype)
    message(info, "dtype", dtype, "auto", "float32", "bfloat16", "float16")


# Folders


def test_a_folder_that_is_not_there_is_named(tmp_path):
    missing = tmp_path / "nowhere"
    with pytest.raises(CheckpointNotFoundError) as info:
        load(missing)
    message(info, missing, "does not exist", "config.json")
    assert isinstance(info.value, FileNotFoundError)


def test_a_file_in_place_of_a_folder_is_named(sound):
    with pytest.raises(CheckpointNotFoundError) as info:
        load(sound / WEIGHTS)
    message(info, sound / WEIGHTS, "a file, not a folder")


def test_a_folder_without_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError) as info:
        load(folder)
    message(info, folder, "no config.json", "give the folder")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x00"])
def test_a_config_that_is_no_json_object(folder, text):
    (folder / "config.json").write_text(text, "utf-8")
    with pytest.raises(CheckpointError) as info:
        load(folder)
    message(info, folder / "config.json", "JSON")


def test_a_config_that_is_not_utf_8(folder):
    (folder / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(CheckpointError) as info:
        load(folder)
    message(info, folder / "config.json")


def test_a_config_that_lacks_an_entry(folder):
    edit_config(folder, hidden_size=None)
    with pytest.raises(CheckpointError) as info:
        load(folder)
    message(info, folder / "config.json")


def test_an_unknown_activation(folder):
    edit_config(folder, hidden_act="mish")
    with pytest.raises(UnsupportedCheckpointError) as info:
        load(folder)
    message(info, "'mish'", "gelu")


def test_a_folder_without_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError) as info:
        load(folder)
    message(info, folder, "no tokenizer", "tokenizer.json", "Copy")


def test_a_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model"', "utf-8")
    with pytest.raises(CheckpointError) as info:
        load(folder)
    message(info, folder / "tokenizer.json", "not a readable tokenizer")


def test_a_tokenizer_that_knows_no_pairs(folder):
    path = folder / "tokenizer.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text("utf-8")), "post_processor": None}), "utf-8"
    )
    with pytest.raises(CheckpointError) as info:
        load(folder)
    message(info, path, "special tokens")


def test_a_tokenizer_larger_than_the_vocabulary_of_the_model(folder):
    edit_config(folder, vocab_size=VOCABULARY_SIZE - 1)
    edit_weights(folder, _shorten("roberta.embeddings.word_embeddings.weight", 1))
    with pytest.raises(CheckpointError) as info:
        load(folder)
    message(info, folder, VOCABULARY_SIZE - 1, "tokenizer", "not of one checkpoint")


def test_a_folder_without_weights(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError) as info:
        load(folder)
    message(info, folder, "no weights", WEIGHTS)


@pytest.mark.parametrize("left", [0, 4, 100, 100_000, -1])
def test_truncated_weights(folder, left):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(CheckpointError) as info:
        load(folder)
    message(info, path, "damaged or incomplete", "again")
    assert info.value.__cause__ is not None


def test_weights_that_are_pickled_are_never_read(folder, tmp_path):
    (folder / WEIGHTS).unlink()
    trap = tmp_path / "trapped"

    class Trap:
        def __reduce__(self):
            return Path.touch, (trap,)

    torch.save(Trap(), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as info:
        load(folder)
    message(info, folder, "pytorch_model.bin", "pickle", "convert", WEIGHTS)
    assert not trap.exists()


def test_a_shard_that_is_missing_is_named(folder):
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-2.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index), "utf-8")
    with pytest.raises(CheckpointError) as info:
        load(folder)
    message(info, folder, "model-2.safetensors")


@pytest.mark.parametrize("build", [build_xlm_roberta, build_bert])
def test_several_labels(build, tmp_path):
    build(tmp_path / "labels", labels=3)
    with pytest.raises(UnsupportedCheckpointError) as info:
        load(tmp_path / "labels")
    message(info, tmp_path / "labels", "3 labels", "one")


@pytest.mark.parametrize("model_type", ["t5", "gpt2", "minicpm3", "deberta-v2", None])
def test_a_model_of_another_kind_is_named_as_not_supported(folder, model_type):
    edit_config(folder, model_type=model_type, architectures=["OtherModel"])
    with pytest.raises(UnsupportedCheckpointError) as info:
        load(folder)
    message(info, folder, model_type, "OtherModel", "not supported", "xlm-roberta", "gemma")


def test_weights_that_give_nan_are_told_by_the_position_of_the_document(folder):
    with load(folder) as engine:
        reference = engine.logits(QUERY, DOCUMENTS)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        # Only the long document has as many tokens.
        tensors["roberta.embeddings.position_embeddings.weight"][2 + 200 :] = math.nan

    edit_weights(folder, spoil)
    with load(folder) as engine:
        with pytest.raises(NonFiniteLogitError) as info:
            engine.rerank(QUERY, [DOCUMENTS[0], "long enough to get there " * 100])
        message(info, "nan", "documents[1]", "weights")
        assert engine.logits(QUERY, DOCUMENTS[:1]) == pytest.approx(reference[:1], abs=1e-5)


def test_weights_that_are_all_nan_give_no_scores(folder):
    edit_weights(folder, lambda tensors: [each.fill_(math.nan) for each in tensors.values()])
    with load(folder) as engine, pytest.raises(NonFiniteLogitError, match="nan"):
        engine.score(QUERY, DOCUMENTS)


@pytest.mark.parametrize(
    "name",
    [
        "classifier.out_proj.weight",
        "classifier.dense.bias",
        "roberta.encoder.layer.2.attention.self.key.weight",
        "roberta.embeddings.LayerNorm.weight",
    ],
)
def test_a_missing_tensor_is_named(folder, name):
    edit_weights(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError) as info:
        load(folder)
    message(info, folder, name, "incomplete")


def _shorten(name: str, rows: int) -> Edit:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][:-rows].clone()

    return edit


@pytest.mark.parametrize(
    "name",
    [
        "roberta.embeddings.position_embeddings.weight",
        "roberta.encoder.layer.0.intermediate.dense.weight",
        "roberta.encoder.layer.1.output.LayerNorm.bias",
    ],
)
def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(folder, name):
    shape = tuple(load_file(folder / WEIGHTS)[name].shape)
    edit_weights(folder, _shorten(name, 1))
    with pytest.raises(CheckpointError) as info:
        load(folder)
    message(info, folder, name, shape, (shape[0] - 1, *shape[1:]), "config.json")


def test_offline_the_default_model_names_the_ways_out(tmp_path):
    with pytest.raises(CheckpointNotFoundError) as info:
        Reranker(
            device="cpu",
            cache_dir=str(tmp_path),
            local_files_only=True,
            token="hf_secret",  # noqa: S106 - to see that it is not shown
        )
    text = message(
        info,
        "BAAI/bge-reranker-v2-m3",
        "local_files_only",
        "local folder",
        "cache_dir",
        '"tiny"',
    )
    assert "\n" not in text
    assert "hf_secret" not in text
    assert info.value.cause is not None


def test_a_hub_that_cannot_be_reached_names_the_ways_out(monkeypatch, tmp_path):
    import huggingface_hub

    def unreachable(*_: object, **__: object) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointNotFoundError) as info:
        Reranker(device="cpu", cache_dir=str(tmp_path))
    text = message(info, "BAAI/bge-reranker-v2-m3", "no connection", "local folder", '"tiny"')
    assert "\n" not in text


@pytest.mark.parametrize("name", ["no spaces allowed", "-dash", "a..b"])
def test_a_name_that_no_hub_could_have_is_refused_offline(name, tmp_path):
    with pytest.raises(CheckpointNotFoundError) as info:
        Reranker(name, device="cpu", cache_dir=str(tmp_path))
    message(info, name, "neither a folder nor a valid", '"tiny"')


# Nothing is changed on the way


def test_what_the_caller_hands_over_is_left_as_it_was(reranker):
    documents = [*DOCUMENTS, "", DOCUMENTS[0], "\ud800", "long " * 5000]
    pairs = [[QUERY, document] for document in documents]
    requests = [(QUERY, documents), ("", [])]
    before = copy.deepcopy((documents, pairs, requests))
    results = reranker.rerank(QUERY, documents, top_k=2, score_threshold=0.1)
    reranker.score_pairs(pairs)
    reranker.rerank_many(requests, top_k=1)
    assert (documents, pairs, requests) == before
    # What comes back is the caller's own text, not a copy that went through the tokenizer.
    assert all(result.text is documents[result.index] for result in results)


def test_a_refused_call_leaves_the_engine_as_it_was(reranker):
    before = reranker.logits(QUERY, DOCUMENTS)
    for bad in ([None], [1], "text"):
        with pytest.raises(InputTypeError):
            reranker.rerank(QUERY, bad)
    assert reranker.logits(QUERY, DOCUMENTS) == before
