"""What an installed wheel must do, by public names alone; `check_wheels.py` runs it.

It reads nothing of the checkout, and runs where no compiler is found.
"""

import asyncio
import importlib.metadata
import json
import math
import pickle
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bge_rerank_adapters
from bge_rerank_adapters import CheckpointNotFoundError, Reranker

QUERY = "Who wrote Faust?"
DOCUMENTS = [
    "It rains in Weimar.",
    "Goethe wrote Faust.",
    "Schiller wrote The Robbers.",
    "Goethe wrote Faust.",
]
# In float32, from the environment that the tests of parity with FlagEmbedding run in.
LOGITS = [-2.85456, 2.32216, -1.69110, 2.32216]
DISTRIBUTION = importlib.metadata.distribution("bge-rerank-adapters")
HAS_KERNELS = "Root-Is-Purelib: false" in (DISTRIBUTION.read_text("WHEEL") or "")


@pytest.fixture(scope="module")
def reranker():
    with Reranker("tiny", device="cpu", dtype="float32") as engine:
        yield engine


def shell(*arguments: str, given: str = "") -> str:
    """Return what `bge-rerank` writes."""
    command = shutil.which("bge-rerank", path=str(Path(sys.executable).parent))
    assert command is not None
    done = subprocess.run(
        [command, *arguments], input=given, capture_output=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_is_the_wheels_and_there_is_no_compiler():
    assert Path(sys.prefix) in Path(bge_rerank_adapters.__file__).parents
    assert [name for name in ("cc", "gcc", "clang", "cl", "icx") if shutil.which(name)] == []


def test_the_version_is_the_same_everywhere():
    assert bge_rerank_adapters.__version__ == DISTRIBUTION.version
    assert shell("--version") == f"bge-rerank {DISTRIBUTION.version}\n"


def test_info_says_which_kernels_run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    rows = [line for line in shell("info").splitlines() if "Own kernels" in line]
    assert len(rows) >= 3
    assert all(("they were not built for this system" in row) is not HAS_KERNELS for row in rows)
    # The wheel for every system is a second choice on the one that the other is for.
    if HAS_KERNELS:
        assert (platform.system(), platform.machine()) == ("Linux", "x86_64")


def test_logits_are_those_of_the_tested_environment(reranker):
    assert reranker.logits(QUERY, DOCUMENTS) == pytest.approx(LOGITS, abs=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.1), ("int8", 0.4)])
def test_other_dtypes_are_near(dtype, tolerance):
    with Reranker("tiny", device="cpu", dtype=dtype) as engine:
        assert engine.logits(QUERY, DOCUMENTS) == pytest.approx(LOGITS, abs=tolerance)


def test_the_best_come_first_with_their_places(reranker):
    ranking = reranker.rerank(QUERY, DOCUMENTS)
    assert [each.index for each in ranking] == [1, 3, 2, 0]
    assert [each.text for each in ranking] == [DOCUMENTS[each.index] for each in ranking]
    for each in ranking:
        assert each.score == pytest.approx(1 / (1 + math.exp(-each.logit)), abs=1e-6)
    assert [each.index for each in reranker.rerank(QUERY, DOCUMENTS, top_k=1)] == [1]
    kept = reranker.rerank(QUERY, DOCUMENTS, score_threshold=ranking[1].score)
    assert [each.index for each in kept] == [1, 3]
    assert reranker.rerank(QUERY, []) == []


def test_what_is_cut_is_told_and_windows_find_what_is_late():
    late = "The sun shines. " * 400 + DOCUMENTS[1]
    with Reranker("tiny", device="cpu", dtype="float32", long_documents="window") as engine:
        [found] = engine.rerank(QUERY, [late])
        assert "Goethe" in late[slice(*found.span)]
    with Reranker("tiny", device="cpu", dtype="float32") as engine:
        assert engine.rerank(QUERY, [late])[0].truncated


def test_asynchronous_calls_give_the_same(reranker):
    async def ask():
        return await asyncio.gather(*(reranker.arerank(QUERY, DOCUMENTS) for _ in range(4)))

    for ranking in asyncio.run(ask()):
        assert [each.index for each in ranking] == [1, 3, 2, 0]


def test_bad_input_is_refused(reranker):
    for documents in ("one string", [None], {"text": "a"}):
        with pytest.raises((TypeError, ValueError)):
            reranker.rerank(QUERY, documents)
    with pytest.raises(ValueError, match="top_k"):
        reranker.rerank(QUERY, DOCUMENTS, top_k=0)
    with pytest.raises(CheckpointNotFoundError):
        Reranker("nobody/nothing", local_files_only=True)


def test_langchain():
    from langchain_core.documents import Document

    from bge_rerank_adapters.langchain import BGEDocumentCompressor

    compressor = BGEDocumentCompressor(model="tiny", device="cpu", top_k=2)
    found = compressor.compress_documents([Document(text) for text in DOCUMENTS], QUERY)
    assert [each.metadata["retrieval_index"] for each in found] == [1, 3]
    again = pickle.loads(pickle.dumps(compressor))
    assert again.compress_documents([Document(text) for text in DOCUMENTS], QUERY) == found


def test_llama_index():
    from llama_index.core.schema import NodeWithScore, TextNode

    from bge_rerank_adapters.llama_index import BGENodePostprocessor

    nodes = [NodeWithScore(node=TextNode(text=text)) for text in DOCUMENTS]
    postprocessor = BGENodePostprocessor(model="tiny", device="cpu", top_k=2)
    found = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
    assert [each.node.metadata["retrieval_index"] for each in found] == [1, 3]


def test_milvus():
    from bge_rerank_adapters.milvus import BGERerankFunction

    found = BGERerankFunction("tiny", device="cpu")(QUERY, DOCUMENTS, top_k=2)
    assert [each.index for each in found] == [1, 3]


def test_haystack():
    from haystack import Document

    from bge_rerank_adapters.haystack import BGERanker

    documents = [Document(id=str(place), content=text) for place, text in enumerate(DOCUMENTS)]
    found = BGERanker(model="tiny", device="cpu", top_k=2).run(query=QUERY, documents=documents)
    assert [each.id for each in found["documents"]] == ["1", "3"]


def test_a_server_answers_and_has_its_pages(reranker):
    from starlette.testclient import TestClient

    from bge_rerank_adapters.serve import create_app

    with TestClient(create_app(engine=reranker)) as client:
        answer = client.post("/rerank", json={"query": QUERY, "documents": DOCUMENTS}).json()
        assert [each["index"] for each in answer["results"]] == [1, 3, 2, 0]
        assert client.get("/").status_code == client.get("/docs").status_code == 200


def test_a_remote_reranker_needs_no_torch():
    code = (
        "import sys\n"
        "from bge_rerank_adapters import RemoteReranker\n"
        "RemoteReranker('http://127.0.0.1:9').close()\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_shell(tmp_path):
    assert "Dartmouth" in shell("demo")
    assert "BAAI/bge-reranker-v2-m3" in shell("models")
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"query": QUERY, "documents": DOCUMENTS}) + "\n")
    answered = tmp_path / "answered.jsonl"
    shell("rerank", str(asked), "--output", str(answered), "--model", "tiny", "--device", "cpu")
    [line] = map(json.loads, answered.read_text().splitlines())
    assert [each["index"] for each in line["results"]] == [1, 3, 2, 0]
