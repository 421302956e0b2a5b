"""The engine's numbers against FlagEmbedding's and plain transformers', on the same weights."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bge_rerank_adapters import Reranker
from bge_rerank_adapters.calls.ranking import sigmoid
from bge_rerank_adapters.engine.text.tokenizer_files import load_tokenizer
from tests.checkpoints import (
    CHECKPOINTS,
    build_xlm_roberta,
    difficult_pairs,
    read_answers,
    read_queries,
    read_sentences,
)

Pair = tuple[str, str]

REFERENCE = Path(__file__).parent / "reference"
PARITY = 1e-4
COMPANY = 1e-5
PACKS = (
    pytest.param(64, "reversed", id="64-reversed"),
    pytest.param(64, "shuffled", id="64-shuffled"),
    pytest.param(512, "as-is", id="512-as-is"),
    pytest.param(512, "shuffled", id="512-shuffled"),
    pytest.param(4096, "reversed", id="4096-reversed"),
    pytest.param(4096, "shuffled", id="4096-shuffled"),
    pytest.param("auto", "as-is", id="auto-as-is"),
    pytest.param("auto", "shuffled", id="auto-shuffled"),
)


def real_pairs() -> list[Pair]:
    """Each question with the sentence that answers it and three others: 1,040 distinct pairs."""
    sentences, answers = read_sentences(), read_answers()
    texts = list(sentences.values())
    pairs = []
    for number, (identity, query) in enumerate(read_queries().items()):
        others = (texts[(number * 7 + step) % len(texts)] for step in (0, 211, 409))
        pairs += [(query, document) for document in (sentences[answers[identity]], *others)]
    return list(dict.fromkeys(pairs))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small run slower on several threads, and far slower beside other programs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def pairs() -> list[Pair]:
    return real_pairs()


@pytest.fixture(scope="session", params=CHECKPOINTS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def folder(name, tmp_path_factory) -> Path:
    build, _ = CHECKPOINTS[name]
    return build(tmp_path_factory.mktemp(name))


@pytest.fixture(scope="session")
def reranker(folder):
    with open_reranker(folder) as engine:
        yield engine


@pytest.fixture(scope="session")
def plain_logits(folder, pairs) -> list[float]:
    return transformers_logits(folder, pairs)


@pytest.fixture(scope="session")
def flag_reranker(folder):
    return open_flag_reranker(folder)


@pytest.fixture(scope="session")
def flag_logits(flag_reranker, pairs) -> list[float]:
    return flag_reranker.compute_score(pairs, max_length=512)


def open_reranker(folder: Path, **settings) -> Reranker:
    return Reranker(str(folder), device="cpu", dtype="float32", **settings)


def open_flag_reranker(folder: Path):
    flag_embedding = pytest.importorskip("FlagEmbedding")
    reference = flag_embedding.FlagReranker(str(folder), use_fp16=False, devices="cpu")
    assert reference.model.dtype == torch.float32
    return reference


def transformers_logits(folder: Path, pairs: list[Pair], *, batch: int = 8) -> list[float]:
    """Score pairs with transformers alone, a few at a time, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).float().eval()
    logits: list[float] = []
    for start in range(0, len(pairs), batch):
        queries, documents = zip(*pairs[start : start + batch], strict=True)
        inputs = tokenizer(list(queries), list(documents), padding=True, return_tensors="pt")
        with torch.no_grad():
            logits += model(**inputs).logits.view(-1).tolist()
    return logits


def pair_logits(reranker: Reranker, pairs: list[Pair]) -> list[float]:
    """The logits behind `score_pairs`, which puts pairs of many queries into one pack."""
    return [math.log(score) - math.log1p(-score) for score in reranker.score_pairs(pairs)]


def in_order(number: int, order: str) -> list[int]:
    positions = list(range(number))
    if order == "shuffled":
        random.Random(0).shuffle(positions)
    return positions[::-1] if order == "reversed" else positions


