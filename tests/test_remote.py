"""Reranking by a server elsewhere: what is sent, what comes back, and what goes wrong."""

import asyncio
import copy
import inspect
import json
import logging
import pickle
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("httpx")

from bge_rerank_adapters import (
    InputTypeError,
    RankedDocument,
    RemoteError,
    RemoteReranker,
    Reranker,
    Scorer,
    SettingsError,
)
from bge_rerank_adapters.remote import RemoteSettings
from bge_rerank_adapters.remote.apis import APIS, COMMON, api_of_address
from bge_rerank_adapters.settings.table import rows
from tests.rerank_servers import (
    NOT_FOUND,
    Asked,
    FakeServer,
    Reply,
    answering,
    common,
    in_turn,
    remote,
    running,
    scores_of,
    until,
)
from tests.test_imports import run_python

pytestmark = pytest.mark.timeout(180)

SHAPES = json.loads((Path(__file__).parent / "data" / "rerank-answers.json").read_text("utf-8"))
KEY = "sekret-ß-42"
TEXTS = ["0.25 a", "0.75 b", "0.5 c"]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with running(common) as made:
        yield made


# What is sent, and what is made of the answer


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape["name"])
def test_each_servers_answer_is_understood(shape):
    query = shape["request"]["query"]
    texts = shape["request"].get("documents", shape["request"].get("texts"))
    with (
        running(in_turn(Reply(shape["answer"]))) as server,
        RemoteReranker(server.url, api=shape["api"]) as reranker,
    ):
        ranking = reranker.rerank(query, texts)
    [post] = server.posts
    assert (post.path, post.body) == (shape["path"], shape["request"])
    assert [each.index for each in ranking] == shape["indexes"]
    assert [each.text for each in ranking] == [texts[index] for index in shape["indexes"]]
    assert [each.logit for each in ranking] == (shape["logits"] or [None] * len(texts))
    if shape["scores"]:
        assert [each.score for each in ranking] == shape["scores"]
    assert all(type(each.score) is float and 0 <= each.score <= 1 for each in ranking)
    assert (ranking.usage and ranking.usage.tokens) == shape["tokens"]


def test_our_servers_details_are_kept():
    results = [
        {"index": 0, "relevance_score": 0.5, "logit": 0.0, "truncated": True, "span": [3, 9]},
        {"index": 1, "relevance_score": 0.5, "logit": 0.0, "truncated": False},
    ]
    with answering(Reply({"results": results}), path="", api="bge") as (reranker, _):
        assert reranker.rerank("q", ["one", "two"]) == [
            RankedDocument(0, 0.5, "one", 0.0, truncated=True, span=(3, 9)),
            RankedDocument(1, 0.5, "two", 0.0),
        ]


def test_the_address_tells_what_a_known_host_speaks():
    assert api_of_address("https://api.cohere.com") is APIS["cohere"]
    assert api_of_address("https://api.jina.ai/v1/rerank") is APIS["jina"]
    assert api_of_address("http://host/v1/rerank") is api_of_address("http://host/v2") is COMMON
    assert api_of_address("http://host/rerank") is api_of_address("http://host") is None


OURS = {"server": "bge_rerank_adapters", "max_client_batch_size": 7}
TEI = {"model_id": "x", "max_client_batch_size": 2, "max_input_length": 512}


def speaking(info: dict[str, Any] | None, *paths: str) -> Callable[[Asked], Reply]:
    """Return a server that tells this of itself, and has these routes for any kind of request."""

    def answer(asked: Asked) -> Reply:
        if asked.method == "GET":
            return NOT_FOUND if info is None else Reply(info)
        if asked.path not in paths:
            return NOT_FOUND
        texts = asked.body.get("documents", asked.body.get("texts"))
        return Reply({"results": [{"index": i, "relevance_score": s} for i, s in scores_of(texts)]})

    return answer


