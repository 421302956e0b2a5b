"""What the engine ranks, and where the servers are that clients are held to it against."""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Servers:
    """Two servers of one model, and what the engine itself makes of a request.

    Attributes:
        open_url: One that asks for no key.
        locked_url: One that does.
        key: Its key.
        model: What requests may call the model on both.
        query: A question.
        documents: n texts, each only once, some of them long.
        ranking: n of (index, score), best first.
        logits: n logits, in that order.
        tokens: How many tokens the n pairs have.
    """

    open_url: str
    locked_url: str
    key: str
    model: str
    query: str
    documents: list[str]
    ranking: list[tuple[int, float]]
    logits: list[float]
    tokens: int


@pytest.fixture(scope="session")
def servers() -> Servers:
    told = json.loads(Path(os.environ["RERANK_SERVERS"]).read_text(encoding="utf-8"))
    return Servers(**told | {"ranking": [tuple(each) for each in told["ranking"]]})


@pytest.fixture(scope="session")
def check(servers: Servers) -> Callable[..., None]:
    def is_the_engines(found: Iterable[tuple[int, float]], top_n: int | None = None) -> None:
        """Fail unless these are the engine's (index, score), best first, and as many as asked."""
        found = list(found)
        wanted = servers.ranking[:top_n]
        assert [index for index, _ in found] == [index for index, _ in wanted]
        assert [score for _, score in found] == pytest.approx(
            [score for _, score in wanted], abs=1e-5
        )

    return is_the_engines
