"""Reranking by real servers over real sockets, through every adapter, and without torch."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

import httpx

from bge_rerank_adapters import (
    Overloaded,
    Ranking,
    RemoteError,
    RemoteReranker,
    Reranker,
    SettingsError,
)
from bge_rerank_adapters.engine.text.pairs import TokenPair
from bge_rerank_adapters.milvus import BGERerankFunction
from tests.checkpoints import read_sentences
from tests.rerank_servers import free_port, serving, until
from tests.test_imports import PACKAGE, run_python
from tests.texts import DOCUMENTS, QUERY

pytestmark = pytest.mark.timeout(180)

KEY = "sekret-ß-42"
LONG = "The sun shines in Weimar. " * 120
# What a small image lacks, whatever its host brings.
ENGINE_ONLY = (
    *("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub"),
    *("typer", "rich"),
)


@pytest.fixture(scope="module")
def url(reranker: Reranker) -> Iterator[str]:
    with serving(reranker) as address:
        yield address


def assert_same(found: Ranking, wanted: Ranking, *, tolerance: float = 1e-5) -> None:
    assert [each.index for each in found] == [each.index for each in wanted]
    assert [each.text for each in found] == [each.text for each in wanted]
    assert [each.score for each in found] == pytest.approx(
        [each.score for each in wanted], abs=tolerance
    )


# Our own server


@pytest.mark.parametrize(
    "given", [{}, {"api": "bge"}, {"api": "tei"}, {"max_documents_per_request": 2}]
)
def test_it_is_equal_to_the_engine(url, reranker, given):
    texts = [*DOCUMENTS, DOCUMENTS[1], "", "☃ 北京 \ud800"]
    many = [(QUERY, texts), ("Another?", [])]
    pairs = [(QUERY, texts[0]), ("Another?", texts[1]), (QUERY, texts[2])]
    close = partial(pytest.approx, abs=1e-5)
    wanted = reranker.rerank(QUERY, texts)
    with RemoteReranker(url, **given) as remote:
        assert_same(remote.rerank(QUERY, texts), wanted)
        assert_same(asyncio.run(remote.arerank(QUERY, texts, top_k=3)), wanted[:3])
        assert remote.logits(QUERY, texts) == close(reranker.logits(QUERY, texts))
        assert remote.score(QUERY, texts) == close(reranker.score(QUERY, texts))
        assert remote.score_pairs(pairs) == close(reranker.score_pairs(pairs))
        assert_same(remote.rerank_many(many)[0], wanted)


def test_what_was_cut_is_told(url):
    with RemoteReranker(url) as remote:
        cut = {each.text: each.truncated for each in remote.rerank(QUERY, [LONG, DOCUMENTS[0]])}
    assert cut == {LONG: True, DOCUMENTS[0]: False}


@pytest.mark.parametrize("path", ["/v1", "/v1/rerank", "/v2/rerank"])
def test_by_a_route_it_is_cohere_s_form_and_scores_alone(url, reranker, path):
    with RemoteReranker(url + path) as remote:
        ranking = remote.rerank(QUERY, DOCUMENTS)
        assert_same(ranking, reranker.rerank(QUERY, DOCUMENTS))
        assert {each.logit for each in ranking} == {None}


def test_windows_are_told():
    text = LONG + "Goethe wrote Faust."
    with (
        Reranker("tiny", device="cpu", long_documents="window", window_tokens=64) as engine,
        serving(engine) as address,
        RemoteReranker(address) as remote,
    ):
        [found], [wanted] = (each.rerank("Who wrote Faust?", [text]) for each in (remote, engine))
    assert found.span == wanted.span
    assert found.span is not None


def test_a_servers_limits_are_kept_and_its_key_is_needed(reranker):
    texts = [f"{number} {LONG}" for number in range(7)]
    limits = {"max_documents": 3, "max_body_bytes": 2 * len(LONG) + 400, "served_model": "m"}
    with serving(reranker, api_key=KEY, **limits) as address:
        with RemoteReranker(address, api_key=KEY, model="m") as remote:
            assert_same(remote.rerank(QUERY, texts), reranker.rerank(QUERY, texts))
            # /info, then three parts, of which two are too large and go in halves.
            assert remote.stats().http_requests == 8
        for given, told in (
            ({}, "api_key is needed"),
            ({"api_key": "other"}, "api_key is not accepted"),
            ({"api_key": KEY, "model": "n"}, "model='n'"),
        ):
            with RemoteReranker(address, **given) as remote, pytest.raises(RemoteError, match=told):
                remote.rerank(QUERY, DOCUMENTS)


def test_a_server_with_too_much_to_do_is_overloaded(monkeypatch):
    with (
        Reranker("tiny", device="cpu", dtype="float32", max_queued_pairs=1) as engine,
        serving(engine, max_concurrent_requests=1) as address,
        RemoteReranker(address, max_retries=0, max_documents_per_request=1) as remote,
    ):
        remote.warm_up()
        model, over = engine._core.workers[0].model, threading.Event()
        score = model.logits

        def held(pairs: Sequence[TokenPair]) -> list[float]:
            assert over.wait(60)
            return score(pairs)

        monkeypatch.setattr(model, "logits", held)
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(remote.rerank, QUERY, list(read_sentences().values())[:64])
            until(lambda: remote.stats().failed_requests > 0)
            over.set()
            with pytest.raises(Overloaded, match="429"):
                call.result(60)


@pytest.mark.timeout(900)
def test_a_server_that_comes_back_in_time_loses_no_call(tmp_path):
    """Five hundred calls by eight threads, while the server is killed and started three times."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = started(port, tmp_path)
    # The default settings, but for time on a machine that does much else.
    with RemoteReranker(url, timeout_s=400) as remote, ThreadPoolExecutor(8) as pool:
        wanted = remote.score(QUERY, DOCUMENTS)
        calls = [pool.submit(one_of_many, remote, number) for number in range(500)]
        for share in (0.1, 0.3, 0.5):
            # A server may take long to start on a machine that does much else.
            while sum(each.done() for each in calls) < share * len(calls):
                time.sleep(0.01)
            process.kill()
            process.wait()
            process = started(port, tmp_path)
        try:
            found = [each.result() for each in calls]
        finally:
            process.terminate()
            process.wait(30)
        assert remote.stats().retries > 0
        assert remote.stats().failed_requests == 0
    assert found == [pytest.approx(wanted, abs=1e-5)] * 500