@pytest.mark.parametrize(
    ("url", "info", "routes", "asked"),
    [
        ("", OURS, ["/v1/rerank"], ["GET /info", "POST /v1/rerank"]),
        ("/base/", OURS, ["/base/v1/rerank"], ["GET /base/info", "POST /base/v1/rerank"]),
        ("", TEI, ["/rerank"], ["GET /info", "POST /rerank", "POST /rerank"]),
        ("/rerank", TEI, ["/rerank"], ["GET /info", "POST /rerank", "POST /rerank"]),
        ("", None, ["/rerank"], ["GET /info", "GET /v1/models", "POST /rerank"]),
        (
            "",
            None,
            ["/v1/rerank"],
            ["GET /info", "GET /v1/models", "POST /rerank", "POST /v1/rerank"],
        ),
        ("/v1", None, ["/v1/rerank"], ["GET /v1/models", "POST /v1/rerank"]),
        ("/v2/rerank", None, ["/v2/rerank"], ["GET /v1/models", "POST /v2/rerank"]),
    ],
)
def test_auto_finds_out_with_few_requests_and_once(url, info, routes, asked):
    with running(speaking(info, *routes)) as server, RemoteReranker(server.url + url) as reranker:
        for _ in range(2):
            assert len(reranker.rerank("q", TEXTS)) == 3
            # Side by side they may arrive in any order.
            assert sorted(f"{each.method} {each.path}" for each in server.asked) == sorted(asked)
            server.asked.clear()
            asked = [each for each in asked if each == asked[-1]]
        assert len(server.asked) == 0


@pytest.mark.parametrize("owner", ["llamacpp", "sglang"])
@pytest.mark.parametrize("path", ["", "/v1", "/v1/rerank"])
def test_auto_knows_servers_that_answer_logits_by_their_models(owner, path):
    def answer(asked: Asked) -> Reply:
        if asked.path == "/v1/models":
            return Reply({"object": "list", "data": [{"id": "m", "owned_by": owner}]})
        if asked.path != "/v1/rerank":
            return NOT_FOUND
        return Reply([{"index": index, "score": -index / 4} for index in range(3)])

    with running(answer) as server, RemoteReranker(server.url + path) as reranker:
        # Within [0, 1] and beyond: told apart from scores by nothing else.
        assert reranker.logits("q", TEXTS) == [0.0, -0.25, -0.5]
        assert reranker.score("q", TEXTS)[0] == 0.5


@pytest.mark.parametrize(
    "models", [[], {"data": None}, {"data": []}, {"data": [7]}, {"data": [{"owned_by": ["x"]}]}]
)
def test_models_of_something_else_are_no_hindrance(models):
    answer = in_turn(common)
    with (
        running(lambda asked: Reply(models) if asked.method == "GET" else answer(asked)) as server,
        remote(server) as reranker,
    ):
        assert reranker.rerank("q", TEXTS)[0].index == 1


@pytest.mark.parametrize("route", ["/rerank", "/v1/rerank"])
def test_advice_about_logits_can_be_followed(route):
    def answer(asked: Asked) -> Reply:
        rows = [{"index": index, "relevance_score": 4.0 - index} for index in range(3)]
        return Reply({"results": rows}) if asked.path == route else NOT_FOUND

    with running(answer) as server:
        with RemoteReranker(server.url) as reranker, pytest.raises(RemoteError) as told:
            reranker.rerank("q", TEXTS)
        assert 'give api="jina", scale="logit"' in str(told.value)
        with RemoteReranker(server.url, api="jina", scale="logit") as reranker:
            assert reranker.logits("q", TEXTS) == [4.0, 3.0, 2.0]
        # And who says the scale alone learns the rest.
        with (
            RemoteReranker(server.url, scale="logit") as reranker,
            pytest.raises(SettingsError, match='api="jina"'),
        ):
            reranker.rerank("q", TEXTS)


def test_tokens_of_all_parts_are_counted_and_none_is_made_up():
    def answer(asked: Asked) -> Reply:
        tokens = {"usage": {"prompt_tokens": 10 * len(asked.body["documents"])}}
        with_them = "0.9 untold" not in asked.body["documents"]
        return Reply(common(asked).content | (tokens if with_them else {}))

    with answering(answer, max_documents_per_request=2) as (reranker, _):
        ranking = reranker.rerank("q", TEXTS)
        assert ranking.usage is not None
        assert ranking.usage.tokens == 30
        assert [each.usage.tokens for each in reranker.rerank_many([("q", TEXTS)])] == [30]
        assert reranker.rerank("q", [*TEXTS, "0.9 untold"]).usage is None
        assert reranker.stats().tokens == 80


