"""A head that is missing is never made up at random, whatever class would load the model."""

import json
import shutil
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file, save_file

from bge_rerank_adapters import CheckpointError, Reranker
from tests.checkpoints import VOCABULARY_SIZE, build_bert, build_xlm_roberta
from tests.family_checkpoints import build_family
from tests.texts import DOCUMENTS, QUERY

pytest.importorskip("FlagEmbedding")

FLAG = {"backend": "flagembedding", "device": "cpu", "dtype": "float32"}
WEIGHTS = "model.safetensors"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def refusal(folder: Path, *parts: str, **settings: object) -> None:
    with pytest.raises(CheckpointError) as info:
        Reranker(str(folder), **(FLAG | settings)).close()
    for part in (str(folder), *parts):
        assert part in str(info.value)


def drop(folder: Path, start: str) -> Path:
    tensors = {k: v for k, v in load_file(folder / WEIGHTS).items() if not k.startswith(start)}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def build_electra(folder: Path) -> Path:
    build_bert(folder)
    config = transformers.ElectraConfig(
        vocab_size=VOCABULARY_SIZE, embedding_size=32, intermediate_size=64, num_labels=1, **SIZES
    )
    transformers.ElectraForSequenceClassification(config).save_pretrained(folder)
    return folder


def build_llama(folder: Path) -> Path:
    """Write a language model of another kind than the bundled families, head included."""
    build_family(folder, "decoder")
    config = transformers.LlamaConfig(
        vocab_size=1000, intermediate_size=64, tie_word_embeddings=False, **SIZES
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("build", "head"),
    [
        (build_electra, "classifier.dense"),
        (build_electra, "classifier.out_proj"),
        (build_bert, "bert.pooler"),
        (build_xlm_roberta, "classifier.dense"),
    ],
    ids=lambda each: getattr(each, "__name__", each),
)
def test_a_classifier_without_its_head_is_refused(tmp_path, build, head):
    folder = build(tmp_path / "checkpoint")
    with Reranker(str(folder), **FLAG) as engine:
        assert len(engine.logits(QUERY, DOCUMENTS)) == len(DOCUMENTS)
    drop(folder, head)
    refusal(folder, head, "fine-tuned as a reranker")


def test_any_missing_weight_is_refused_not_only_a_head(tmp_path):
    folder = build_electra(tmp_path / "checkpoint")
    refusal(drop(folder, "electra.encoder.layer.1.output"), "layer.1.output", "random")


def test_a_language_model_without_its_family_is_refused_and_told_of_it(tmp_path):
    """As an encoder it would get a random classifier."""
    folder = build_llama(tmp_path / "checkpoint")
    refusal(folder, "score.weight", 'family="decoder"')
    with Reranker(str(folder), family="decoder", **FLAG) as engine:
        assert len(engine.logits(QUERY, DOCUMENTS)) == len(DOCUMENTS)


def test_a_language_model_without_its_head_is_refused(tmp_path):
    folder = drop(build_llama(tmp_path / "checkpoint"), "lm_head")
    refusal(folder, "lm_head.weight", family="decoder")


def test_a_tied_head_is_not_missing(tmp_path):
    folder = build_family(tmp_path / "checkpoint", "decoder")
    assert "lm_head.weight" not in load_file(folder / WEIGHTS)
    with Reranker(str(folder), **FLAG) as engine:
        assert len(engine.logits(QUERY, DOCUMENTS)) == len(DOCUMENTS)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_prefix_that_flagembedding_does_not_read_is_named(tmp_path, prefix):
    folder = build_xlm_roberta(tmp_path / "checkpoint")
    tensors = {prefix + k: v for k, v in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    refusal(folder, repr(prefix), 'backend="native"')


# Unsupported kinds are told what runs them


def test_a_kind_that_flagembedding_runs_is_told_so(tmp_path):
    folder = build_electra(tmp_path / "checkpoint")
    refusal(folder, 'backend="flagembedding" runs it', "[flagembedding]", backend="native")


def change_config(folder: Path, **entries: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | entries), "utf-8")
    return folder


def test_a_language_model_is_told_of_the_decoder_family(tmp_path):
    folder = build_family(tmp_path / "checkpoint", "decoder")
    change_config(folder, model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"])
    refusal(folder, 'backend="flagembedding" with family="decoder"', backend="native")


def test_a_model_of_another_family_than_is_asked_for_is_told_so(tmp_path):
    folder = build_family(tmp_path / "checkpoint", "decoder")
    refusal(folder, "of the decoder family: leave family= out", family="encoder", backend="native")


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [("electra", "ElectraModel"), ("whisper", "WhisperForX"), ("new", "NewForCausalLM")],
)
def test_a_model_that_nothing_runs_is_told_so(tmp_path, kind, architecture):
    folder = build_bert(tmp_path / "checkpoint")
    change_config(folder, model_type=kind, architectures=[architecture])
    refusal(folder, "fine-tuned as a reranker", backend="native")
    with pytest.raises(CheckpointError) as info:
        Reranker(str(folder), device="cpu")
    assert "flagembedding" not in str(info.value)


# Tokenizers with tokens that the model has no embedding for


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return build_xlm_roberta(tmp_path_factory.mktemp("plain") / "checkpoint")


@pytest.fixture
def added(plain, tmp_path) -> Path:
    """A copy whose tokenizer knows one token more than the model."""
    folder = Path(shutil.copytree(plain, tmp_path / "checkpoint"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["<added>"])
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_added_tokens_that_no_text_has_do_no_harm(plain, added):
    with Reranker(str(plain), device="cpu") as engine, Reranker(str(added), device="cpu") as more:
        assert more.logits(QUERY, DOCUMENTS) == engine.logits(QUERY, DOCUMENTS)


@pytest.mark.parametrize("settings", [{}, {"long_documents": "window"}], ids=str)
@pytest.mark.parametrize(
    ("query", "documents"),
    [("What <added>?", DOCUMENTS), (QUERY, [*DOCUMENTS, "An <added> one."])],
    ids=["query", "document"],
)
def test_a_text_with_such_a_token_is_refused_by_it(added, query, documents, settings):
    from bge_rerank_adapters import ScoringError

    with Reranker(str(added), device="cpu", **settings) as engine:
        with pytest.raises(ScoringError, match=rf"'<added>' of id {VOCABULARY_SIZE}.*embeddings"):
            engine.logits(query, documents)
        assert len(engine.logits(QUERY, DOCUMENTS)) == len(DOCUMENTS)


def test_a_vocabulary_that_the_model_does_not_know_is_refused_at_once(plain, tmp_path):
    folder = Path(shutil.copytree(plain, tmp_path / "checkpoint"))
    change_config(folder, vocab_size=VOCABULARY_SIZE - 5)
    tensors = load_file(folder / WEIGHTS)
    name = "roberta.embeddings.word_embeddings.weight"
    tensors[name] = tensors[name][:-5].clone()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    refusal(folder, "not of one checkpoint", backend="native")