def one_of_many(remote: RemoteReranker, number: int) -> list[float]:
    """Score by a thread, or by a loop of its own, with a pause as a program's own work."""
    time.sleep(0.02)
    if number % 2:
        return remote.score(QUERY, DOCUMENTS)
    ranking = asyncio.run(remote.arerank(QUERY, DOCUMENTS))
    return [each.score for each in sorted(ranking, key=lambda each: each.index)]


def started(port: int, folder: Path) -> "subprocess.Popen[bytes]":
    """Start `bge-rerank serve`, and do not wait for it."""
    command = [sys.executable, "-m", "bge_rerank_adapters", "serve", "--model", "tiny"]
    with (folder / "log").open("a") as log:
        return subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log)


# The adapters


def test_langchain_takes_it(url, reranker):
    documents = pytest.importorskip("langchain_core.documents")
    from bge_rerank_adapters.langchain import BGEDocumentCompressor

    found = [documents.Document(text, metadata={"n": n}) for n, text in enumerate(DOCUMENTS)]
    with RemoteReranker(url, api_key=KEY) as remote:
        compressors = [BGEDocumentCompressor(reranker=each, top_k=2) for each in (remote, reranker)]
        results = [each.compress_documents(found, QUERY) for each in compressors]
        results.append(asyncio.run(compressors[0].acompress_documents(found, QUERY)))
        for result in results:
            assert [each.metadata["n"] for each in result] == [
                each.metadata["n"] for each in results[1]
            ]
            assert result[0].metadata["relevance_score"] == pytest.approx(
                results[1][0].metadata["relevance_score"], abs=1e-5
            )
        compressors[0].warm_up()
        assert_no_secret(compressors[0].model_dump())
        assert_no_secret(compressors[0])
        compressors[0].close()
        assert not remote.closed


def test_llama_index_takes_it(url, reranker):
    schema = pytest.importorskip("llama_index.core.schema")
    from bge_rerank_adapters.llama_index import BGENodePostprocessor

    nodes = [schema.NodeWithScore(node=schema.TextNode(text=text), score=0.1) for text in DOCUMENTS]
    with RemoteReranker(url, api_key=KEY) as remote:
        found, wanted = (
            BGENodePostprocessor(reranker=each, top_k=2).postprocess_nodes(nodes, query_str=QUERY)
            for each in (remote, reranker)
        )
        postprocessor = BGENodePostprocessor(reranker=remote)
        assert_no_secret(postprocessor.to_dict())
        assert_no_secret(postprocessor)
    assert [each.node.text for each in found] == [each.node.text for each in wanted]
    assert [each.score for each in found] == pytest.approx(
        [each.score for each in wanted], abs=1e-5
    )


