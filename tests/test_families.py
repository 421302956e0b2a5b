"""The decoder families' numbers against FlagEmbedding's, recorded where it can run them."""

import json
import random
from pathlib import Path

import pytest
import torch

from bge_rerank_adapters import Reranker
from tests.family_checkpoints import CASES, build_family, case_pairs

REFERENCE = json.loads((Path(__file__).parent / "reference" / "families.json").read_text("utf-8"))
PARITY = 1e-4
COMPANY = 1e-5


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small run slower on several threads, and far slower beside other programs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each case's checkpoint, built when it is first asked for."""
    built: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in built:
            case = CASES[name]
            built[name] = build_family(tmp_path_factory.mktemp(name), case.family, **case.build)
        return built[name]

    return folder


def open_case(folders, name: str, **settings) -> Reranker:
    case = CASES[name]
    folder = folders(name)
    if name == "decoder-bos-is-pad":
        path = folder / "tokenizer_config.json"
        path.write_text(path.read_text("utf-8").replace('"<bos>"', '"<pad>"'), encoding="utf-8")
    return Reranker(str(folder), device="cpu", dtype="float32", **(case.settings | settings))


def pair_logits(reranker: Reranker, pairs: list[tuple[str, str]]) -> list[float]:
    """Score pairs of many queries in common packs."""
    ranked = reranker.rerank_many([(query, [document]) for query, document in pairs])
    return [result.logit for [result] in ranked]


def worst(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def test_the_cases_scores_differ_enough_to_compare():
    for name in CASES:
        scores = REFERENCE["cases"][name]
        assert max(scores) - min(scores) > 500 * PARITY, name


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_flagembedding_alone_and_in_company(folders, name):
    wanted = REFERENCE["cases"][name]
    pairs = case_pairs()
    with open_case(folders, name) as reranker:
        alone = [reranker.logits(query, [document])[0] for query, document in pairs]
        assert worst(alone, wanted) <= PARITY
        order = list(range(len(pairs)))
        random.Random(0).shuffle(order)
        together = pair_logits(reranker, [pairs[place] for place in order])
    assert worst(together, [alone[place] for place in order]) <= COMPANY
