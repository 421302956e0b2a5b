"""The server on Ray Serve: two replicas on a cluster of this machine, one of them killed."""

import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
import pytest
import ray

from bge_rerank_adapters import Reranker
from bge_rerank_adapters import serve as ours
from tests.checkpoints import read_sentences
from tests.ray_clusters import start_cluster
from tests.rerank_servers import free_port
from tests.texts import DOCUMENTS, QUERY

pytestmark = pytest.mark.timeout(1800)

KEY = "sekret-42"
HEADERS = {"Authorization": f"Bearer {KEY}"}
SENTENCES = list(read_sentences().values())
ENVIRONMENT = {
    "BGE_RERANK_MODEL": "tiny",
    "BGE_RERANK_DEVICE": "cpu",
    "BGE_RERANK_DTYPE": "float32",
    "BGE_RERANK_API_KEY": KEY,
    "BGE_RERANK_MIN_REPLICAS": "2",
    "BGE_RERANK_MAX_REPLICAS": "2",
    "RAY_USAGE_STATS_ENABLED": "0",
}
REQUESTS = 40


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Serve `bge_rerank_adapters.serve:deployment`, and give its address."""
    from ray import serve

    opened = free_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in [each for each in os.environ if each.startswith("BGE_RERANK_")]:
            patch.delenv(name)
        # Processes of the cluster get the environment that it is started in.
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        start_cluster(cpus=4)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": opened})
            serve.run(ours.deployment, name="rerank", route_prefix="/")
            yield f"http://127.0.0.1:{opened}"
        finally:
            vars(ours).pop("deployment", None)
            serve.shutdown()
            ray.shutdown()


def replicas() -> list[str]:
    return [
        each["name"]
        for each in ray.util.list_named_actors(all_namespaces=True)
        if each["name"].startswith("SERVE_REPLICA::rerank#")
    ]


def test_replicas_answer_as_the_engine_does(url, reranker: Reranker):
    assert len(replicas()) == 2
    wanted = reranker.rerank(QUERY, DOCUMENTS)
    for _ in range(6):
        body = {"query": QUERY, "documents": DOCUMENTS}
        answer = httpx.post(f"{url}/v2/rerank", json=body, headers=HEADERS, timeout=60).json()
        assert [each["index"] for each in answer["results"]] == [each.index for each in wanted]
        assert [each["relevance_score"] for each in answer["results"]] == pytest.approx(
            [each.score for each in wanted], abs=1e-5
        )
    assert httpx.get(f"{url}/health", timeout=60).json() == {"status": "ok"}
    metrics = httpx.get(f"{url}/metrics", headers=HEADERS, timeout=60).text
    assert "bge_rerank_engine_pairs_total" in metrics


def test_replicas_ask_for_the_key_and_refuse_as_one_process_does(url):
    body = {"query": QUERY, "documents": DOCUMENTS}
    post = partial(httpx.post, timeout=60)
    refused = post(f"{url}/v2/rerank", json=body)
    assert refused.status_code == 401
    assert "needs its API key" in refused.json()["message"]
    refused = post(f"{url}/rerank", json={"query": "", "texts": []}, headers=HEADERS)
    assert (refused.status_code, refused.json()["error_type"]) == (400, "Empty")
    large = post(f"{url}/v2/rerank", content=b" " * 5_000_000, headers=HEADERS)
    assert large.status_code == 413


def test_nothing_is_lost_when_a_replica_is_killed(url, reranker: Reranker):
    requests = [
        [SENTENCES[(7 * number + place) % len(SENTENCES)] for place in range(5)]
        for number in range(REQUESTS)
    ]
    seen: Counter[str] = Counter()
    counting = itertools.count(1)
    enough = threading.Event()

    def ask(texts: list[str]) -> dict[int, float]:
        deadline = time.monotonic() + 400
        with httpx.Client(base_url=url, headers=HEADERS, timeout=60) as client:
            while time.monotonic() < deadline:
                try:
                    answer = client.post("/v2/rerank", json={"query": QUERY, "documents": texts})
                except httpx.TransportError as error:
                    seen[type(error).__name__] += 1
                else:
                    seen[str(answer.status_code)] += 1
                    if answer.status_code == 200:
                        if next(counting) == REQUESTS // 4:
                            enough.set()
                        results = answer.json()["results"]
                        return {each["index"]: each["relevance_score"] for each in results}
                time.sleep(0.2)
        raise AssertionError(f"no answer in time: {seen}")

    before = replicas()
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(ask, texts) for texts in requests]
        assert enough.wait(400)
        ray.kill(ray.get_actor(before[0], namespace="serve"), no_restart=True)
        answers = [call.result(500) for call in calls]
    for scores, texts in zip(answers, requests, strict=True):
        wanted = reranker.score(QUERY, texts)
        assert [scores[index] for index in range(5)] == pytest.approx(wanted, abs=1e-5)
    assert seen["200"] == REQUESTS
    # Ray Serve's proxy answers 500 for what the killed one had, and sends all else to the other.
    assert set(seen) <= {"200", "500", "503"}, seen