@pytest.mark.parametrize("tokens", [0, -3, True, "7", None, float("nan"), 10**400])
def test_tokens_that_no_server_can_mean_are_none(tokens):
    def answer(asked: Asked) -> Reply:
        return Reply(common(asked).content | {"usage": {"prompt_tokens": tokens}, "meta": [tokens]})

    with answering(answer) as (reranker, _):
        assert reranker.rerank("q", TEXTS).usage is None


def test_an_info_of_something_else_is_no_hindrance():
    page = Reply(raw=b"<html>Our product</html>")
    answer = in_turn(common)
    with (
        running(lambda asked: page if asked.method == "GET" else answer(asked)) as server,
        RemoteReranker(server.url) as reranker,
    ):
        assert reranker.rerank("q", TEXTS)[0].index == 1


def test_model_key_and_raw_scores_are_asked_for():
    with answering(
        lambda asked: Reply([{"index": 0, "score": 3.0}]),
        path="",
        api="infinity",
        model="m",
        api_key=KEY,
        scale="logit",
    ) as (reranker, server):
        assert reranker.logits("q", ["text"]) == [3.0]
    [post] = server.posts
    assert post.body["model"] == "m"
    assert post.body["raw_scores"] is True
    assert post.headers["Authorization"].encode("latin-1").decode() == f"Bearer {KEY}"


@pytest.mark.parametrize("path", ["", "/v1"])
def test_numbers_of_an_unknown_kind_of_server_are_not_taken_for_logits(server, path):
    unknown = remote(server, path=path, scale="logit")
    with unknown, pytest.raises(SettingsError, match='scale="logit" needs api='):
        unknown.rerank("q", TEXTS)
    assert server.posts == []
    with remote(server, path=path, api="jina", scale="logit") as reranker:
        assert reranker.logits("q", TEXTS) == [0.25, 0.75, 0.5]


def test_texts_arrive_as_they_are():
    texts = ["0.5 ß 北京 😀 \x00 \n", "0.25 \ud800 alone"]
    with answering(common) as (reranker, server):
        assert [each.text for each in reranker.rerank("☃?", texts)] == texts
    [post] = server.posts
    assert (post.body["query"], post.body["documents"]) == ("☃?", texts)


# The engine's interface


def test_it_has_the_engines_methods_with_the_engines_arguments():
    names = {name for name in vars(Reranker) if not name.startswith("_")}
    # The second is of use to drop-ins alone, which run a model of their own.
    for name in sorted(names - {"from_settings", "pair_logits"}):
        theirs, ours = getattr(Reranker, name), getattr(RemoteReranker, name)
        if not callable(theirs):
            continue
        taken = [list(inspect.signature(each).parameters.values()) for each in (theirs, ours)]
        assert taken[0] == taken[1], name
        assert inspect.iscoroutinefunction(theirs) == inspect.iscoroutinefunction(ours)


def test_it_is_a_scorer(server):
    assert isinstance(remote(server), Scorer)


def test_threshold_and_top_k_are_applied_here(server):
    with remote(server) as reranker:
        assert [each.index for each in reranker.rerank("q", TEXTS)] == [1, 2, 0]
        assert [each.index for each in reranker.rerank("q", TEXTS, top_k=2)] == [1, 2]
        assert [each.index for each in reranker.rerank("q", TEXTS, top_k=9)] == [1, 2, 0]
        kept = reranker.rerank("q", TEXTS, score_threshold=0.5, top_k=3)
        assert [each.index for each in kept] == [1, 2]
    assert {post.body["top_n"] for post in server.posts} == {3}


def test_nothing_is_sent_for_no_documents(server):
    with remote(server, path="") as reranker:
        assert reranker.rerank("q", []) == []
        assert reranker.score("q", []) == reranker.logits("q", []) == []
        assert reranker.score_pairs([]) == reranker.rerank_many([]) == []
        assert reranker.rerank_many([("q", []), ("p", [])]) == [[], []]
        assert asyncio.run(reranker.arerank("q", [])) == []
    assert server.asked == []


