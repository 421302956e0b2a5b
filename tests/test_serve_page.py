"""The pages for a person, in a headless Chromium: what they show, send, and never ask for."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")

from bge_rerank_adapters import Reranker
from bge_rerank_adapters.serve import ServerSettings, create_app
from tests.test_serve import KEY, TINY, client_of
from tests.test_serve_http import listening
from tests.texts import DOCUMENTS, QUERY

pytestmark = pytest.mark.timeout(180)

ASCII_KEY = "sekret-42"


@pytest.mark.parametrize("path", ["/", "/docs", "/docs/"])
async def test_pages_need_no_key_and_no_other_server(reranker, path):
    async with client_of(reranker, api_key=KEY) as client:
        answer = await client.get(path)
        assert (await client.head(path)).status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", answer.text)
    assert not re.search(r"\son[a-z]+=|style=|@import|url\(", answer.text)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip(
            "there is no Chromium with its driver: apt-get install chromium chromium-driver"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    started.implicitly_wait(20)
    yield started
    started.quit()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A browser of which nothing may have been refused, or asked for elsewhere."""
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.set_window_size(1000, 900)
    yield browser
    complaints = [each["message"] for each in browser.get_log("browser")]
    assert all("401 (Unauthorized)" in each for each in complaints), complaints
    asked = [json.loads(each["message"])["message"] for each in browser.get_log("performance")]
    urls = [
        each["params"]["request"]["url"]
        for each in asked
        if each["method"] == "Network.requestWillBeSent"
    ]
    assert urls
    assert all(url.startswith(("http://127.0.0.1:", "data:")) for url in urls), urls


def found(browser: Any, selector: str) -> list[Any]:
    return list(browser.find_elements("css selector", selector))


def fill(browser: Any, name: str, text: str) -> None:
    # Chromium's driver types no characters beyond the basic plane.
    script = (
        "const field = document.getElementById(arguments[0]); field.value = arguments[1];"
        "field.dispatchEvent(new Event('input', {bubbles: true}));"
        "field.dispatchEvent(new Event('change', {bubbles: true}));"
    )
    browser.execute_script(script, name, text)


def ranked(browser: Any, query: str, documents: str) -> list[Any]:
    fill(browser, "query", query)
    fill(browser, "documents", documents)
    browser.execute_script("document.getElementById('cards').replaceChildren()")
    found(browser, "#go")[0].click()
    assert found(browser, "#cards li")
    return found(browser, "#cards li")


@pytest.fixture(scope="module")
def url(reranker: Reranker) -> Iterator[str]:
    with listening(create_app(ServerSettings(engine=TINY), engine=reranker)) as port:
        yield f"http://127.0.0.1:{port}"


def test_documents_are_ranked_as_the_engine_does(page, url, reranker):
    page.get(url)
    cards = ranked(page, QUERY, "\n".join(DOCUMENTS))
    wanted = reranker.rerank(QUERY, DOCUMENTS)
    assert [each.find_element("class name", "text").text for each in cards] == [
        each.text for each in wanted
    ]
    for place, (card, result) in enumerate(zip(cards, wanted, strict=True)):
        assert f"#{place + 1}" in card.text
        assert f"{result.score:.4f}" in card.text
        moved = result.index - place
        told = "stayed" if not moved else f"{'up' if moved > 0 else 'down'} {abs(moved)}"
        assert f"was {result.index + 1}, " in card.text
        assert told in card.text
        width = float(card.find_element("css selector", "rect").get_attribute("width"))
        assert width == pytest.approx(result.score, abs=1e-4)
    assert "tiny" in found(page, "#model")[0].text
    assert "512 tokens a pair" in found(page, "#limits")[0].text
    assert f"{wanted.usage.tokens} tokens" in found(page, "#said")[0].text


def test_a_list_of_objects_and_hostile_texts_are_shown_as_text(page, url):
    page.get(url)
    documents = [
        "<img src=x onerror=alert(1)>",
        {"text": 'Goethe\'s "Faust"', "more": [True, None]},
    ]
    cards = ranked(page, "Who wrote Faust?", json.dumps(documents))
    texts = {each.find_element("class name", "text").text for each in cards}
    assert texts == {documents[0], 'Goethe\'s "Faust"'}
    assert not found(page, "#cards img") if page.implicitly_wait(0) is None else False
    page.implicitly_wait(20)


