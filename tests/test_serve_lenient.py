"""What clients of other servers send is taken as they mean it, and answered as they read it."""

import gzip
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")

from bge_rerank_adapters import Reranker, SettingsError
from bge_rerank_adapters.remote.apis import APIS
from bge_rerank_adapters.serve import ServerSettings
from bge_rerank_adapters.settings.token_limits import TokenLimits
from tests.test_serve import BODY, KEY, TEI_BODY, TINY, client_of, numbers
from tests.texts import DOCUMENTS, QUERY

pytestmark = pytest.mark.timeout(120)

ROUTES = ("/v1/rerank", "/v2/rerank", "/rerank")
LONG = "long " * 2000


@pytest.fixture
async def client(reranker: Reranker) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(reranker) as made:
        yield made


# Fields


async def test_fields_that_mean_nothing_here_are_ignored_counted_and_logged_once(client, caplog):
    extra = {"return_len": None, "kwargs": "{}", "priority": 0, "overlap_tokens": 80, "user": {}}
    for path, body in (("/v1/rerank", BODY), ("/v2/rerank", BODY), ("/rerank", TEI_BODY)):
        assert (await client.post(path, json=body | extra)).status_code == 200
    found = numbers((await client.get("/metrics")).text)
    for name in extra:
        assert found[f'bge_rerank_http_ignored_fields_total{{field="{name}"}}'] == 3
        assert caplog.text.count(f"a field {name}, ") == 1
    assert "BGE_RERANK_STRICT=1" in caplog.text


async def test_names_of_ignored_fields_do_not_fill_the_memory(client, caplog):
    with caplog.at_level(logging.CRITICAL):
        for start in range(0, 240, 80):
            extra = {f"x\n{number}\u20ac" + "y" * 1000: 1 for number in range(start, start + 80)}
            content = json.dumps(BODY | extra).encode()
            assert (await client.post("/v2/rerank", content=content)).status_code == 200
    text = (await client.get("/metrics")).text
    named = {name: value for name, value in numbers(text).items() if "ignored_fields_total" in name}
    assert len(named) == 101
    assert named['bge_rerank_http_ignored_fields_total{field="other"}'] == 140
    assert max(map(len, named)) < 200


async def test_a_strict_server_refuses_them(reranker):
    async with client_of(reranker, strict=True) as client:
        refused = await client.post("/v1/rerank", json=BODY | {"top_m": 3, "a": 1, "b": 1, "c": 1})
        assert refused.status_code == 422
        assert refused.json()["message"] == (
            "top_m: is no field of this route; a: is no field of this route; b: is no field of "
            "this route; and 1 more; see /docs for those that are."
        )
        assert (await client.post("/v1/rerank", json=BODY | {"top_n": 3})).status_code == 200
        refused = await client.post("/rerank", json=TEI_BODY | {"x" * 500: 3})
        assert refused.status_code == 422
        assert len(refused.content) < 1500


@pytest.mark.parametrize(
    ("sent", "plain"),
    [
        ({"return_documents": "true", "top_n": "2"}, {"return_documents": True, "top_n": 2}),
        ({"return_documents": "False"}, {}),
        ({"return_documents": 1, "top_n": "3.0"}, {"return_documents": True, "top_n": 3}),
        ({"return_documents": None, "top_n": None, "score_threshold": None}, {}),
        (
            {"return_details": "yes", "score_threshold": "0.5"},
            {"return_details": True} | {"score_threshold": 0.5},
        ),
        ({"top_k": 2}, {"top_n": 2}),
        ({"model": "", "rank_fields": None, "truncation_direction": None}, {}),
        ({"raw_scores": "1"}, {"raw_scores": True}),
        ({"use_activation": "no"}, {"raw_scores": True}),
        ({"max_tokens_per_doc": -1, "max_tokens_per_query": 0, "truncate_prompt_tokens": "-1"}, {}),
        ({"max_tokens_per_doc": 4096, "max_chunks_per_doc": 1024}, {}),
    ],
    ids=str,
)
async def test_known_fields_are_read_as_they_are_meant(client, sent, plain):
    lenient = (await client.post("/v1/rerank", json=BODY | sent)).json()
    wanted = (await client.post("/v1/rerank", json=BODY | plain)).json()
    assert lenient["results"] == wanted["results"]


