"""Threads and tasks that ask at once for long, on the bundled checkpoint: each gets its own scores.

The short form is of every run. The long one, 20,000 requests, takes minutes:
`python -m pytest -m soak`.
"""

import asyncio
import gc
import random
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from bge_rerank_adapters import RankedDocument, Reranker
from tests.checkpoints import build_xlm_roberta, read_queries, read_sentences

THREADS, TASKS = 64, 64
SHORT_REQUESTS, LONG_REQUESTS = 2 * (THREADS + TASKS), 20_000
# Small packs: many of them, and soon one of each size.
PACK_TOKENS = 256
SIZES = [0, 1, 1, 1, 1, 2, 2, 3, 5, 10]
# Of one to nine words, so that there is time for many requests.
TEXTS = [
    " ".join(text.split()[: 1 + place % 9])
    for place, text in enumerate(dict.fromkeys(read_sentences().values()))
][:60]
QUERIES = [" ".join(query.split()[:5]) for query in list(read_queries().values())[:6]]
COMPANY = 1e-5
GROWTH = 1.05

Table = dict[tuple[str, str], float]


@pytest.fixture
def engine() -> Iterator[Reranker]:
    with Reranker("tiny", device="cpu", dtype="float32", pack_tokens=PACK_TOKENS) as made:
        yield made


@dataclass(frozen=True)
class Request:
    """One of the requests of a load, the same for the same number."""

    number: int
    query: str
    texts: list[str]
    top_k: int | None
    many: bool

    @classmethod
    def draw(cls, number: int) -> "Request":
        dice = random.Random(number)
        return cls(
            number,
            dice.choice(QUERIES),
            dice.choices(TEXTS, k=dice.choice(SIZES)),
            top_k=dice.choice([None, None, 1, 3]),
            many=dice.random() < 0.2,
        )

    def check(self, ranking: list[RankedDocument], table: Table) -> None:
        logits = [table[self.query, text] for text in self.texts]
        assert len(ranking) == min(len(logits), self.top_k or len(logits))
        assert len({result.index for result in ranking}) == len(ranking)
        for result in ranking:
            assert result.text == self.texts[result.index]
            assert abs(result.logit - logits[result.index]) <= COMPANY
        kept = {result.index for result in ranking}
        worst = min((result.logit for result in ranking), default=0.0)
        assert all(
            logit <= worst + 2 * COMPANY for i, logit in enumerate(logits) if i not in kept
        ), "a better document was left out"
        assert [result.logit for result in ranking] == sorted(
            (result.logit for result in ranking), reverse=True
        )


class Soak:
    """Clients that take the next request, ask it and check the answer, until none is left."""

    def __init__(self, engine: Reranker, table: Table, numbers: Sequence[int]) -> None:
        self.engine, self.table = engine, table
        self.numbers = iter(numbers)
        self.lock = threading.Lock()
        self.answered: list[int] = []

    def run(self, *, limit_s: float) -> None:
        """Ask all requests; fail if a client failed or is not done in time."""
        with ThreadPoolExecutor(THREADS + 1) as pool:
            clients = [pool.submit(self._ask) for _ in range(THREADS)]
            clients.append(pool.submit(asyncio.run, self._ask_all()))
            for client in clients:
                client.result(limit_s)

    def _requests(self) -> Iterator[Request]:
        while True:
            with self.lock:
                number = next(self.numbers, None)
            if number is None:
                return
            yield Request.draw(number)

    def _ask(self) -> None:
        for request in self._requests():
            if request.many:
                asked = [(request.query, request.texts)]
                (ranking,) = self.engine.rerank_many(asked, top_k=request.top_k)
            else:
                ranking = self.engine.rerank(request.query, request.texts, top_k=request.top_k)
            self._end(request, ranking)

    async def _ask_all(self) -> None:
        await asyncio.gather(*(self._aask() for _ in range(TASKS)))

    async def _aask(self) -> None:
        for request in self._requests():
            if request.many:
                asked = [(request.query, request.texts)]
                (ranking,) = await self.engine.arerank_many(asked, top_k=request.top_k)
            else:
                ranking = await self.engine.arerank(
                    request.query, request.texts, top_k=request.top_k
                )
            self._end(request, ranking)

    def _end(self, request: Request, ranking: list[RankedDocument]) -> None:
        request.check(ranking, self.table)
        with self.lock:
            self.answered.append(request.number)


def resident_bytes() -> int:
    """Return how much memory this process has now."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def soak(engine: Reranker, *, requests: int, limit_s: float) -> None:
    table = {
        (query, text): logit
        for query in QUERIES
        for text, logit in zip(TEXTS, engine.logits(query, TEXTS), strict=True)
    }
    # Otherwise a caller that got another's scores would not be seen.
    assert len({round(logit, 4) for logit in table.values()}) > 0.9 * len(table)
    for pairs in range(1, 1 + PACK_TOKENS // 8):
        engine.logits(QUERIES[0], TEXTS[:pairs])
    warm_up = range(requests, requests + THREADS + TASKS)
    Soak(engine, table, warm_up).run(limit_s=limit_s)
    begin, warm_bytes = engine.stats(), resident_bytes() if sys.platform == "linux" else 0
    load = Soak(engine, table, range(requests))
    load.run(limit_s=limit_s)
    assert sorted(load.answered) == list(range(requests)), "none lost, none doubled"
    end = engine.stats()
    assert end.requests - begin.requests == requests
    distinct = sum(len(set(Request.draw(number).texts)) for number in range(requests))
    assert end.pairs - begin.pairs == distinct, "each pair is to be scored once"
    assert end.queued_pairs == 0
    if sys.platform == "linux":
        assert resident_bytes() < GROWTH * warm_bytes


@pytest.mark.timeout(240)
def test_every_request_gets_its_own_scores(engine):
    soak(engine, requests=SHORT_REQUESTS, limit_s=200)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_every_one_of_many_requests_gets_its_own_scores(engine):
    soak(engine, requests=LONG_REQUESTS, limit_s=7000)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_packs_of_ever_new_sizes_do_not_make_memory_grow(tmp_path):
    """oneDNN keeps code for each number of rows that a product has had."""
    dice = random.Random(5)
    sentences = [text[:70] for text in read_sentences().values()]

    def run(engine: Reranker, packs: int) -> int:
        for _ in range(packs):
            engine.logits(QUERIES[0], dice.sample(sentences, dice.randint(8, 50)))
        return resident_bytes()

    folder = str(build_xlm_roberta(tmp_path / "checkpoint"))
    with Reranker(folder, device="cpu", dtype="float32") as engine:
        grown = -run(engine, 80) + run(engine, 160)
    assert grown < 100e6
