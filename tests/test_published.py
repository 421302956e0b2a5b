"""Published scores: the table, how it is compared, and the real weights where they are at hand."""

from dataclasses import replace

import pytest

from bge_rerank_adapters import CheckpointNotFoundError, Reranker
from bge_rerank_adapters.cli.verification import LOGIT_TOLERANCE, compare, published_for
from bge_rerank_adapters.engine.checkpoints.published import PUBLISHED_SCORES, PublishedScores
from bge_rerank_adapters.settings import DTYPES
from bge_rerank_adapters.settings.checkpoints import CHECKPOINTS
from tests.texts import DOCUMENTS, QUERY


def label(entry: PublishedScores) -> str:
    return f"{entry.model.partition('/')[2]}-{entry.source.partition(',')[0]}-{len(entry.pairs)}"


@pytest.mark.parametrize("entry", PUBLISHED_SCORES, ids=label)
def test_the_real_model_gives_the_published_figures(entry):
    try:
        reranker = Reranker(entry.model, device="cpu", dtype="float32", local_files_only=True)
    except CheckpointNotFoundError as error:
        pytest.skip(f"the weights are absent: {error}")
    with reranker:
        compared = compare(reranker, [entry])
    assert len(compared) == len(entry.expected)
    assert [each for each in compared if not each.passed] == []


def test_the_figures_of_the_1956_question_are_in_the_table():
    [entry] = [each for each in PUBLISHED_SCORES if each.pairs[0][0] == QUERY]
    assert entry.model == "BAAI/bge-reranker-v2-m3"
    assert (entry.kind, entry.expected) == ("score", {1: 0.991162, 0: 0.032697, 3: 0.006515})
    assert "Dartmouth Conference in 1956" in entry.pairs[1][1]
    assert [document for _, document in entry.pairs] == DOCUMENTS
    assert len(DOCUMENTS) == 4


@pytest.mark.parametrize("entry", PUBLISHED_SCORES, ids=label)
def test_entries_are_whole(entry):
    assert CHECKPOINTS[entry.model].family == "encoder"
    assert entry.source
    assert entry.kind in ("score", "logit")
    assert 0 < entry.tolerance < 0.1
    assert set(entry.expected) <= set(range(len(entry.pairs)))
    assert all(0 < figure < 1 for figure in entry.expected.values() if entry.kind == "score")


def test_every_encoder_of_the_table_of_checkpoints_is_covered():
    encoders = {name for name, each in CHECKPOINTS.items() if each.family == "encoder"}
    assert {entry.model for entry in PUBLISHED_SCORES} == encoders


@pytest.mark.parametrize("kind", ["score", "logit"])
def test_a_comparison_passes_within_the_tolerance_and_fails_beyond(reranker, kind):
    figures = (reranker.score if kind == "score" else reranker.logits)(QUERY, DOCUMENTS)
    pairs = tuple((QUERY, document) for document in DOCUMENTS)
    entry = PublishedScores("tiny", "here", kind, 0.001, pairs, {2: figures[2], 0: figures[0]})
    same = compare(reranker, [entry])
    assert [(each.document, each.passed) for each in same] == [
        (DOCUMENTS[2], True),
        (DOCUMENTS[0], True),
    ]
    for shift, passed in ((0.0009, True), (0.0011, False), (-0.0011, False)):
        shifted = replace(entry, expected={2: figures[2] + shift})
        assert [each.passed for each in compare(reranker, [shifted])] == [passed]


@pytest.mark.parametrize(("kind", "share"), [("score", 0.25), ("logit", 1.0)])
def test_half_precision_is_allowed_its_rounding(kind, share):
    pairs = ((QUERY, DOCUMENTS[0]),)
    with Reranker("tiny", device="cpu", dtype="bfloat16") as half:
        got = (half.score if kind == "score" else half.logits)(*pairs[0][:1], [pairs[0][1]])[0]
        limit = 0.001 + share * LOGIT_TOLERANCE["bfloat16"]
        for shift, passed in ((0.99 * limit, True), (1.01 * limit, False)):
            entry = PublishedScores("tiny", "here", kind, 0.001, pairs, {0: got + shift})
            assert [each.passed for each in compare(half, [entry])] == [passed]


def test_every_dtype_has_a_tolerance():
    assert {*LOGIT_TOLERANCE, "auto"} == set(DTYPES)


def test_a_folder_is_known_by_its_name():
    entries = published_for("BAAI/bge-reranker-large")
    assert len(entries) == 2
    assert published_for("/models/bge-reranker-large") == entries
    assert published_for("tiny") == published_for("large") == []