async def test_nested_values_of_documents_come_back(client):
    documents = [
        {"text": text, "meta": {"tags": ["a", {"b": None}], "n": 1.5}} for text in DOCUMENTS
    ]
    body = {"query": QUERY, "documents": documents, "return_documents": True}
    results = (await client.post("/v1/rerank", json=body)).json()["results"]
    assert [each["document"] for each in results] == [documents[each["index"]] for each in results]
    deep: Any = 1
    for _ in range(200):
        deep = [deep]
    body = {"query": QUERY, "documents": [{"text": "a", "x": deep}], "return_documents": True}
    refused = await client.post("/v1/rerank", json=body)
    assert refused.status_code == 422
    assert "nested at most 32 deep" in refused.json()["message"]


@pytest.mark.parametrize("path", ROUTES)
async def test_a_threshold_is_applied_before_the_number_of_results(client, reranker, path):
    scores = sorted(reranker.score(QUERY, DOCUMENTS), reverse=True)
    threshold = (scores[1] + scores[2]) / 2
    body = TEI_BODY if path == "/rerank" else BODY
    for top_n, wanted in ((None, 2), (1, 1), (3, 2)):
        fields = {"score_threshold": threshold, "top_n": top_n, "raw_scores": True}
        answer = (await client.post(path, json=body | fields)).json()
        assert len(answer if path == "/rerank" else answer["results"]) == wanted


@pytest.mark.parametrize("fields", [{"raw_scores": True}, {"use_activation": False}])
@pytest.mark.parametrize("path", ROUTES)
async def test_scores_are_logits_where_asked_for(client, reranker, path, fields):
    answer = (await client.post(path, json=BODY | fields)).json()
    wanted = [each.logit for each in reranker.rerank(QUERY, DOCUMENTS)]
    told = [each["relevance_score"] for each in answer["results"]]
    assert told == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("name", ["truncation_direction", "truncation_side"])
async def test_cutting_at_the_left_is_refused_where_it_would_cut(client, name):
    body = BODY | {name: "Left"}
    assert (await client.post("/v1/rerank", json=body)).status_code == 200
    body["documents"] = [*DOCUMENTS, LONG]
    refused = await client.post("/v1/rerank", json=body | {"top_n": 1})
    assert refused.status_code == 413
    assert "longer than the model reads: 4; only the end" in refused.json()["detail"]


async def test_a_limit_on_windows_is_refused_where_it_would_leave_some_out():
    text = "The sun shines in Weimar. " * 100
    body = {"query": QUERY, "documents": ["short", text]}
    with Reranker("tiny", device="cpu", long_documents="window", window_tokens=64) as engine:
        async with client_of(engine) as client:
            for most, status in ((1, 422), (1024, 200), (None, 200)):
                answer = await client.post("/v1/rerank", json=body | {"max_chunks_per_doc": most})
                assert answer.status_code == status
            few = body | {"documents": ["short"], "max_chunks_per_doc": 1}
            assert (await client.post("/v1/rerank", json=few)).status_code == 200


# A query that is cut


async def test_the_server_refuses_a_query_that_it_may_not_cut(client):
    body = {"query": LONG, "texts": ["short"]}
    assert (await client.post("/rerank", json=body)).status_code == 200
    refused = await client.post("/rerank", json=body | {"truncate": False})
    assert refused.status_code == 413
    assert "query is longer than the model reads" in refused.json()["message"]
    body |= {"query": QUERY, "truncate": False}
    assert (await client.post("/rerank", json=body)).status_code == 200


async def test_the_server_tells_it_in_details(client):
    body = {"documents": DOCUMENTS, "return_details": True}
    for query in (LONG, QUERY):
        answer = (await client.post("/v1/rerank", json=body | {"query": query})).json()
        told = {each["query_truncated"] for each in answer["results"]}
        assert told == {query == LONG}