@pytest.mark.parametrize("documents", ["text", ["a", 1], {"a": "b"}, None])
def test_bad_input_is_refused_as_by_the_engine(server, documents):
    with remote(server) as reranker:
        for call in (reranker.rerank, reranker.score, reranker.logits):
            with pytest.raises(InputTypeError):
                call("q", documents)
        with pytest.raises(InputTypeError, match="query"):
            reranker.rerank(None, ["a"])
        with pytest.raises(InputTypeError, match=r"requests\[1\]"):
            reranker.rerank_many([("q", ["0.5"]), ("q", documents)])
        with pytest.raises(SettingsError, match="top_k"):
            reranker.rerank("q", ["a"], top_k=0)
        with pytest.raises(SettingsError, match="timeout_s"):
            reranker.rerank("q", ["a"], timeout_s=-1)


def test_scores_come_in_input_order(server):
    with remote(server, max_documents_per_request=2) as reranker:
        assert reranker.score("q", [*TEXTS, TEXTS[1]]) == [0.25, 0.75, 0.5, 0.75]
        pairs = [("q", TEXTS[0]), ("p", TEXTS[1]), ("q", TEXTS[2]), ("q", TEXTS[0])]
        assert reranker.score_pairs(pairs) == [0.25, 0.75, 0.5, 0.25]
    asked = [(post.body["query"], len(post.body["documents"])) for post in server.posts]
    assert sorted(asked) == [("p", 1), ("q", 1), ("q", 2), ("q", 2)]


def test_logits_of_a_server_that_tells_scores_alone_are_an_error(server):
    with remote(server) as reranker, pytest.raises(RemoteError, match="scores without logits"):
        reranker.logits("q", TEXTS)


def test_identical_documents_are_sent_once(server):
    texts = ["0.5 a", "0.75 b", "0.5 a", "0.5 a"]
    with remote(server) as reranker:
        ranking = reranker.rerank("q", texts)
        assert reranker.stats().pairs == 2
    assert [each.index for each in ranking] == [1, 0, 2, 3]
    assert server.posts[0].body["documents"] == ["0.5 a", "0.75 b"]


def test_many_requests_come_back_in_order(server):
    asked = [
        (f"q{number}", [f"0.{number} x", f"0.{number}5 y"][: number % 3]) for number in range(1, 10)
    ]
    with remote(server, max_documents_per_request=1, max_connections=4) as reranker:
        rankings = reranker.rerank_many(iter(asked), top_k=1)
        assert asyncio.run(reranker.arerank_many(asked, top_k=1)) == rankings
        assert reranker.stats().requests == 18
    assert [len(ranking) for ranking in rankings] == [min(1, len(texts)) for _, texts in asked]
    assert [ranking[0].text for ranking in rankings if ranking] == [
        texts[-1] for _, texts in asked if texts
    ]


def test_an_iterator_is_read_where_rerank_many_is_called(server):
    threads = set()

    def requests() -> Iterator[tuple[str, list[str]]]:
        for _ in range(5):
            threads.add(threading.current_thread())
            yield "q", TEXTS

    with remote(server) as reranker:
        assert len(reranker.rerank_many(requests())) == 5
    assert threads == {threading.current_thread()}


def test_a_bar_is_shown_where_it_is_asked_for(server, capsys):
    with remote(server) as reranker:
        reranker.rerank_many([("q", TEXTS)] * 3, progress=True)
    assert "3/3" in capsys.readouterr().err


def test_stats_and_warm_up():
    with answering(lambda asked: Reply({"results": [{"index": 0, "relevance_score": 0.5}]})) as (
        reranker,
        server,
    ):
        assert reranker.stats().to_dict()["requests"] == 0
        reranker.warm_up()
        stats = reranker.stats()
    # GET /v1/models comes first.
    assert (stats.requests, stats.pairs, stats.http_requests, stats.under_way) == (1, 1, 2, 0)
    assert stats.waiting_s > 0
    assert len(server.posts) == 1


# Batches


@st.composite
def ranked_texts(draw: st.DrawFn) -> list[str]:
    scores = draw(st.lists(st.sampled_from(["0.0", "0.25", "0.5", "1.0"]), max_size=12))
    return [f"{score} {draw(st.sampled_from('abcd'))}" for score in scores]


