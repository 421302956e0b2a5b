"""The server's answers and refusals, in this process: routes, limits, key, faults, metrics."""

import asyncio
import json
import logging
import pickle
import re
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")

from bge_rerank_adapters import Reranker, SettingsError
from bge_rerank_adapters.engine.text.pairs import TokenPair
from bge_rerank_adapters.serve import ReplicaSettings, ServerSettings, create_app
from bge_rerank_adapters.settings import EngineSettings, setting_names
from tests.texts import DOCUMENTS, QUERY

pytestmark = pytest.mark.timeout(120)

TINY = EngineSettings(model="tiny", device="cpu", dtype="float32")
TOKEN = "hub-sekret"  # noqa: S105
KEY = "sekret-ß-42"
COHERE = ("/v1/rerank", "/v2/rerank")
BODY = {"query": QUERY, "documents": DOCUMENTS}
TEI_BODY = {"query": QUERY, "texts": DOCUMENTS}
WAIT_S = 60


def client_of(engine: Reranker | None, **settings: Any) -> httpx.AsyncClient:
    app = create_app(ServerSettings(engine=TINY, **settings), engine=engine)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server")


@pytest.fixture
async def client(reranker: Reranker) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(reranker) as made:
        yield made


class HeldModel:
    """The engine's model, which waits until it is let go, and then fails if it is told to."""

    def __init__(self, engine: Reranker) -> None:
        self.engine, self.model = engine, engine._core.workers[0].model
        self.device, self.dtype = self.model.device, self.model.dtype
        self.streams, self.pack_tokens = self.model.streams, self.model.pack_tokens
        self.entered, self.gate = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        engine._core.workers[0].model = self

    def logits(self, pairs: Sequence[TokenPair]) -> list[float]:
        self.entered.set()
        assert self.gate.wait(WAIT_S)
        if self.error is not None:
            raise self.error
        return self.model.logits(pairs)


@pytest.fixture(scope="module")
def model() -> Iterator[HeldModel]:
    settings = {"device": "cpu", "dtype": "float32", "pack_tokens": 64, "max_queued_pairs": 8}
    with Reranker("tiny", **settings) as engine:
        yield HeldModel(engine)


@pytest.fixture
def held(model: HeldModel) -> Iterator[HeldModel]:
    model.entered, model.gate, model.error = threading.Event(), threading.Event(), None
    yield model
    model.gate.set()


async def until(condition: Any) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - other threads know of no event
            await asyncio.sleep(0.002)


# What is answered


@pytest.mark.parametrize("path", COHERE)
async def test_ranks_as_the_engine_does(client, reranker, path):
    answer = (await client.post(path, json=BODY | {"model": "tiny"})).json()
    ranking = reranker.rerank(QUERY, DOCUMENTS)
    assert [each["index"] for each in answer["results"]] == [each.index for each in ranking]
    for told, wanted in zip(answer["results"], ranking, strict=True):
        assert told == {
            "index": wanted.index,
            "relevance_score": pytest.approx(wanted.score, abs=1e-5),
        }
    assert answer["model"] == "tiny"
    tokens = ranking.usage.tokens
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert answer["meta"] == {
        "api_version": {"version": path[2]},
        "billed_units": {"search_units": 1},
        "tokens": {"input_tokens": tokens},
    }


@pytest.mark.parametrize("path", COHERE)
async def test_details_are_those_of_the_engine(client, reranker, path):
    texts = [*DOCUMENTS, "long " * 2000]
    body = {"query": QUERY, "documents": texts, "return_details": True, "top_n": 3}
    results = (await client.post(path, json=body)).json()["results"]
    wanted = reranker.rerank(QUERY, texts, top_k=3)
    assert [(each["index"], each["truncated"]) for each in results] == [
        (each.index, each.truncated) for each in wanted
    ]
    assert [each["logit"] for each in results] == pytest.approx(
        [each.logit for each in wanted], abs=1e-5
    )
    assert "span" not in results[0]
    assert "document" not in results[0]


async def test_details_tell_the_window_that_won():
    text = "The sun shines in Weimar. " * 100 + "Goethe wrote Faust."
    with Reranker("tiny", device="cpu", long_documents="window", window_tokens=64) as engine:
        async with client_of(engine) as client:
            body = {"query": "Who wrote Faust?", "documents": [text], "return_details": True}
            [told] = (await client.post("/v2/rerank", json=body)).json()["results"]
    start, end = told["span"]
    assert "Goethe wrote Faust." in text[start:end]
    assert told["truncated"] is False


async def test_documents_come_back_as_they_were_sent(client):
    documents = ["plain", {"text": "object", "id": 7, "score": 0.5, "new": True, "none": None}]
    body = {"query": QUERY, "documents": documents, "return_documents": True}
    results = (await client.post("/v1/rerank", json=body)).json()["results"]
    sent = {each["index"]: each["document"] for each in results}
    assert sent == {0: {"text": "plain"}, 1: documents[1]}


