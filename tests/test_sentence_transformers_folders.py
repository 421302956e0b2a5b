"""Folders that sentence-transformers saves: scored as its own CrossEncoder does, or refused."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from bge_rerank_adapters import CheckpointError, Reranker, UnsupportedCheckpointError
from bge_rerank_adapters.engine.checkpoints.sentence_transformers import read_author_settings
from tests.checkpoints import build_bert, build_xlm_roberta, read_queries, read_sentences
from tests.texts import DOCUMENTS, QUERY

sentence_transformers = pytest.importorskip("sentence_transformers", minversion="6.2")

CPU = {"device": "cpu", "dtype": "float32"}
PARITY = 1e-4
PROMPT = "Find the passage that answers the question.\nQuestion: "
MODULES, CONFIG = "modules.json", "config_sentence_transformers.json"
TRANSFORMER = "sentence_bert_config.json"
PAIRS = [
    *((QUERY, document) for document in DOCUMENTS),
    *zip(list(read_queries().values())[:20], list(read_sentences().values())[:20], strict=True),
    ("", "No question."),
    ("No answer?", ""),
]


@pytest.fixture(scope="module", params=[build_xlm_roberta, build_bert])
def plain(request, tmp_path_factory) -> Path:
    return request.param(tmp_path_factory.mktemp("plain") / "checkpoint")


@pytest.fixture(scope="module")
def saved(plain, tmp_path_factory) -> Path:
    """The folder as sentence-transformers 6.2 writes it."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    load(plain, prompts={"ask": PROMPT, "other": "Other: "}).save_pretrained(str(folder))
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def load(folder: Path, **options: Any) -> Any:
    return sentence_transformers.CrossEncoder(str(folder), device="cpu", **options)


def edit(path: Path, **entries: object) -> None:
    found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps(found | entries), "utf-8")


def ours(folder: Path, pairs: Sequence[tuple[str, str]] = PAIRS, **settings: object) -> list[float]:
    with Reranker(str(folder), **(CPU | settings)) as engine:
        ranked = engine.rerank_many([(query, [document]) for query, document in pairs])
    return [result.logit for [result] in ranked]


def theirs(folder: Path, pairs: Sequence[tuple[str, str]] = PAIRS, **options: Any) -> list[float]:
    model = load(folder, **options)
    return model.predict(list(pairs), activation_fn=torch.nn.Identity()).tolist()


def refusal(folder: Path, *parts: str, **settings: object) -> None:
    with pytest.raises(CheckpointError) as info:
        Reranker(str(folder), **(CPU | settings)).close()
    for part in (str(folder), *parts):
        assert part in str(info.value)


def test_a_saved_folder_is_run_and_has_its_module_list(saved):
    assert [module["name"] for module in json.loads((saved / MODULES).read_text())] == ["0"]
    assert ours(saved) == pytest.approx(theirs(saved), abs=PARITY)


def test_a_default_prompt_stands_before_every_query(folder, plain):
    edit(folder / CONFIG, default_prompt_name="ask")
    scored = ours(folder)
    assert scored == pytest.approx(theirs(folder), abs=PARITY)
    assert scored != pytest.approx(ours(plain), abs=0.1)


def test_a_default_prompt_changes_the_order_of_documents(folder, plain):
    edit(folder / CONFIG, default_prompt_name="ask")
    with Reranker(str(folder), **CPU) as engine, Reranker(str(plain), **CPU) as bare:
        documents = list(read_sentences().values())[:20]
        order = [result.index for result in engine.rerank(QUERY, documents)]
        assert order != [result.index for result in bare.rerank(QUERY, documents)]
    ranked = load(folder).rank(QUERY, documents)
    assert order == [each["corpus_id"] for each in ranked]


@pytest.mark.parametrize("instruction", ["", "Query: "])
def test_an_instruction_of_the_user_stands_in_place_of_the_prompt(folder, instruction):
    edit(folder / CONFIG, default_prompt_name="ask")
    wanted = theirs(
        folder, [(instruction + query, text) for query, text in PAIRS], prompts={"ask": ""}
    )
    assert ours(folder, query_instruction=instruction) == pytest.approx(wanted, abs=PARITY)


def test_a_default_prompt_reaches_flagembedding(folder):
    pytest.importorskip("FlagEmbedding")
    edit(folder / CONFIG, default_prompt_name="ask")
    texts = [pair for pair in PAIRS if pair[1]]  # it reads pairs with an empty text otherwise
    flag = ours(folder, texts, backend="flagembedding")
    assert flag == pytest.approx(theirs(folder, texts), abs=PARITY)