@pytest.fixture(scope="module")
def shared_server() -> Iterator[FakeServer]:
    def answer(asked: Asked) -> Reply:
        if asked.method == "GET":
            return NOT_FOUND
        # Equal scores in an order of the server's own: the last first.
        rows = [
            {"index": index, "relevance_score": score}
            for index, score in reversed(scores_of(asked.body["documents"]))
        ]
        return Reply({"results": sorted(rows, key=lambda row: -row["relevance_score"])})

    with running(answer) as made:
        yield made


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    texts=ranked_texts(),
    size=st.integers(1, 5),
    top_k=st.none() | st.integers(1, 5),
    threshold=st.none() | st.sampled_from([0.0, 0.25, 0.5, 1.0]),
)
def test_batches_are_merged_as_if_there_were_none(shared_server, texts, size, top_k, threshold):
    shared_server.asked.clear()
    limits = {"top_k": top_k, "score_threshold": threshold}
    with remote(shared_server, max_documents_per_request=size) as reranker:
        ranking = reranker.rerank("q", texts, **limits)
        assert reranker.score("q", texts) == [float(text.split()[0]) for text in texts]
    distinct = list(dict.fromkeys(texts))
    kept = sorted(
        (
            score
            for score in (float(text.split()[0]) for text in texts)
            if threshold is None or score >= threshold
        ),
        reverse=True,
    )[:top_k]
    assert [each.score for each in ranking] == kept
    assert len({each.index for each in ranking}) == len(ranking)
    assert all(each.text == texts[each.index] for each in ranking)
    assert all(float(each.text.split()[0]) == each.score for each in ranking)
    # Each distinct text was sent once a call, in order, in requests of that size at most.
    parts = [post.body["documents"] for post in shared_server.posts]
    wanted = [distinct[start : start + size] for start in range(0, len(distinct), size)]
    assert sorted(parts) == sorted(wanted + wanted)


def test_equal_scores_keep_the_servers_order():
    rows = [{"index": index, "relevance_score": 0.5} for index in (2, 0, 1)]
    with answering(Reply({"results": rows})) as (reranker, _):
        assert [each.index for each in reranker.rerank("q", ["a", "b", "c"])] == [2, 0, 1]


def test_an_answer_in_input_order_is_ranked():
    rows = [{"index": index, "relevance_score": index / 4} for index in range(3)]
    with answering(Reply({"results": rows})) as (reranker, _):
        assert [each.index for each in reranker.rerank("q", ["a", "b", "c"])] == [2, 1, 0]


def test_logits_order_what_scores_no_longer_tell_apart():
    rows = [{"index": 0, "score": 40.0}, {"index": 1, "score": 50.0}]
    with answering(Reply(rows), path="", api="tei") as (reranker, _):
        ranking = reranker.rerank("q", ["a", "b"])
    assert [(each.index, each.score) for each in ranking] == [(1, 1.0), (0, 1.0)]


def test_a_request_that_is_too_large_goes_in_halves():
    def answer(asked: Asked) -> Reply:
        if len(asked.body["documents"]) > 3:
            return Reply({"message": "too many"}, status=413)
        return common(asked)

    texts = [f"0.{number:02} x" for number in range(10)]
    with answering(answer) as (reranker, server):
        ranking = reranker.rerank("q", texts)
    assert [each.index for each in ranking] == list(range(9, -1, -1))
    assert sorted(len(post.body["documents"]) for post in server.posts) == [2, 2, 3, 3, 5, 5, 10]


def test_one_call_leaves_connections_to_others():
    most = 0
    busy = 0
    lock, gate = threading.Lock(), threading.Event()

    def answer(asked: Asked) -> Reply:
        nonlocal most, busy
        with lock:
            busy += 1
            most = max(most, busy)
        assert gate.wait(60)
        with lock:
            busy -= 1
        return common(asked)

    def let_go(*, once_busy: int) -> None:
        until(lambda: busy == once_busy)
        # Time for one too many to come.
        time.sleep(0.1)
        gate.set()

    with (
        answering(answer, max_documents_per_request=1, max_connections=4) as (reranker, _),
        ThreadPoolExecutor(12) as pool,
    ):
        one = pool.submit(reranker.rerank, "q", [f"0.5 {number}" for number in range(12)])
        let_go(once_busy=2)
        assert len(one.result(60)) == 12
        assert most == 2
        gate.clear()
        many = pool.map(lambda n: reranker.rerank("q", [f"0.5 {n}", "0.1"]), range(12))
        let_go(once_busy=4)
        assert len(list(many)) == 12
        assert most == 4