async def test_infinitys_form_has_bare_texts(client):
    """As LiteLLM's provider of that name reads them, and infinity's client reads the object."""
    documents = ["plain", {"text": "object", "id": 7}]
    body = {"query": QUERY, "documents": documents, "return_documents": True}
    answer = (await client.post("/infinity/rerank", json=body)).json()
    assert {each["index"]: each["document"] for each in answer["results"]} == {
        0: "plain",
        1: "object",
    }
    assert answer["object"] == "rerank"
    without = (
        await client.post("/infinity/rerank", json=body | {"return_documents": False})
    ).json()
    assert all("document" not in each for each in without["results"])


async def test_who_needs_a_key_learns_it_without_one(client, reranker):
    """Xinference's clients send none before they are told."""
    assert (await client.get("/v1/cluster/auth")).json() == {"auth": False}
    async with client_of(reranker, api_key=KEY) as locked:
        assert (await locked.get("/v1/cluster/auth")).json() == {"auth": True}
        assert (await locked.get("/v1/models")).status_code == 401


async def test_rank_fields_choose_what_is_scored(client, reranker):
    documents = [{"title": text, "year": 1956, "text": "x"} for text in DOCUMENTS]
    body = {"query": QUERY, "documents": documents, "rank_fields": ["title", "year", "absent"]}
    results = (await client.post("/v1/rerank", json=body | {"return_details": True})).json()
    wanted = reranker.rerank(QUERY, [f"{text}\n1956" for text in DOCUMENTS])
    assert [each["index"] for each in results["results"]] == [each.index for each in wanted]
    assert [each["logit"] for each in results["results"]] == pytest.approx(
        [each.logit for each in wanted], abs=1e-5
    )


async def test_answers_have_ids_of_their_own(client):
    ids = {(await client.post("/v2/rerank", json=BODY)).json()["id"] for _ in range(3)}
    assert len(ids) == 3


@pytest.mark.parametrize("top_n", [1, 2, 4.0, 10**30, None])
async def test_top_n_bounds_the_results(client, top_n):
    results = (await client.post("/v2/rerank", json=BODY | {"top_n": top_n})).json()["results"]
    assert len(results) == int(min(top_n or 4, 4))


async def test_no_documents_give_no_results(client):
    answer = await client.post("/v2/rerank", json={"query": QUERY, "documents": []})
    assert (answer.status_code, answer.json()["results"]) == (200, [])


async def test_limits_that_the_engine_keeps_anyway_are_accepted(client):
    body = BODY | {"max_tokens_per_doc": 4096, "max_chunks_per_doc": 10, "rank_fields": None}
    assert (await client.post("/v1/rerank", json=body)).status_code == 200


async def test_texts_that_are_no_text_are_scored(client, reranker):
    texts = b'["\\udfff", "\\ud83d\\ude00", ""]'
    body = b'{"query": "a\\ud800", "documents": %s, "return_documents": true}' % texts
    answer = await client.post("/v1/rerank", content=body, headers=JSON)
    documents = {each["index"]: each["document"]["text"] for each in answer.json()["results"]}
    assert documents == {0: "\udfff", 1: "\U0001f600", 2: ""}
    scores = {each["index"]: each["relevance_score"] for each in answer.json()["results"]}
    wanted = reranker.score("a\ud800", ["\udfff", "\U0001f600", ""])
    assert [scores[index] for index in range(3)] == pytest.approx(wanted, abs=1e-5)


async def test_ranks_texts_as_text_embeddings_inference_does(client, reranker):
    ranks = (await client.post("/rerank", json=TEI_BODY)).json()
    wanted = reranker.rerank(QUERY, DOCUMENTS)
    assert [set(each) for each in ranks] == [{"index", "score"}] * 4
    assert [each["index"] for each in ranks] == [each.index for each in wanted]
    assert [each["score"] for each in ranks] == pytest.approx(
        [each.score for each in wanted], abs=1e-5
    )
    options = {"raw_scores": True, "return_text": True, "truncation_direction": "Right"}
    ranks = (await client.post("/rerank", json=TEI_BODY | options)).json()
    assert [each["score"] for each in ranks] == pytest.approx(
        [each.logit for each in wanted], abs=1e-5
    )
    assert [each["text"] for each in ranks] == [each.text for each in wanted]


async def test_texts_that_are_too_long_are_cut_or_refused_as_asked(client):
    body = {"query": QUERY, "texts": ["short", "long " * 2000]}
    for truncate in ({}, {"truncate": True}, {"truncate": None}):
        assert (await client.post("/rerank", json=body | truncate)).status_code == 200
    refused = await client.post("/rerank", json=body | {"truncate": False})
    assert refused.status_code == 413
    message = (
        "These texts are longer than the model reads: 1; send them in parts, or with truncate: "
        "true."
    )
    assert refused.json() == {
        "error": message,
        "message": message,
        "detail": message,
        "error_type": "Validation",
    }


