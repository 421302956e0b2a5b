"""The event loop goes on: none of our asynchronous methods keeps it for long at a time.

What is measured is the processor time that the loop's own thread spends in each of its callbacks.
Other load on the machine does not change it much, and can only add to it, so a call may try again.
How long the loop stands still by the clock, waiting for Python's lock too, is measured in
`benchmarks/concurrency.py`.
"""

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Iterator
from itertools import islice

import pytest
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode

from bge_rerank_adapters import Reranker
from bge_rerank_adapters.langchain import BGEDocumentCompressor
from bge_rerank_adapters.llama_index import BGENodePostprocessor
from tests.checkpoints import build_xlm_roberta, read_sentences
from tests.texts import QUERY

LIMIT_S = 0.02
TRIES = 3
SENTENCES = list(read_sentences().values())
MANY = [f"{i} {SENTENCES[i % len(SENTENCES)][:30]}" for i in range(10_000)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reranker]:
    folder = build_xlm_roberta(tmp_path_factory.mktemp("loop") / "checkpoint")
    with Reranker(str(folder), device="cpu", dtype="float32") as made:
        made.warm_up()
        yield made


class LongestStep:
    """The most processor time that any callback of the loop has taken, in seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps = 0


@pytest.fixture
def longest(monkeypatch: pytest.MonkeyPatch) -> Iterator[LongestStep]:
    found = LongestStep()
    run = asyncio.Handle._run
    # What other tests have left behind is not for a collection in one of these steps to go through.
    gc.collect()
    gc.freeze()

    def timed_run(handle: asyncio.Handle) -> None:
        begin = time.thread_time()
        run(handle)
        found.seconds = max(found.seconds, time.thread_time() - begin)
        found.steps += 1

    monkeypatch.setattr(asyncio.Handle, "_run", timed_run)
    yield found
    gc.unfreeze()


async def measure(longest: LongestStep, call: Callable[[], Awaitable[list]]) -> list:
    """Run a call on the loop, again if a step took too long, and count from its beginning on."""
    for _ in range(TRIES):
        await asyncio.sleep(0)
        longest.seconds, longest.steps = 0.0, 0
        result = await call()
        # Its last step is counted when it ends.
        await asyncio.sleep(0)
        if longest.seconds < LIMIT_S:
            break
    return result


async def test_a_step_that_computes_is_seen(longest):
    """The tests below would pass on anything if it were not."""

    async def compute() -> list:
        await asyncio.sleep(0)
        end = time.thread_time() + 2 * LIMIT_S
        while time.thread_time() < end:
            pass
        return []

    await measure(longest, compute)
    assert longest.seconds > LIMIT_S


async def test_ten_thousand_documents(engine, longest):
    ranking = await measure(longest, lambda: engine.arerank(QUERY, MANY))
    assert sorted(result.index for result in ranking) == list(range(len(MANY)))
    assert longest.seconds < LIMIT_S
    assert longest.steps < 50, "what one call makes the loop do must not grow with its documents"


async def test_many_requests(engine, longest):
    texts = iter(MANY)
    requests = [(QUERY, list(islice(texts, 20))) for _ in range(100)]
    rankings = await measure(longest, lambda: engine.arerank_many(requests))
    assert len(rankings) == 100
    assert longest.seconds < LIMIT_S


async def test_documents_of_a_megabyte(engine, longest):
    texts = [f"{i} " + "river stone tiger " * 60_000 for i in range(2)]
    assert len(await measure(longest, lambda: engine.arerank(QUERY, texts))) == 2
    assert longest.seconds < LIMIT_S


async def test_many_calls_at_once(engine, longest):
    async def ask() -> list:
        texts = iter(MANY)
        return await asyncio.gather(
            *(engine.arerank(QUERY, list(islice(texts, 10))) for _ in range(64))
        )

    assert len(await measure(longest, ask)) == 64
    assert longest.seconds < LIMIT_S


async def test_thousands_of_langchain_documents(engine, longest):
    metadata = {"title": "Faust", "source": {"path": ["a", "b"], "page": 3}}
    found = [Document(page_content=text, metadata=metadata) for text in MANY[:1500]]
    compressor = BGEDocumentCompressor(reranker=engine, top_k=None, metadata_fields=["title"])
    kept = await measure(longest, lambda: compressor.acompress_documents(found, QUERY))
    assert len(kept) == 1500
    assert longest.seconds < LIMIT_S


async def test_thousands_of_llama_index_nodes(engine, longest):
    nodes = [
        NodeWithScore(node=TextNode(text=text, embedding=[0.5] * 512, metadata={"n": i}), score=0.5)
        for i, text in enumerate(MANY[:1000])
    ]
    postprocessor = BGENodePostprocessor(reranker=engine, top_k=None)
    kept = await measure(longest, lambda: postprocessor.apostprocess_nodes(nodes, query_str=QUERY))
    assert len(kept) == 1000
    assert longest.seconds < LIMIT_S
