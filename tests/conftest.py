"""The engine that most tests share."""

from collections.abc import Iterator

import pytest

from bge_rerank_adapters import Reranker


@pytest.fixture(scope="session")
def reranker() -> Iterator[Reranker]:
    with Reranker("tiny", device="cpu", dtype="float32") as engine:
        yield engine