async def test_says_what_it_is(client):
    info = (await client.get("/info")).json()
    assert info["server"] == "bge_rerank_adapters"
    assert (info["model_id"], info["model_dtype"]) == ("tiny", "float32")
    assert (info["max_client_batch_size"], info["max_input_length"]) == (1000, 512)
    models = (await client.get("/v1/models")).json()
    assert [each["id"] for each in models["data"]] == ["tiny"]
    assert (await client.get("/health")).json() == {"status": "ok"}
    assert (await client.head("/health")).status_code == 200
    paths = (await client.get("/openapi.json")).json()["paths"]
    read = {"/health", "/metrics", "/info", "/v1/models", "/v1/models/{model}", "/v1/cluster/auth"}
    assert set(paths) == {*COHERE, "/rerank", "/infinity/rerank", *read}


async def test_a_name_of_its_own_and_the_models_are_both_served(reranker):
    async with client_of(reranker, served_model="my-reranker") as client:
        for name in ("my-reranker", "tiny", None):
            answer = await client.post("/v2/rerank", json=BODY | {"model": name})
            assert answer.json()["model"] == "my-reranker"
        refused = await client.post("/v2/rerank", json=BODY | {"model": "rerank-v3.5"})
    assert refused.status_code == 404
    assert refused.json()["message"] == (
        "The model 'rerank-v3.5' is not served here; served is 'my-reranker'. Send that, or start "
        "the server with BGE_RERANK_SERVED_MODEL=my-reranker,rerank-v3.5 so that it goes by both "
        "names, or with * among them to let requests name any."
    )


def test_a_folders_path_is_not_told():
    for model, name in (("/srv/models/mine", "mine"), ("./mine", "mine"), ("a/b", "a/b")):
        assert ServerSettings(engine=EngineSettings(model=model)).model_name == name


# What is refused

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/rerank", b"", 422, "Field required"),
        ("/v1/rerank", b"{", 400, "not JSON"),
        ("/v1/rerank", b"\xff\xfe{\x00}\x00", 400, "UTF-8; byte 0"),
        ("/v1/rerank", b'"text"', 422, "must be a JSON object"),
        ("/v1/rerank", b'{"query": NaN, "documents": []}', 400, "NaN is not JSON"),
        ("/v1/rerank", b'{"query": "", "documents": [-Infinity]}', 400, "-Infinity is not JSON"),
        ("/v1/rerank", b"[" * 60_000, 400, "nested too deeply"),
        ("/v1/rerank", b'{"a":' * 10_000, 400, "nested too deeply"),
        ("/v1/rerank", b'{"query": ' + b"9" * 5000 + b"}", 400, "too many digits"),
        ("/v1/rerank", b'{"query": "a", "query": "b", "documents": []}', 400, "twice"),
        ("/v1/rerank", b'{"query": "a"}', 422, "documents: Field required"),
        ("/v1/rerank", b'{"query": 1, "documents": []}', 422, "query: must be a string"),
        ("/v1/rerank", b'{"query": "", "documents": "a"}', 422, "must be a list of strings"),
        ("/v1/rerank", b'{"query": "", "documents": ["", 1]}', 422, "[1] must be a string, or"),
        ("/v1/rerank", b'{"query": "", "documents": [{}]}', 422, "documents[0] has no 'text'"),
        ("/v1/rerank", b'{"query": "", "documents": [{"text": 1}]}', 422, "'text' must be a str"),
        ("/v1/rerank", b'{"query": "", "documents": [{"text": null}]}', 422, "has no 'text'"),
        ("/v1/rerank", b'{"query": "", "documents": [{"text": [1]}]}', 422, "not a list"),
        ("/v1/rerank", b'{"query": "", "documents": [{"x": [1e999]}]}', 422, "finite numbers"),
        ("/v1/rerank", b'{"query": "", "documents": [], "rank_fields": []}', 422, "name a field"),
        ("/v1/rerank", b'{"query": "", "documents": [], "top_n": 0}', 422, "top_n: "),
        ("/v1/rerank", b'{"query": "", "documents": [], "top_n": -1}', 422, "top_n: "),
        ("/v1/rerank", b'{"query": "", "documents": [], "top_n": "3 or so"}', 422, "top_n: "),
        ("/v1/rerank", b'{"query": "", "documents": [], "top_n": true}', 422, "top_n: "),
        ("/v1/rerank", b'{"query": "", "documents": [], "top_n": 1.5}', 422, "a whole number"),
        ("/v1/rerank", b'{"query": "", "documents": [], "top_n": 1e999}', 422, "a whole number"),
        ("/v1/rerank", b'{"query": "", "documents": [], "top_k": 0}', 422, "top_k: must be"),
        ("/v1/rerank", b'{"query": "", "documents": [], "score_threshold": 2}', 422, "from 0 to 1"),
        ("/v1/rerank", b'{"query": "", "documents": [], "raw_scores": 2}', 422, "true or false"),
        ("/v2/rerank", b'{"query": "", "documents": [], "max_tokens_per_doc": -2}', 422, "tokens"),
        ("/rerank", b'{"query": ""}', 422, "documents: Field required"),
        ("/rerank", b'{"query": "", "documents": [], "texts": [""]}', 422, "not both"),
        ("/rerank", b'{"query": "", "texts": [1]}', 422, "texts: [0] must be a string"),
        ("/rerank", b'{"query": "", "texts": []}', 400, "`texts` cannot be empty"),
        ("/rerank", b'{"query": "", "texts": [""], "truncate": []}', 422, "truncate: "),
        (
            "/rerank",
            b'{"query": "", "texts": [""], "truncation_direction": "Up"}',
            422,
            "must be Left or Right",
        ),
    ],
)
async def test_bad_bodies_are_refused_with_a_reason(client, path, body, status, message):
    answer = await client.post(path, content=body, headers=JSON)
    names = {"message", "detail", "error_type"} | ({"error"} if path == "/rerank" else set())
    assert (answer.status_code, set(answer.json())) == (status, names)
    for name in names - {"error_type"}:
        assert message in answer.json()[name]


