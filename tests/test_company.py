"""What the pairs of a pack do to each other's logits: each cell of the table in the docs."""

import re
from pathlib import Path

import pytest
import torch

from bge_rerank_adapters import Reranker
from bge_rerank_adapters.engine.models.cpu.onednn import kit as onednn_kit
from bge_rerank_adapters.engine.models.encoder import kit as kits
from bge_rerank_adapters.engine.models.encoder.plain import KitRequest
from tests.checkpoints import read_sentences

PAGE = Path(__file__).parent.parent / "docs" / "reproducibility.md"
ROW = re.compile(r"\| CPU \| (?P<layers>[^|]+) \| `(?P<dtype>\w+)` \| (?P<limit>[\d.e-]+) \|")
ROWS = [found.groupdict() for found in ROW.finditer(PAGE.read_text("utf-8"))]
SENTENCES = list(read_sentences().values())
QUERIES = ["What is this about?", "Who wrote Faust?", SENTENCES[0]]


def documents() -> list[str]:
    """Return 24 documents of lengths from one sentence to six."""
    return [" ".join(SENTENCES[i : i + 1 + i % 6]) for i in range(24)]


def test_the_table_has_a_row_for_each_kind_of_layers():
    assert {row["layers"] for row in ROWS} == {kit.label for kit in kits.KITS}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['layers']}, {row['dtype']}")
def test_company_moves_a_logit_no_further_than_the_table_says(monkeypatch, row):
    # Whether 8 bits pay at a model's sizes is timed, and so differs from run to run.
    monkeypatch.setattr(onednn_kit, "int8_pays", lambda *_: True)
    kit = next(each for each in kits.KITS if each.label == row["layers"])
    compute = torch.bfloat16 if row["dtype"] == "int8" else getattr(torch, row["dtype"])
    lack = kit.lack(KitRequest(kits._BASE, torch.device("cpu"), compute))
    if lack is not None:
        pytest.skip(f"{kit.label}: {lack}")
    monkeypatch.setattr(kits, "KITS", (kit,))
    with Reranker("tiny", device="cpu", dtype=row["dtype"]) as reranker:
        moved = max(
            abs(together - reranker.logits(query, [document])[0])
            for query in QUERIES
            for document, together in zip(
                documents(), reranker.logits(query, documents()), strict=True
            )
        )
    assert moved <= float(row["limit"])