def test_limits_and_refusals(page, url):
    page.get(url)
    fill(page, "top", "1")
    assert len(ranked(page, QUERY, "\n".join(DOCUMENTS))) == 1
    fill(page, "top", "")
    cards = ranked(page, QUERY, "short\n" + "long " * 2000)
    [cut] = [each for each in cards if "long long" in each.text]
    assert "Its end was cut off" in cut.text
    assert sum("Its end was cut off" in each.text for each in cards) == 1
    fill(page, "documents", "[1]")
    found(page, "#go")[0].click()
    assert "must be a string" in found(page, "#said.bad")[0].text
    # The refusal stands in the browser's own log as well.
    assert all("422" in each["message"] for each in page.get_log("browser"))


def test_the_best_window_is_marked(page):
    text = "\U0001f600 The sun shines in Weimar. " * 100 + "Goethe wrote Faust. \U0001f600"
    with Reranker("tiny", device="cpu", long_documents="window", window_tokens=64) as engine:
        [wanted] = engine.rerank("Who wrote Faust?", [text])
        with listening(create_app(ServerSettings(engine=TINY), engine=engine)) as port:
            page.get(f"http://127.0.0.1:{port}")
            [card] = ranked(page, "Who wrote Faust?", text)
            start, end = wanted.span
            marked = card.find_element("tag name", "mark").get_property("textContent")
    assert marked == text.strip()[start:end]
    assert "Goethe wrote Faust." in marked


def test_a_key_is_asked_for_where_one_is_needed(page, reranker):
    app = create_app(ServerSettings(engine=TINY, api_key=ASCII_KEY), engine=reranker)
    with listening(app) as port:
        page.get(f"http://127.0.0.1:{port}")
        assert found(page, "#key-part:not([hidden])")
        assert found(page, "#limits")[0].text == "Enter the server's API key first."
        fill(page, "key", "wrong")
        found(page, "#go")[0].click()
        assert found(page, "#said.bad")[0].text == "This is not the server's API key."
        fill(page, "key", ASCII_KEY)
        assert len(ranked(page, QUERY, "\n".join(DOCUMENTS))) == 4
        shown = found(page, "body")[0].text
        assert ASCII_KEY not in shown
        assert '-H "Authorization: Bearer $BGE_RERANK_API_KEY"' in shown


def test_the_same_request_runs_in_a_shell_and_in_python(page, url):
    page.get(url)
    documents = [
        "It's $HOME \\ `date`.",
        {"text": 'Goethe "wrote" Faust.', "flag": True, "no": None},
    ]
    fill(page, "query", "Who's \"Faust\"'s author?")
    fill(page, "documents", json.dumps(documents))
    fill(page, "least", "0.001")
    snippet = found(page, "#python")[0].get_property("textContent")
    done = subprocess.run(
        [sys.executable, "-c", snippet], capture_output=True, text=True, check=True
    )
    body = {"query": "Who's \"Faust\"'s author?", "documents": documents, "score_threshold": 0.001}
    results = httpx.post(f"{url}/v2/rerank", json=body, timeout=60).json()["results"]
    assert done.stdout.split("\n")[0] == f"{results[0]['index']} {results[0]['relevance_score']}"
    if shutil.which("curl") and shutil.which("bash"):
        snippet = found(page, "#curl")[0].get_property("textContent")
        done = subprocess.run(["bash", "-c", snippet], capture_output=True, text=True, check=True)  # noqa: S607
        assert json.loads(done.stdout)["results"] == results


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_fit_a_phone_and_follow_the_system_s_colours(page, url, path):
    grounds = []
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        sizes = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
        page.get(url + path)
        if path == "/":
            ranked(page, QUERY, "\n".join([*DOCUMENTS, "w" * 400]))
        else:
            assert found(page, "section")
        widths = page.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert widths[0] <= widths[1] == 360
        grounds.append(
            page.execute_script("return getComputedStyle(document.body).backgroundColor")
        )
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert len(set(grounds)) == 2


def test_the_description_shows_every_route_and_field(page, url):
    page.get(f"{url}/docs")
    assert found(page, "section")
    shown = found(page, "body")[0].get_property("textContent")
    described = httpx.get(f"{url}/openapi.json", timeout=60).json()
    for route in described["paths"]:
        assert route in shown
    for name in ("RerankRequest", "TeiRerankRequest", "RerankResponse", "Info"):
        for field, about in described["components"]["schemas"][name]["properties"].items():
            assert field in shown
            assert about.get("description", "").replace("`", "") in shown