async def test_names_without_end_are_refused(client):
    many = json.dumps({f"n{number}": 1 for number in range(101)} | {"text": "a"})
    body = f'{{"query": "", "documents": [{many}]}}'
    answer = await client.post("/v1/rerank", content=body, headers=JSON)
    assert answer.status_code == 400
    assert "more than 100 names" in answer.json()["message"]
    body = {"query": "", "documents": [{"a": "x"}], "rank_fields": ["a"] * 101}
    answer = await client.post("/v1/rerank", json=body)
    assert answer.status_code == 422
    assert "at most 100 fields" in answer.json()["message"]
    body = {"query": "", "documents": [{"a": "x"}], "rank_fields": ["b" * 100_000] * 9}
    assert len((await client.post("/v1/rerank", json=body)).content) < 1000


async def test_a_field_that_is_named_twice_counts_once(client, reranker):
    body = {"query": QUERY, "documents": [{"a": "x"}], "rank_fields": ["a"] * 9}
    [told] = (await client.post("/v1/rerank", json=body)).json()["results"]
    assert told["relevance_score"] == pytest.approx(reranker.score(QUERY, ["x"])[0], abs=1e-5)


async def test_many_mistakes_are_told_in_few_words(client):
    documents = json.dumps([1] * 900)
    extra = ", ".join(f'"{"x" * 500}{number}": 1' for number in range(90))
    body = f'{{"query": 1, "documents": {documents}, "top_n": 0, "model": 1, {extra}}}'
    answer = await client.post("/v1/rerank", content=body, headers=JSON)
    assert answer.status_code == 422
    assert "and 1 more" in answer.json()["message"]
    assert len(answer.content) < 1000


async def test_a_large_body_is_refused_declared_or_not(reranker):
    body = json.dumps(BODY).encode()

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 10):
            yield body[start : start + 10]

    async with client_of(reranker, max_body_bytes=len(body)) as client:
        assert (await client.post("/v2/rerank", content=body, headers=JSON)).status_code == 200
        chunked = await client.post("/v2/rerank", content=chunks(), headers=JSON)
        assert chunked.status_code == 200
    async with client_of(reranker, max_body_bytes=len(body) - 1) as client:
        for content in (body, chunks()):
            refused = await client.post("/v2/rerank", content=content, headers=JSON)
            assert refused.status_code == 413
            assert f"larger than the {len(body) - 1} bytes" in refused.json()["message"]


@pytest.mark.parametrize("declared", ["-1", "1e3", "٣", "9" * 5000])
async def test_a_length_that_is_none_is_refused(client, declared):
    headers = JSON | {"Content-Length": declared.encode()}
    answer = await client.post("/v2/rerank", content=b"{}", headers=headers)
    assert answer.status_code in (400, 413)


async def test_too_many_documents_are_refused(reranker):
    async with client_of(reranker, max_documents=3) as client:
        refused = await client.post("/v2/rerank", json=BODY)
        assert refused.status_code == 413
        assert "There are 4 documents, and this server takes at most 3" in refused.text
        refused = await client.post("/rerank", json=TEI_BODY)
        assert refused.status_code == 413
        assert "There are 4 texts" in refused.json()["error"]


@pytest.mark.parametrize("part", ["[]", "{}", '{"a": [', "1", '"\\"", 1', '"', '"\\'])
async def test_bodies_of_far_too_many_parts_are_refused_unread(client, part):
    body = '{"query": "[[{,", "documents": [' + ", ".join([part] * 150_000)
    answer = await client.post("/v2/rerank", content=body.encode(), headers=JSON)
    assert answer.status_code == (400 if part == '"' or part == '"\\' else 413)
    assert ("far more parts" in answer.text) == (answer.status_code == 413)