def test_milvus_takes_it(url, reranker):
    with RemoteReranker(url, api_key=KEY) as remote:
        made = BGERerankFunction(reranker=remote)
        plain = [each.to_dict() for each in made(QUERY, DOCUMENTS, top_k=2)]
        wanted = [each.to_dict() for each in BGERerankFunction(reranker=reranker)(QUERY, DOCUMENTS)]
        assert plain == [each | {"score": pytest.approx(each["score"])} for each in wanted[:2]]
        raw = BGERerankFunction(reranker=remote, normalize=False)(QUERY, DOCUMENTS, top_k=1)
        assert raw[0].score == pytest.approx(max(reranker.logits(QUERY, DOCUMENTS)), abs=1e-5)
        assert made.device is None
        made.close()
        assert made.reranker is remote
        assert not remote.closed
        assert_no_secret(made.__getstate__())


def test_milvus_gives_no_score_as_a_logit(url):
    with RemoteReranker(f"{url}/v1") as remote:
        assert BGERerankFunction(reranker=remote)(QUERY, DOCUMENTS)
        with pytest.raises(SettingsError, match="normalize=False"):
            BGERerankFunction(reranker=remote, normalize=False)(QUERY, DOCUMENTS)


def assert_no_secret(shown: object) -> None:
    assert "sekret" not in f"{shown!r} {shown}"


# Without torch

LANGCHAIN = """
from langchain_core.documents import Document
from bge_rerank_adapters.langchain import BGEDocumentCompressor
made = BGEDocumentCompressor(reranker=remote, top_k=1)
best = made.compress_documents([Document(text) for text in TEXTS], "Who wrote Faust?")
print(best[0].page_content)
"""
LLAMA_INDEX = """
from llama_index.core.schema import NodeWithScore, TextNode
from bge_rerank_adapters.llama_index import BGENodePostprocessor
nodes = [NodeWithScore(node=TextNode(text=text)) for text in TEXTS]
made = BGENodePostprocessor(reranker=remote, top_k=1)
best = made.postprocess_nodes(nodes, query_str="Who wrote Faust?")
print(best[0].node.text)
"""
MILVUS = """
from bge_rerank_adapters.milvus import BGERerankFunction
print(BGERerankFunction(reranker=remote)("Who wrote Faust?", TEXTS, top_k=1)[0].text)
"""


@pytest.mark.parametrize(
    ("host", "blocked", "code"),
    [
        # numpy is llama-index-core's own.
        ("langchain_core", (*ENGINE_ONLY, "numpy", "llama_index"), LANGCHAIN),
        ("llama_index.core", (*ENGINE_ONLY, "langchain_core"), LLAMA_INDEX),
        ("sys", (*ENGINE_ONLY, "numpy", "langchain_core", "llama_index", "pydantic"), MILVUS),
    ],
    ids=["langchain", "llama_index", "milvus"],
)
def test_adapters_need_no_torch(url, host, blocked, code):
    pytest.importorskip(host)
    begin = f"""
from bge_rerank_adapters import RemoteReranker
TEXTS = ["It rains.", "Goethe wrote Faust."]
remote = RemoteReranker({url!r})
assert len(remote.rerank_many([("Who wrote Faust?", TEXTS)])[0]) == 2
"""
    done = run_python(begin + code, blocked=blocked)
    assert (done.stdout.strip(), done.returncode) == ("Goethe wrote Faust.", 0), done.stderr


# infinity, which pins old libraries: an environment of its own with infinity-emb[server,torch]


@pytest.mark.skipif(
    "INFINITY_PYTHON" not in os.environ, reason="INFINITY_PYTHON names no Python with infinity_emb"
)
def test_infinity_gives_the_same_scores(reranker, tmp_path):
    port = free_port()
    command = [
        *(Path(os.environ["INFINITY_PYTHON"]).with_name("infinity_emb"), "v2"),
        *("--model-id", str(PACKAGE / "tiny"), "--served-model-name", "tiny"),
        *("--engine", "torch", "--device", "cpu", "--dtype", "float32"),
        *("--no-bettertransformer", "--no-model-warmup"),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]
    quiet = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=tmp_path, env={**os.environ, **quiet}
        )
    try:
        address = f"http://127.0.0.1:{port}"
        while not _answers(f"{address}/health"):
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        texts = [*DOCUMENTS, LONG, DOCUMENTS[0]]
        wanted = reranker.rerank(QUERY, texts)
        for given in (
            {},
            {"api": "infinity", "model": "tiny"},
            {"api": "infinity", "scale": "logit"},
            {"max_documents_per_request": 2},
        ):
            with RemoteReranker(address, **given) as remote:
                assert_same(remote.rerank(QUERY, texts), wanted)
    finally:
        process.terminate()
        process.wait(30)


def _answers(url: str) -> bool:
    try:
        return bool(httpx.get(url).status_code == 200)
    except httpx.HTTPError:
        return False