@pytest.mark.parametrize("left_out", [MODULES, None])
def test_prompts_that_sentence_transformers_does_not_apply_are_not_applied(folder, plain, left_out):
    """Without a list of modules, and with one of another kind of model."""
    edit(folder / CONFIG, default_prompt_name="ask")
    if left_out:
        (folder / left_out).unlink()
    else:
        edit(folder / CONFIG, model_type="SentenceTransformer")
    assert theirs(folder) == pytest.approx(theirs(plain), abs=PARITY)
    assert ours(folder) == pytest.approx(theirs(folder), abs=PARITY)


def test_lower_case_is_applied(folder):
    edit(folder / TRANSFORMER, do_lower_case=True)
    pairs = [(query.upper(), text.title()) for query, text in PAIRS]
    assert ours(folder, pairs) == pytest.approx(theirs(folder, pairs), abs=PARITY)
    refusal(folder, "do_lower_case", 'backend="native"', backend="flagembedding")


def test_lower_case_changes_scores_where_the_tokenizer_keeps_it(tmp_path):
    source = build_xlm_roberta(tmp_path / "source")
    load(source).save_pretrained(str(tmp_path / "saved"))
    pairs = [(query.upper(), text.upper()) for query, text in PAIRS]
    before = ours(tmp_path / "saved", pairs)
    edit(tmp_path / "saved" / TRANSFORMER, do_lower_case=True)
    assert ours(tmp_path / "saved", pairs) != pytest.approx(before, abs=0.1)


@pytest.mark.parametrize(
    "entries",
    [
        {"max_seq_length": 48},
        {"processor_kwargs": {"model_max_length": 48}, "max_seq_length": 64},
        {"tokenizer_args": {"model_max_length": 48}},
        {"processing_kwargs": {"text": {"max_length": 48}}},
    ],
    ids=lambda entries: "+".join(entries),
)
def test_the_authors_length_is_kept(folder, entries):
    edit(folder / TRANSFORMER, **entries)
    # Theirs cuts the longer text first, which is the document where the query is short.
    long = [("Who met?", " ".join([*DOCUMENTS, *DOCUMENTS]))]
    assert ours(folder, long) == pytest.approx(theirs(folder, long), abs=PARITY)
    with Reranker(str(folder), **CPU) as engine:
        assert engine.rerank(*long[0][:1], [long[0][1]])[0].truncated


@pytest.mark.parametrize("path", [TRANSFORMER, "config.json"])
def test_what_changes_no_score_is_let_in(folder, saved, path):
    if path == TRANSFORMER:
        edit(folder / path, unpad_inputs=False, model_kwargs={"torch_dtype": "float32"})
    else:
        edit(folder / path, sentence_transformers={"activation_fn": "torch.nn.Identity"})
    edit(folder / CONFIG, keep_in_fp32_modules=[], activation_fn="torch.nn.modules.activation.Tanh")
    assert ours(folder) == ours(saved)


# What is not applied is refused by name

POOLING = {"idx": 1, "name": "1", "path": "1_Pooling"}


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["sentence_transformers.models.Pooling"], "Transformer, Pooling"),
        (
            ["sentence_transformers.models.Pooling", "sentence_transformers.models.Dense"],
            "Transformer, Pooling, Dense",
        ),
        (["sentence_transformers.cross_encoder.modules.LogitScore"], "Transformer, LogitScore"),
        (["my_code.Extra"], "Transformer, Extra"),
    ],
)
@pytest.mark.parametrize("kind", ["CrossEncoder", "SentenceTransformer"])
def test_more_modules_are_refused_by_name(folder, more, named, kind):
    modules = json.loads((folder / MODULES).read_text("utf-8"))
    modules += [POOLING | {"type": each} for each in more]
    (folder / MODULES).write_text(json.dumps(modules), "utf-8")
    edit(folder / CONFIG, model_type=kind)
    refusal(folder, MODULES, f"lists the modules {named}")
    refusal(folder, f"lists the modules {named}", backend="flagembedding")


def test_code_of_the_checkpoints_in_place_of_the_transformer_is_refused(folder):
    modules = json.loads((folder / MODULES).read_text("utf-8"))
    modules[0]["type"] = "my_code.Transformer"
    (folder / MODULES).write_text(json.dumps(modules), "utf-8")
    refusal(folder, MODULES)


def test_a_model_in_a_subfolder_is_refused_by_its_place(folder):
    modules = json.loads((folder / MODULES).read_text("utf-8"))
    modules[0]["path"] = "0_Transformer"
    (folder / MODULES).write_text(json.dumps(modules), "utf-8")
    refusal(folder, "0_Transformer")