async def test_texts_of_too_many_characters_are_refused(reranker):
    async with client_of(reranker, max_characters=100) as client:
        body = {"query": "q", "documents": ["a" * 100, "a" * 101]}
        refused = await client.post("/v2/rerank", json=body)
        assert refused.status_code == 413
        assert "Text 1 has 101 characters, at most 100" in refused.json()["message"]
        body = {"query": "q" * 101, "documents": ["a"]}
        refused = await client.post("/v2/rerank", json=body)
        assert refused.status_code == 413
        assert "The query has 101 characters" in refused.json()["message"]


async def test_a_slow_body_is_refused(reranker):
    async def chunks() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(WAIT_S)

    async with client_of(reranker, body_timeout_s=0.05) as client:
        refused = await client.post("/v2/rerank", content=chunks(), headers=JSON)
    assert refused.status_code == 408
    assert refused.headers["connection"] == "close"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/rerank", 405),
        ("OPTIONS", "/v2/rerank", 405),
        ("HEAD", "/rerank", 405),
        ("POST", "/health", 405),
        ("POST", "/v1/rerank//", 404),
        ("GET", "/v3/rerank", 404),
        ("GET", "/%00", 404),
    ],
)
async def test_other_methods_and_paths_are_refused_in_json(client, method, path, status):
    answer = await client.request(method, path)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert status == 404 or answer.headers["allow"]
    if method != "HEAD":
        wanted = (
            "GET /docs shows those" if status == 404 else f"takes {answer.headers['allow']}, not"
        )
        assert wanted in answer.json()["message"]


# The key


@pytest.mark.parametrize("path", [*COHERE, "/rerank", "/metrics", "/info", "/v1/models", "/other"])
async def test_all_but_health_needs_the_key(reranker, path):
    method = "POST" if path.endswith("rerank") else "GET"
    async with client_of(reranker, api_key=KEY) as client:
        for header in (
            None,
            "",
            "Bearer",
            "Bearer ",
            f"Basic {KEY}",
            KEY,
            f"Bearer {KEY}x",
            f"Bearer {KEY[:-1]}",
            f"Bearer {KEY} {KEY}",
            "Bearer \u20ac\U0001f511",
        ):
            headers = {} if header is None else {"Authorization": header.encode()}
            answer = await client.request(method, path, headers=headers)
            assert answer.status_code == 401, header
            assert answer.headers["www-authenticate"] == "Bearer"
            assert KEY not in answer.text
        twice = [("Authorization", f"Bearer {KEY}".encode()), ("Authorization", b"Bearer x")]
        assert (await client.request(method, path, headers=twice)).status_code == 401
        headers = {"Authorization": f"bearer  {KEY}".encode()}
        assert (await client.request(method, path, headers=headers)).status_code != 401
        assert (await client.get("/health")).status_code == 200


async def test_the_key_is_asked_for_before_the_body_is_read(reranker):
    async def chunks() -> AsyncIterator[bytes]:
        raise AssertionError("was read")
        yield b""

    async with client_of(reranker, api_key=KEY) as client:
        answer = await client.post("/v2/rerank", content=chunks(), headers=JSON)
    assert answer.status_code == 401


async def test_the_key_is_nowhere_to_be_seen(reranker, caplog):
    settings = ServerSettings(engine=replace(TINY, token=TOKEN), api_key=KEY)
    with caplog.at_level(logging.DEBUG):
        app = create_app(settings, engine=reranker)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            headers = {"Authorization": f"Bearer {KEY}".encode()}
            shown = (await client.get("/metrics", headers=headers)).text
            shown += (await client.get("/info", headers=headers)).text
            shown += (await client.get("/openapi.json")).text
            await client.get("/info", headers={"Authorization": b"Bearer x"})
    shown += repr(settings) + repr(vars(app.state)) + caplog.text
    assert KEY not in shown
    assert TOKEN not in shown
    for secret in (KEY, TOKEN):
        assert secret.encode() not in pickle.dumps(settings)


def test_unpickled_settings_need_their_key_again():
    settings = pickle.loads(pickle.dumps(ServerSettings(engine=TINY, api_key=KEY)))  # noqa: S301
    with pytest.raises(SettingsError, match="had an api_key, which was left out"):
        create_app(settings)
    with pytest.raises(SettingsError, match="BGE_RERANK_API_KEY is not set where it starts"):
        settings.with_secrets({})
    # Left out once more, it is still missed.
    again = pickle.loads(pickle.dumps(settings))  # noqa: S301
    with pytest.raises(SettingsError, match="API_KEY is not set"):
        again.with_secrets({})
    whole = settings.with_secrets({"BGE_RERANK_API_KEY": KEY, "BGE_RERANK_TOKEN": "t"})
    assert (whole.api_key, whole.engine.token) == (KEY, "t")
    assert create_app(whole)
    plain = pickle.loads(pickle.dumps(ServerSettings(engine=TINY)))  # noqa: S301
    assert plain == ServerSettings(engine=TINY)
    assert plain.with_secrets({}) == plain