async def test_a_direction_that_cannot_be_honoured_for_the_query_is_refused(client):
    body = {"query": LONG, "documents": DOCUMENTS, "truncation_direction": "Left"}
    assert (await client.post("/v1/rerank", json=body)).status_code == 413


# Paths, shapes and what clients read


async def test_rerank_takes_both_shapes(client, reranker):
    wanted = [each.index for each in reranker.rerank(QUERY, DOCUMENTS)]
    ranks = (await client.post("/rerank", json=TEI_BODY)).json()
    assert [each["index"] for each in ranks] == wanted
    answer = (await client.post("/rerank", json=BODY | {"model": "tiny"})).json()
    assert [each["index"] for each in answer["results"]] == wanted
    assert answer["object"] == "rerank"
    assert answer["usage"]["total_tokens"] > 0
    refused = await client.post("/rerank", json=BODY | {"model": "other"})
    assert refused.status_code == 404


@pytest.mark.parametrize(
    ("path", "canonical"),
    [
        ("/v1/rerank/", "/v1/rerank"),
        ("/v2/rerank/", "/v2/rerank"),
        ("/rerank/", "/rerank"),
        ("/reranking", "/rerank"),
        ("/reranking/", "/rerank"),
        ("/v1/reranking", "/v1/rerank"),
        ("/v1/reranking/", "/v1/rerank"),
    ],
)
async def test_other_names_of_a_path_are_the_same_and_counted_as_one(client, path, canonical):
    answer = await client.post(path, json=BODY)
    assert answer.json()["results"] == (await client.post(canonical, json=BODY)).json()["results"]
    text = (await client.get("/metrics/")).text
    seconds = "bge_rerank_http_request_seconds_count"
    assert numbers(text)[f'{seconds}{{route="{canonical}",status="200"}}'] == 2


async def test_other_names_of_a_path_need_the_key_too(reranker):
    async with client_of(reranker, api_key=KEY) as client:
        for path in ("/reranking", "/v1/reranking/", "/rerank/", "/v1/models/tiny"):
            assert (await client.post(path, json=BODY)).status_code == 401


async def test_usage_counts_tokens_and_search_units(client, reranker):
    documents = [f"{text} {number}" for number in range(51) for text in DOCUMENTS]
    answer = (await client.post("/v2/rerank", json={"query": QUERY, "documents": documents})).json()
    tokens = reranker.rerank(QUERY, documents).usage.tokens
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert answer["meta"]["tokens"] == {"input_tokens": tokens}
    assert answer["meta"]["billed_units"] == {"search_units": 3}
    # What is left out of the results was scored all the same.
    few = await client.post("/v2/rerank", json={"query": QUERY, "documents": documents, "top_n": 1})
    assert few.json()["usage"]["total_tokens"] == tokens
    none = (await client.post("/v2/rerank", json={"query": QUERY, "documents": []})).json()
    assert (none["usage"]["total_tokens"], none["meta"]["billed_units"]["search_units"]) == (0, 1)


async def test_info_has_every_key_of_text_embeddings_inference(client):
    info = (await client.get("/info")).json()
    # router/src/lib.rs, struct Info, of release 1.8.
    keys = (
        "model_id model_sha model_dtype served_model_name model_type max_concurrent_requests "
        "max_input_length max_batch_tokens max_batch_requests max_client_batch_size auto_truncate "
        "tokenization_workers version sha docker_label"
    )
    assert set(keys.split()) <= set(info)
    assert info["max_batch_tokens"] >= 512


# Names of the model