# Settings and secrets


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"url": "host:8080"}, "http://gpu-box:8080"),
        ({"url": "ftp://host"}, "http://gpu-box:8080"),
        ({"url": "http://"}, "http://gpu-box:8080"),
        ({"url": ""}, "http://gpu-box:8080"),
        ({"url": "http://host:port"}, "no address"),
        ({"url": "http://[::1"}, "no address"),
        ({"url": "http://host?key=1"}, r"leave out what follows \?"),
        ({"url": 7}, "must be a str, got a int"),
        (
            {"api": "openai"},
            "auto, bge, tei, vllm, infinity, cohere, jina, llamacpp, sglang, got 'openai'",
        ),
        ({"scale": "raw"}, "auto, score, logit"),
        ({"model": " "}, "non-empty"),
        ({"api_key": "a\n"}, "line ends"),
        ({"api_key": ""}, "one or more characters"),
        ({"api_key": 7}, "a int"),
        ({"timeout_s": 0}, "above 0"),
        ({"timeout_s": float("nan")}, "above 0"),
        ({"timeout_s": True}, "above 0"),
        ({"max_retries": -1}, "at least 0"),
        ({"max_documents_per_request": 0}, "at least 1"),
        ({"max_connections": 1.5}, "at least 1"),
    ],
)
def test_a_setting_that_is_not_allowed_is_named(given, told):
    with pytest.raises(SettingsError, match=told) as error:
        RemoteReranker(**{"url": "http://host"} | given)
    assert str(error.value).startswith(next(iter(given)))


def test_the_constructor_takes_each_setting():
    taken = list(inspect.signature(RemoteReranker).parameters.values())
    kept = get_type_hints(RemoteSettings)
    assert {each.name: (each.annotation, each.default) for each in taken[1:]} == {
        name: (kept[name], row.default) for name, row in list(rows(RemoteSettings).items())[1:]
    }
    assert (taken[0].name, taken[0].default) == ("url", inspect.Parameter.empty)


def test_a_password_in_the_address_is_refused_and_not_shown():
    with pytest.raises(SettingsError, match="give the secret as api_key") as error:
        RemoteReranker("http://me:sekret@host")
    assert "sekret" not in str(error.value)


def test_the_key_is_shown_nowhere(server, caplog):
    caplog.set_level(logging.DEBUG)
    with remote(server, api_key=KEY) as reranker:
        reranker.rerank("q", TEXTS)
        shown = [
            repr(reranker),
            str(reranker.settings),
            json.dumps(reranker.settings.to_dict()),
            repr(pickle.dumps(reranker)),
            repr(pickle.dumps(reranker.settings)),
        ]
    with (
        answering(Reply({}, breaks="before"), Reply({}, 401), api_key=KEY) as (reranker, _),
        pytest.raises(RemoteError) as error,
    ):
        reranker.rerank("q", TEXTS)
    shown += ["".join(traceback.format_exception(error.value)), repr(pickle.dumps(error.value))]
    shown += [record.getMessage() for record in caplog.records]
    assert not any("sekret" in each for each in shown)
    assert not any("0.25 a" in record.getMessage() for record in caplog.records)


def test_a_pickle_carries_the_settings(server):
    with remote(server, api_key=KEY, model="m", timeout_s=7) as reranker:
        reranker.rerank("q", TEXTS)
        again = pickle.loads(pickle.dumps(reranker))  # noqa: S301
        assert copy.deepcopy(reranker) is reranker
        assert copy.copy(reranker) is reranker
    assert again.settings == RemoteSettings(url=f"{server.url}/v1", model="m", timeout_s=7.0)
    assert len(again.rerank("q", TEXTS)) == 3
    again.close()
    assert "Authorization" not in server.posts[-1].headers


def test_without_httpx_the_extra_is_named_when_it_is_asked_for():
    code = "import bge_rerank_adapters; bge_rerank_adapters.RemoteReranker"
    done = run_python(code, blocked=("httpx",))
    assert done.returncode == 1
    assert done.stderr.strip().endswith('run: pip install "bge-rerank-adapters[remote]"')