# Load and faults


async def test_more_requests_than_allowed_at_a_time_are_told_to_come_again(held):
    async with client_of(held.engine, max_concurrent_requests=1) as client:
        first = asyncio.create_task(client.post("/v2/rerank", json=BODY))
        await until(held.entered.is_set)
        refused = await client.post("/v2/rerank", json=BODY)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error_type"] == "Overloaded"
        assert (await client.get("/health")).status_code == 200, "not of the scoring ones"
        held.gate.set()
        assert (await first).status_code == 200
        assert (await client.post("/v2/rerank", json=BODY)).status_code == 200


async def test_an_overloaded_engine_asks_to_come_again(held):
    async with client_of(held.engine) as client:
        first = asyncio.create_task(client.post("/v2/rerank", json=BODY))
        await until(held.entered.is_set)
        waiting = asyncio.create_task(client.post("/v2/rerank", json=BODY))
        await until(lambda: held.engine.stats().queued_pairs >= 4)
        many = {"query": QUERY, "documents": [*DOCUMENTS, "a", "b"]}
        refused = await client.post("/v2/rerank", json=many)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        refused = await client.post("/rerank", json={"query": "", "texts": many["documents"]})
        assert refused.status_code == 429
        assert refused.json()["error_type"] == "Overloaded"
        assert "pairs wait already" in refused.json()["error"]
        held.gate.set()
        assert {(await first).status_code, (await waiting).status_code} == {200}


async def test_scoring_that_takes_too_long_is_given_up(held):
    async with client_of(held.engine, timeout_s=0.05) as client:
        answer = await client.post("/v2/rerank", json=BODY)
        assert answer.status_code == 504
        assert answer.json()["error_type"] == "Timeout"
    await until(lambda: held.engine.stats().queued_pairs == 0)


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [(ValueError("at /srv/secret.py"), 500, "Backend"), (SystemExit("gone"), 503, "Unhealthy")],
    ids=["model", "thread"],
)
async def test_a_fault_is_told_without_its_inside(held, error, status, kind, caplog):
    held.error = error
    held.gate.set()
    async with client_of(held.engine) as client:
        answer = await client.post("/v2/rerank", json=BODY)
        assert (answer.status_code, answer.json()["error_type"]) == (status, kind)
        assert str(error) not in answer.text
        assert "Traceback" not in answer.text
        assert str(error) in caplog.text
        held.error = None
        assert (await client.post("/v2/rerank", json=BODY)).status_code == 200


async def test_what_nobody_foresaw_is_told_without_its_inside(reranker, monkeypatch, caplog):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("at /srv/secret.py")

    monkeypatch.setattr("bge_rerank_adapters.serve.schemas.requests.RerankRequest.texts", fail)
    async with client_of(reranker) as client:
        answer = await client.post("/v2/rerank", json=BODY)
        other = await client.post("/rerank", json=TEI_BODY)
    assert (answer.status_code, other.status_code) == (500, 200)
    assert "secret" not in answer.text
    assert "at /srv/secret.py" in caplog.text


async def test_a_closed_engine_is_unavailable():
    engine = Reranker("tiny", device="cpu", dtype="float32")
    engine.close()
    async with client_of(engine) as client:
        for answer in (
            await client.get("/health"),
            await client.post("/v2/rerank", json=BODY),
            await client.post("/rerank", json=TEI_BODY),
        ):
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        metrics = await client.get("/metrics")
        assert metrics.status_code == 200


async def test_closing_tells_those_who_wait():
    engine = Reranker("tiny", device="cpu", dtype="float32")
    model = HeldModel(engine)
    async with client_of(engine) as client:
        call = asyncio.create_task(client.post("/v2/rerank", json=BODY))
        await until(model.entered.is_set)
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        assert (await call).status_code == 503
        model.gate.set()
        await closing