async def test_a_model_may_have_several_names(reranker):
    names = ("BAAI/bge-reranker-v2-m3", "jina-reranker-v2-base-multilingual")
    async with client_of(reranker, served_model=names) as client:
        for name in (*names, "tiny"):
            answer = (await client.post("/v1/rerank", json=BODY | {"model": name})).json()
            assert answer["model"] == names[0]
        listed = (await client.get("/v1/models")).json()["data"]
        assert [each["id"] for each in listed] == list(names)
        for path in (names[0], names[0] + "/", names[0].replace("/", "%2F"), names[1]):
            found = (await client.get(f"/v1/models/{path}")).json()
            assert found["model_type"] == "rerank"
            assert found["id"] in names
        refused = await client.get("/v1/models/gpt-5")
        assert (refused.status_code, refused.json()["detail"]) == (404, refused.json()["message"])
        for name in names:
            assert repr(name) in refused.json()["message"]
        assert f"BGE_RERANK_SERVED_MODEL={names[0]},gpt-5" in refused.json()["message"]
        text = (await client.get("/metrics")).text
    assert 'route="/v1/models/{model}",status="404"' in text


async def test_a_star_allows_any_name(reranker):
    async with client_of(reranker, served_model=("*",)) as client:
        answer = (await client.post("/v1/rerank", json=BODY | {"model": "rerank-v3.5"})).json()
        assert answer["model"] == "tiny"
        assert (await client.get("/v1/models/any/thing")).json()["id"] == "any/thing"
        assert [each["id"] for each in (await client.get("/v1/models")).json()["data"]] == ["tiny"]


def test_the_environment_lists_names_and_origins():
    environment = {
        "BGE_RERANK_SERVED_MODEL": "a, b/c,*",
        "BGE_RERANK_STRICT": "1",
        "BGE_RERANK_CORS_ORIGINS": "https://a.example, http://localhost:3000",
    }
    settings = ServerSettings.from_environment(environment)
    assert settings.served_model == ("a", "b/c", "*")
    assert settings.model_names == ("a", "b/c", "*")
    assert settings.strict is True
    assert settings.cors_origins == ("https://a.example", "http://localhost:3000")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"served_model": ()}, "served_model must be a non-empty str, several of them or None"),
        ({"served_model": ("a", " ")}, "served_model must be"),
        ({"cors_origins": ("example.com",)}, "cors_origins must be a tuple of origins"),
        ({"cors_origins": ("https://example.com/",)}, "without a slash"),
        ({"cors_origins": "https://example.com"}, "must be a tuple"),
        ({"strict": "yes"}, "strict must be True or False"),
    ],
    ids=str,
)
def test_bad_names_and_origins_are_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        ServerSettings(engine=TINY, **settings)


# Bodies and origins