@pytest.mark.parametrize(
    "entries",
    [
        {"transformer_task": "text-generation"},
        {"transformer_task": "feature-extraction"},
        {"modality_config": {"text": {"method": "forward", "method_output_name": "x"}}},
        {
            "modality_config": {
                "text": {"method": "forward", "method_output_name": "logits"},
                "message": {"method": "forward", "method_output_name": "logits"},
            }
        },
        {"module_output_name": "token_embeddings"},
        {"processing_kwargs": {"text": {"add_special_tokens": False}}},
        {"processing_kwargs": {"common": {"add_special_tokens": False}}},
        {"tokenizer_name_or_path": "another/one"},
        {"model_kwargs": {"num_labels": 2}},
        {"config_kwargs": {"num_hidden_layers": 1}},
        {"processor_kwargs": {"padding_side": "left"}},
        {"tokenizer_args": {"do_lower_case": True}},
        {"something_new": 3},
    ],
    ids=lambda entries: json.dumps(entries)[:40],
)
def test_what_changes_scores_and_is_not_applied_is_refused_by_name(folder, entries):
    edit(folder / TRANSFORMER, **entries)
    [name] = entries
    refusal(folder, TRANSFORMER, name, "CrossEncoder")


@pytest.mark.parametrize("place", [CONFIG, "config.json", "sbert_ce_default_activation_function"])
@pytest.mark.parametrize("name", ["torch.nn.ReLU", "torch.nn.modules.activation.Softmax"])
def test_an_activation_that_changes_the_order_is_refused(folder, place, name):
    if place == CONFIG:
        edit(folder / CONFIG, activation_fn=name)
    elif place == "config.json":
        edit(folder / place, sentence_transformers={"activation_fn": name})
    else:
        edit(folder / "config.json", **{place: name})
    refusal(folder, f"the activation {name}")


def test_a_default_prompt_that_is_not_there_is_named(folder):
    edit(folder / CONFIG, default_prompt_name="gone")
    refusal(folder, "default_prompt_name 'gone'", "ask, other")


@pytest.mark.parametrize("name", [MODULES, CONFIG, TRANSFORMER])
@pytest.mark.parametrize("text", ["{", "3", "[[["])
def test_a_damaged_file_is_named(folder, name, text):
    (folder / name).write_text(text, "utf-8")
    refusal(folder, name)


def test_a_saved_folder_without_a_list_of_modules_keeps_its_length(plain, tmp_path):
    """As releases 4 and 5 write it."""
    folder = Path(shutil.copytree(plain, tmp_path / "checkpoint"))
    edit(folder / "config.json", sentence_transformers={"version": "5.1.0"})
    edit(folder / "tokenizer_config.json", model_max_length=40)
    long = [("Who met?", " ".join([*DOCUMENTS, *DOCUMENTS]))]
    assert ours(folder, long) == pytest.approx(theirs(folder, long), abs=PARITY)


def test_the_refusals_are_of_the_kind_that_says_unsupported(folder):
    edit(folder / TRANSFORMER, something_new=3)
    with pytest.raises(UnsupportedCheckpointError):
        Reranker(str(folder), **CPU)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 600) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=4,
)
ENTRIES = [
    *((CONFIG, key) for key in ("model_type", "prompts", "default_prompt_name", "activation_fn")),
    *((TRANSFORMER, key) for key in ("transformer_task", "modality_config", "max_seq_length")),
    *((TRANSFORMER, key) for key in ("processing_kwargs", "do_lower_case", "processor_kwargs")),
    *((TRANSFORMER, key) for key in ("tokenizer_args", "model_args", "new", "unpad_inputs")),
    ("tokenizer_config.json", "model_max_length"),
    ("config.json", "sentence_transformers"),
]


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(place=st.sampled_from(ENTRIES), value=json_values)
def test_any_value_is_refused_by_its_file_or_gives_settings(place, value):
    name, key = place
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / MODULES).write_text(
            '[{"type": "sentence_transformers.models.Transformer", "path": ""}]', "utf-8"
        )
        edit(path / CONFIG, model_type="CrossEncoder")
        edit(path / TRANSFORMER, transformer_task="sequence-classification")
        edit(path / name, **{key: value})
        config = {key: value} if name == "config.json" else {}
        try:
            found = read_author_settings(path, config)
        except CheckpointError as error:
            assert name in str(error)  # noqa: PT017
        else:
            assert isinstance(found.query_prompt, str)
            assert found.max_tokens is None or found.max_tokens > 0
