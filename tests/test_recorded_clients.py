"""The requests of clients that are no Python, as their source builds them, over a real socket.

`tests/data/clients/` has them: where each is from, what is sent, and what its parser reads.
"""

import copy
import http.client
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from bge_rerank_adapters import Ranking, Reranker
from bge_rerank_adapters.serve import ServerSettings, create_app
from tests.test_serve import TINY
from tests.test_serve_http import WAIT_S, listening
from tests.texts import DOCUMENTS, QUERY

pytestmark = pytest.mark.timeout(400)

ROOT = Path(__file__).parent.parent
KEY = "a-key-of-the-tests"
RECORDS = [
    record
    for file in sorted((ROOT / "tests" / "data" / "clients").glob("*.json"))
    for record in json.loads(file.read_text("utf-8"))
]
KINDS = {"int": int, "number": (int, float), "object": dict, "str": str}
TOP_N = 3

each_client = pytest.mark.parametrize("record", RECORDS, ids=lambda each: each["client"])


@pytest.fixture(scope="module")
def port(reranker: Reranker) -> Iterator[int]:
    # LibreChat's model name cannot be set.
    names = ("tiny", "jina-reranker-v2-base-multilingual")
    settings = ServerSettings(engine=TINY, api_key=KEY, served_model=names)
    with listening(create_app(settings, engine=reranker)) as opened:
        yield opened


@pytest.fixture(scope="module")
def wanted(reranker: Reranker) -> Ranking:
    return reranker.rerank(QUERY, DOCUMENTS)


def filled(value: Any, *, key: str = KEY, model: str = "tiny") -> Any:
    """Return what a record sends, with its blanks filled in."""
    whole = {"{query}": QUERY, "{documents}": DOCUMENTS, "{model}": model, "{n}": len(DOCUMENTS)}
    if isinstance(value, dict):
        return {name: filled(each, key=key, model=model) for name, each in value.items()}
    return whole.get(value, value.replace("{key}", key)) if isinstance(value, str) else value


def ask(port: int, record: dict[str, Any], **blanks: str) -> tuple[int, Any]:
    """Return status and answer; header names and values go out as they stand."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    try:
        body = json.dumps(filled(record["body"], **blanks))
        connection.request("POST", record["path"], body, filled(record["headers"], **blanks))
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def read(answer: Any, path: str) -> list[Any]:
    """Return what stands at a path such as `results[].index`; a KeyError where nothing does."""
    found = [answer]
    for name in re.findall(r"\[\]|[^.\[\]]+", path):
        found = [each for part in found for each in (part if name == "[]" else [part[name]])]
    return found


def check_read(answer: Any, record: dict[str, Any]) -> None:
    """Fail where something that the client reads is not there, or of another kind."""
    for entry in record["reads"]:
        path, kind = entry.split(": ")
        values = read(answer, path)
        assert values, entry
        for value in values:
            assert isinstance(value, KINDS[kind]), entry
            assert not isinstance(value, bool), entry


@each_client
def test_what_it_sends_gets_what_it_reads(record, port, wanted):
    status, answer = ask(port, record)
    assert status == 200, answer
    check_read(answer, record)
    rows = answer if isinstance(answer, list) else answer["results"]
    expected = wanted[:TOP_N] if record["results"] == "top_n" else wanted
    assert [row["index"] for row in rows] == [each.index for each in expected]
    scores = [row.get("relevance_score", row.get("score")) for row in rows]
    assert scores == pytest.approx([each.score for each in expected], abs=1e-5)
    for row, each in zip(rows, expected, strict=True):
        assert all(read(row, path) == [each.text] for path in text_paths(record))


def text_paths(record: dict[str, Any]) -> list[str]:
    """Return where a row has its text, if the client reads that."""
    paths = (entry.split(": ")[0].rpartition("[].")[2] for entry in record["reads"])
    return [path for path in paths if path.endswith("text")]


@each_client
def test_a_refusal_says_why_where_it_looks(record, port):
    wrong = [({"key": "wrong"}, 401, "API key")]
    if "{model}" in record["body"].values():
        wrong.append(({"model": "rerank-v9"}, 404, "rerank-v9"))
    for blanks, status, told in wrong:
        found, answer = ask(port, record, **blanks)
        assert found == status
        for name in record["error_reads"] or ["message"]:
            assert isinstance(answer[name], str)
            assert told in answer[name]


@each_client
def test_a_field_that_is_missing_is_found(record, port):
    """The check itself: without any one of the fields that a client reads, it fails."""
    _, answer = ask(port, record)
    for entry in record["reads"]:
        path, name = re.fullmatch(r"(.*?)\.?([^.\[\]]+): \w+", entry).groups()
        without = copy.deepcopy(answer)
        for holder in read(without, path):
            del holder[name]
        with pytest.raises(KeyError):
            check_read(without, record)


@each_client
def test_it_is_on_the_page_of_clients(record):
    page = (ROOT / "docs" / "clients.md").read_text("utf-8")
    assert record["setting"].split(": ")[-1].split("=")[-1] in page
    assert all(source for source in record["source"])


# Whose versions the page names, as their pins do.
REAL_CLIENTS = {
    *("cohere", "langchain-cohere", "cohere-haystack", "jina-haystack", "vllm-haystack"),
    *("huggingface-api-haystack", "litellm", "infinity_client", "xinference-client"),
    *(f"llama-index-postprocessor-{each}-rerank" for each in ("cohere", "jinaai", "tei")),
    *("llama-index-postprocessor-siliconflow-rerank", "pymilvus.model"),
}


def test_the_page_names_the_versions_that_real_clients_are_pinned_to():
    page = (ROOT / "docs" / "clients.md").read_text("utf-8")
    pins = [
        line.split("==")
        for file in (ROOT / "tests" / "clients").glob("requirements-*.txt")
        for line in file.read_text("utf-8").splitlines()
        if "==" in line
    ]
    found = {(name, version) for name, version in pins if name in REAL_CLIENTS}
    assert {name for name, _ in found} == REAL_CLIENTS
    assert [each for each in sorted(found) if each[1] not in page] == []


def test_milvus_own_objects_carry_the_recipe_of_the_page():
    pymilvus = pytest.importorskip("pymilvus")
    page = (ROOT / "docs" / "clients.md").read_text("utf-8")
    [block] = [each for each in re.findall(r"```python\n(.*?)```", page, re.S) if "RERANK" in each]
    made: dict[str, Any] = {}
    exec(block, made)  # noqa: S102 - a block of our own page
    function = made["ranker"]
    assert isinstance(function, pymilvus.Function)
    assert function.type == pymilvus.FunctionType.RERANK
    assert function.input_field_names == ["text"]
    params = function.params
    assert (params["reranker"], params["provider"]) == ("model", "tei")
    assert params["endpoint"].startswith("http://")
    assert params["queries"] == ["Who wrote Faust?"]