async def ask(app: Any, body: bytes, *messages: dict[str, Any], gone: asyncio.Event) -> list[Any]:
    """Call an app as a server does whose client leaves when `gone` is set."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v2/rerank",
        "raw_path": b"/v2/rerank",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    coming = [{"type": "http.request", "body": body, "more_body": False}, *messages]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if coming:
            return coming.pop(0)
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


async def test_a_client_that_leaves_takes_its_pairs_along(held):
    app = create_app(ServerSettings(engine=TINY), engine=held.engine)
    gone, stays = asyncio.Event(), asyncio.Event()
    first = asyncio.create_task(ask(app, json.dumps(BODY).encode(), gone=stays))
    await until(held.entered.is_set)
    call = asyncio.create_task(ask(app, json.dumps(BODY).encode(), gone=gone))
    await until(lambda: held.engine.stats().queued_pairs >= 4)
    before = held.engine.stats().queued_pairs
    gone.set()
    await call
    assert held.engine.stats().queued_pairs == before - 4
    held.gate.set()
    assert (await first)[0]["status"] == 200
    assert 'route="/v2/rerank",status="499"' in app.state.metrics.text().decode()


async def test_a_cancelled_request_takes_its_pairs_along(held):
    app = create_app(ServerSettings(engine=TINY), engine=held.engine)
    call = asyncio.create_task(ask(app, json.dumps(BODY).encode(), gone=asyncio.Event()))
    await until(held.entered.is_set)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert held.engine.stats().queued_pairs == 0


async def test_a_client_that_leaves_while_it_sends_is_forgotten(reranker):
    app = create_app(ServerSettings(engine=TINY), engine=reranker)
    before = reranker.stats().requests
    left = {"type": "http.disconnect"}
    coming = [{"type": "http.request", "body": b"{", "more_body": True}, left]

    async def send(message: dict[str, Any]) -> None: ...

    async def receive() -> dict[str, Any]:
        return coming.pop(0) if len(coming) > 1 else left

    scope = {"type": "http", "method": "POST", "path": "/v2/rerank", "query_string": b""}
    scope |= {"root_path": "", "headers": [(b"content-type", b"application/json")]}
    await app(scope, receive, send)
    assert reranker.stats().requests == before


# The life of the app


async def test_the_app_loads_its_engine_and_closes_it():
    app = create_app(ServerSettings(engine=TINY))
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        answer = await client.get("/health")
        assert (answer.status_code, answer.json()["error_type"]) == (503, "Unhealthy")
        assert (await client.post("/v2/rerank", json=BODY)).status_code == 503
        assert "bge_rerank_engine" not in (await client.get("/metrics")).text
        async with app.router.lifespan_context(app):
            assert (await client.get("/health")).status_code == 200
            assert (await client.post("/v2/rerank", json=BODY)).status_code == 200
            engine = app.state.service.loaded
        assert engine.closed
        assert (await client.get("/health")).status_code == 503


async def test_a_given_engine_stays_open(reranker):
    app = create_app(ServerSettings(engine=TINY), engine=reranker)
    async with app.router.lifespan_context(app):
        pass
    assert not reranker.closed


# Metrics


def numbers(text: str) -> dict[str, float]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


async def test_metrics_are_those_of_the_engine_and_of_the_requests(client, reranker):
    await client.post("/v2/rerank", json=BODY)
    await client.post("/v2/rerank", json=BODY)
    await client.post("/v1/rerank", content=b"{", headers=JSON)
    await client.get("/where/is/it")
    answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = numbers(answer.text)
    seconds = "bge_rerank_http_request_seconds_count"
    assert found[f'{seconds}{{route="/v2/rerank",status="200"}}'] == 2
    assert found[f'{seconds}{{route="/v1/rerank",status="400"}}'] == 1
    assert found[f'{seconds}{{route="other",status="404"}}'] == 1
    assert "/where/is/it" not in answer.text
    assert found["bge_rerank_http_requests_in_progress"] == 1
    stats = reranker.stats()
    assert found["bge_rerank_engine_requests_total"] == stats.requests
    assert found["bge_rerank_engine_pairs_total"] == stats.pairs
    assert found["bge_rerank_engine_tokens_total"] == stats.tokens
    assert found["bge_rerank_engine_scoring_seconds_total"] == pytest.approx(stats.scoring_s)
    assert found["bge_rerank_engine_queued_pairs"] == 0
    assert 0 < found["bge_rerank_engine_pack_fill"] <= 1
    [about] = [name for name in found if name.startswith("bge_rerank_engine_info{")]
    assert 'model="tiny"' in about


def test_every_count_of_the_engine_is_a_metric(reranker):
    app = create_app(ServerSettings(engine=TINY), engine=reranker)
    text = app.state.metrics.text().decode()
    for name in reranker.stats().to_dict():
        told = name.replace("_s", "_seconds") if name.endswith("_s") else name
        assert f"bge_rerank_engine_{told}" in text


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_documents": 0}, "max_documents must be a whole number of at least 1, got 0"),
        ({"max_body_bytes": True}, "max_body_bytes must be a whole number"),
        ({"timeout_s": 0}, "timeout_s must be a number of seconds above 0, got 0"),
        ({"timeout_s": float("nan")}, "timeout_s must be a number"),
        ({"body_timeout_s": "3"}, "body_timeout_s must be a number of seconds above 0, got '3'"),
        ({"served_model": " "}, "served_model must be a non-empty str"),
        ({"engine": "tiny"}, "engine must be an EngineSettings, got str"),
        ({"api_key": ""}, "api_key must be one or more characters without spaces"),
        ({"api_key": "secret\n"}, "not shown, since it is a secret"),
        ({"api_key": b"secret"}, "api_key must be a str or None, got a bytes"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(SettingsError, match=re.escape(message)) as raised:
        ServerSettings(**settings)
    assert "secret\n" not in str(raised.value)


def test_the_environment_sets_everything():
    environment = {
        "BGE_RERANK_MODEL": "tiny",
        "BGE_RERANK_DEVICE": "cpu, cuda:1",
        "BGE_RERANK_DTYPE": "float32",
        "BGE_RERANK_MAX_LENGTH": "256",
        "BGE_RERANK_LOCAL_FILES_ONLY": "true",
        "BGE_RERANK_PACK_TOKENS": "auto",
        "BGE_RERANK_SERVED_MODEL": "mine",
        "BGE_RERANK_API_KEY": KEY,
        "BGE_RERANK_MAX_BODY_BYTES": "1000",
        "BGE_RERANK_MAX_DOCUMENTS": "5",
        "BGE_RERANK_MAX_CHARACTERS": "7",
        "BGE_RERANK_TIMEOUT_S": "1.5",
        "BGE_RERANK_BODY_TIMEOUT_S": "2",
        "BGE_RERANK_MAX_CONCURRENT_REQUESTS": "3",
        "BGE_RERANK_MAX_REPLICAS": "9",
        "OTHER": "x",
    }
    assert ServerSettings.from_environment(environment) == ServerSettings(
        engine=EngineSettings(
            model="tiny",
            device=("cpu", "cuda:1"),
            dtype="float32",
            max_length=256,
            local_files_only=True,
        ),
        served_model="mine",
        api_key=KEY,
        max_body_bytes=1000,
        max_documents=5,
        max_characters=7,
        timeout_s=1.5,
        body_timeout_s=2.0,
        max_concurrent_requests=3,
    )
    assert ReplicaSettings.from_environment(environment) == ReplicaSettings(max_replicas=9)
    given = {"model": "other", "max_documents": 6}
    settings = ServerSettings.from_environment(environment, given=given)
    assert (settings.engine.model, settings.max_documents) == ("other", 6)
    assert ServerSettings.from_environment({}) == ServerSettings()


@pytest.mark.parametrize("name", sorted({*setting_names(), "api_key", "max_documents"}))
def test_every_setting_has_its_variable(name):
    variable = f"BGE_RERANK_{name.upper()}"
    with suppress(SettingsError):
        ServerSettings.from_environment({variable: "???"})
    with pytest.raises(SettingsError, match=f"^{variable}S is not a setting; .*{variable}[,.]"):
        ServerSettings.from_environment({variable: "???", f"{variable}S": "1"})


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"BGE_RERANK_APIKEY": "s"},
            "BGE_RERANK_APIKEY is not a setting; did you mean BGE_RERANK_API_KEY? Known are BGE_R",
        ),
        ({"BGE_RERANK_MODLE": "tiny"}, "did you mean BGE_RERANK_MODEL?"),
        ({"BGE_RERANK_API_KEY": ""}, "api_key must be one or more characters"),
        ({"BGE_RERANK_MAX_DOCUMENTS": "many"}, "MAX_DOCUMENTS must be a whole number, got 'many'"),
        ({"BGE_RERANK_TIMEOUT_S": "1m"}, "BGE_RERANK_TIMEOUT_S must be a number, got '1m'"),
        ({"BGE_RERANK_LOCAL_FILES_ONLY": "on"}, "must be true or false, got 'on'"),
        ({"BGE_RERANK_MODEL": ""}, "model must be a non-empty str"),
    ],
)
def test_a_bad_environment_is_refused(environment, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        ServerSettings.from_environment(environment)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_replicas": 0}, "min_replicas must be a whole number of at least 1"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas (2) must be at least min_replicas"),
        ({"num_gpus": -1}, "num_gpus must be a number of at least 0, got -1"),
        ({"target_ongoing_requests": 0}, "target_ongoing_requests must be a number of requests"),
    ],
)
def test_bad_replicas_are_refused(settings, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        ReplicaSettings(**settings)


def test_app_is_made_of_the_environment_once(monkeypatch):
    from bge_rerank_adapters import serve

    monkeypatch.setenv("BGE_RERANK_MODEL", "tiny")
    monkeypatch.setenv("BGE_RERANK_MAX_DOCUMENTS", "17")
    try:
        assert serve.app is serve.app
        assert serve.app.state.settings.max_documents == 17
    finally:
        vars(serve).pop("app", None)
    with pytest.raises(AttributeError, match="has no attribute 'apps'"):
        serve.apps  # noqa: B018
    assert dir(serve) == sorted(serve.__all__)