def worst(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def read_reference(name: str) -> list[tuple[str, str, int, list[int], float]]:
    """Each difficult pair with FlagEmbedding's token ids and logit on transformers 4."""
    cases = json.loads((REFERENCE / f"{name}.json").read_text(encoding="utf-8"))["cases"]
    pairs = difficult_pairs(max_tokens=CHECKPOINTS[name][1])
    return [
        (query, document, max_length, case["ids"], case["logit"])
        for (query, document, max_length), case in zip(pairs, cases, strict=True)
        if max_length == case["max_length"] or pytest.fail("make the reference again")
    ]


def by_max_length(cases: list) -> dict[int, list]:
    return {length: [case for case in cases if case[2] == length] for _, _, length, *_ in cases}


# What is compared


def test_pairs_are_many_whole_and_known(folder, pairs):
    """The comparison with FlagEmbedding on transformers 5 is fair on such pairs alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer([query for query, _ in pairs], [document for _, document in pairs])["input_ids"]
    assert len(set(pairs)) >= 1000
    assert max(map(len, ids)) <= 512
    assert not any(tokenizer.unk_token_id in row for row in ids)


def test_logits_differ_enough_to_compare(plain_logits):
    """At the usual initialisation all logits are nearly equal, and any two engines agree."""
    for start in range(0, 1000, 4):
        of_one_query = plain_logits[start : start + 4]
        assert max(of_one_query) - min(of_one_query) > 100 * PARITY
    assert torch.tensor(plain_logits).std() > 0.5


# Real pairs


@pytest.mark.parametrize(("pack_tokens", "order"), PACKS)
def test_pairs_in_any_pack_and_order_equal_both_references(
    folder, pairs, plain_logits, flag_logits, pack_tokens, order
):
    positions = in_order(len(pairs), order)
    with open_reranker(folder, pack_tokens=pack_tokens) as reranker:
        ours = pair_logits(reranker, [pairs[position] for position in positions])
    assert worst(ours, [flag_logits[position] for position in positions]) <= PARITY
    assert worst(ours, [plain_logits[position] for position in positions]) <= PARITY


def test_logits_of_one_query_equal_flagembedding(reranker, flag_reranker, pairs):
    query = pairs[0][0]
    documents = [document for _, document in pairs[:200]]
    theirs = flag_reranker.compute_score([(query, each) for each in documents], max_length=512)
    ours = reranker.logits(query, documents)
    assert worst(ours, theirs) <= PARITY
    assert reranker.score(query, documents) == pytest.approx(
        [sigmoid(logit) for logit in theirs], abs=PARITY / 4
    )
    ranking = [result.index for result in reranker.rerank(query, documents)]
    assert ranking == sorted(range(len(documents)), key=lambda index: -ours[index])


def test_float16_weights_run_in_float32(tmp_path, pairs):
    """transformers 5 loads weights in the dtype of the file unless told otherwise."""
    folder = build_xlm_roberta(tmp_path, dtype=torch.float16)
    with open_reranker(folder) as reranker:
        ours = pair_logits(reranker, pairs[:100])
    assert worst(ours, transformers_logits(folder, pairs[:100])) <= PARITY


# Company


def test_company_moves_no_logit(reranker, pairs):
    query = pairs[0][0]
    documents = [document for _, document in pairs[:80]]
    alone = [reranker.logits(query, [document])[0] for document in documents]
    others = [pair for pair in pairs if pair[0] != query]
    mixed = [(query, document) for document in documents] + others[:400]
    random.Random(1).shuffle(mixed)
    crowd = dict(zip(mixed, pair_logits(reranker, mixed), strict=True))
    assert worst(reranker.logits(query, documents), alone) <= COMPANY
    assert worst(reranker.logits(query, documents[::-1])[::-1], alone) <= COMPANY
    assert worst([crowd[query, document] for document in documents], alone) <= COMPANY


def test_short_pair_beside_long_ones(reranker):
    """Padding, or a neighbour's tokens, would show most in a short pair next to long ones."""
    query, *_ = read_queries().values()
    sentences = list(read_sentences().values())
    documents = ["Yes.", *(" ".join(sentences[i : i + 9]) for i in range(0, 63, 9)), "", "No."]
    alone = [reranker.logits(query, [document])[0] for document in documents]
    assert worst(reranker.logits(query, documents), alone) <= COMPANY


@pytest.mark.parametrize("pack_tokens", [64, 4096])
def test_identical_documents_tie_exactly(folder, pairs, pack_tokens):
    query = pairs[0][0]
    distinct = [document for _, document in pairs[:30]]
    documents = distinct + distinct[::-1] + distinct[10:20]
    with open_reranker(folder, pack_tokens=pack_tokens) as reranker:
        logits = reranker.logits(query, documents)
        results = reranker.rerank(query, documents)
    first = dict(zip(reversed(documents), reversed(logits), strict=True))
    assert logits == [first[document] for document in documents]
    ties = [(result.text, result.index) for result in results]
    assert [index for text, index in ties if text == distinct[12]] == [12, 47, 62]


# Cut pairs and unknown characters, where FlagEmbedding on transformers 5 leaves the rule


def test_difficult_pairs_have_the_rules_token_ids(name, folder):
    for query, document, max_length, ids, _ in read_reference(name):
        tokenizer = load_tokenizer(folder, max_length=max_length)
        [ours] = tokenizer.tokenize([(query, document)]).distinct
        assert ours.ids.tolist() == ids, (query[:40], document[:40], max_length)


def test_difficult_pairs_have_the_rules_logits(name, folder):
    for max_length, cases in by_max_length(read_reference(name)).items():
        with open_reranker(folder, max_length=max_length) as reranker:
            ours = pair_logits(reranker, [(query, document) for query, document, *_ in cases])
        assert worst(ours, [logit for *_, logit in cases]) <= PARITY, max_length


def test_cut_documents_are_marked(name, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    marks = set()
    for max_length, cases in by_max_length(read_reference(name)).items():
        with open_reranker(folder, max_length=max_length) as reranker:
            for query, document, _, ids, _ in cases:
                [result] = reranker.rerank(query, [document])
                kept = len(tokenizer.tokenize(query)[: max_length * 3 // 4])
                whole = len(tokenizer(query, document)["input_ids"])
                tokens = whole - len(tokenizer.tokenize(query)) + kept
                assert result.truncated is (tokens > len(ids))
                marks.add(result.truncated)
    assert marks == {True, False}


@pytest.mark.skipif(transformers.__version__ < "5", reason="FlagEmbedding keeps the rule there")
@pytest.mark.parametrize("unknown", [True, False], ids=["unknown-character", "cut"])
def test_flagembedding_leaves_the_rule_on_transformers_5(tmp_path, unknown):
    """It turns ids into text and tokenises that: an unknown piece, or one cut in two, changes.

    Shown is the pair that it moves farthest, which ours scores as transformers 4 had it.
    """
    name = "xlm-roberta-8194"
    folder = CHECKPOINTS[name][0](tmp_path)
    flag_reranker = open_flag_reranker(folder)
    unknown_id = AutoTokenizer.from_pretrained(folder).unk_token_id
    cases = [case for case in read_reference(name) if (unknown_id in case[3]) is unknown]
    theirs = [flag_score(flag_reranker, case) for case in cases]
    (query, document, max_length, _, logit), moved = max(
        zip(cases, theirs, strict=True), key=lambda both: abs(both[0][-1] - both[1])
    )
    with open_reranker(folder, max_length=max_length) as reranker:
        [ours] = reranker.logits(query, [document])
    assert abs(moved - logit) > 0.1
    assert abs(ours - logit) <= PARITY


def flag_score(flag_reranker, case) -> float:
    query, document, max_length, *_ = case
    [logit] = flag_reranker.compute_score([(query, document)], max_length=max_length)
    return logit