@pytest.mark.parametrize(
    "kind",
    [
        None,
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/json; charset=utf-8",
    ],
)
async def test_json_is_json_whatever_it_is_called(client, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    content = json.dumps(BODY).encode()
    for path in ROUTES:
        answer = await client.post(path, content=content, headers=headers)
        assert answer.status_code == 200, answer.text
    assert (await client.post("/v2/rerank", content=b"query=a", headers=headers)).status_code == 400


async def test_a_body_that_another_server_lost_is_explained(client):
    headers = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c"}
    for content, status in ((b"", 400), (json.dumps(BODY).encode(), 200)):
        answer = await client.post("/v2/rerank", content=content, headers=headers)
        assert answer.status_code == status
    answer = await client.post("/v2/rerank", content=b"", headers=headers)
    assert "let the client use HTTP/1.1 only" in answer.json()["detail"]


async def test_bodies_may_be_packed(reranker):
    content = json.dumps(BODY).encode()
    packed = gzip.compress(content)
    async with client_of(reranker, max_body_bytes=2 * len(packed)) as client:
        for name in ("gzip", "X-GZIP"):
            answer = await client.post(
                "/v2/rerank", content=packed, headers={"Content-Encoding": name}
            )
            assert len(answer.json()["results"]) == 4
        for body, encoding, status, message in (
            (gzip.compress(b" " * (2 * len(packed) + 1)), "gzip", 413, "larger than the"),
            (content, "gzip", 400, "not the gzip"),
            (packed[:-9], "gzip", 400, "one whole gzip stream"),
            (packed + packed, "gzip", 400, "one whole gzip stream"),
            (packed, "br", 415, "'br' is not supported"),
            (packed, "gzip, gzip", 415, "is not supported"),
        ):
            headers = {"Content-Encoding": encoding}
            refused = await client.post("/v2/rerank", content=body, headers=headers)
            assert refused.status_code == status
            assert message in refused.json()["message"]


async def test_a_body_that_unpacks_to_a_thousand_times_its_size_is_refused(reranker):
    bomb = gzip.compress(b" " * 30_000_000)
    async with client_of(reranker) as client:
        refused = await client.post("/rerank", content=bomb, headers={"Content-Encoding": "gzip"})
    assert refused.status_code == 413


async def test_web_pages_of_other_origins_are_refused(reranker):
    async with client_of(reranker) as client:
        for origin in ("https://evil.example", "null", "http://server.evil", "http://server:81"):
            refused = await client.post("/v2/rerank", json=BODY, headers={"Origin": origin})
            assert (refused.status_code, refused.json()["error_type"]) == (403, "Forbidden")
            assert "BGE_RERANK_CORS_ORIGINS" in refused.json()["message"]
            assert "access-control-allow-origin" not in refused.headers
        own = await client.post("/v2/rerank", json=BODY, headers={"Origin": "http://server"})
        assert own.status_code == 200
        twice = [("Origin", "http://server"), ("Origin", "http://x.example")]
        assert (await client.post("/v2/rerank", json=BODY, headers=twice)).status_code == 403


async def test_origins_that_are_set_may_ask(reranker):
    origin = "https://app.example"
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    async with client_of(reranker, cors_origins=(origin,), api_key=KEY) as client:
        beforehand = await client.options("/v2/rerank", headers=asked)
        assert beforehand.status_code == 200
        assert beforehand.headers["access-control-allow-origin"] == origin
        assert "authorization" in beforehand.headers["access-control-allow-headers"].lower()
        headers = {"Origin": origin}
        refused = await client.post("/v2/rerank", json=BODY, headers=headers)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == origin, "so that it can be read"
        headers["Authorization"] = f"Bearer {KEY}".encode()
        answer = await client.post("/v2/rerank", json=BODY, headers=headers)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, origin)
        headers["Origin"] = "https://evil.example"
        refused = await client.post("/v2/rerank", json=BODY, headers=headers)
        assert refused.status_code == 403
    async with client_of(reranker, cors_origins=("*",)) as client:
        answer = await client.post("/v2/rerank", json=BODY, headers={"Origin": "null"})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")


# Limits of tokens


@pytest.mark.parametrize(
    ("field", "cuts"),
    [
        ("max_tokens_per_doc", ("truncated",)),
        ("max_tokens_per_query", ("query_truncated",)),
        ("truncate_prompt_tokens", ("truncated", "query_truncated")),
    ],
)
async def test_a_request_may_ask_to_read_less(client, field, cuts):
    long = "The weather was fine. " * 10
    body = {"query": long, "documents": [long], "return_details": True}
    for tokens, cut in ((12, True), (4096, False), (-1, False), (10**20, False)):
        answer = (await client.post("/v1/rerank", json=body | {field: tokens})).json()
        told = answer["results"][0]
        found = {name for name in ("truncated", "query_truncated") if told[name]}
        assert found == (set(cuts) if cut else set())


async def test_too_few_tokens_for_a_pair_are_refused(client):
    answer = await client.post("/v1/rerank", json=BODY | {"truncate_prompt_tokens": 3})
    assert answer.status_code == 422
    assert "leaves no room" in answer.json()["detail"]


async def test_a_remote_reranker_asks_for_less(reranker):
    async with client_of(reranker) as client:
        limits = TokenLimits(max_document_tokens=3)
        body = APIS["bge"].request(QUERY, [LONG], model=None, scale="logit", token_limits=limits)
        told = (await client.post("/v1/rerank", json=body)).json()["results"][0]
    (wanted,) = reranker.logits(QUERY, [LONG], max_document_tokens=3)
    assert (told["logit"], told["truncated"]) == (pytest.approx(wanted, abs=1e-5), True)
