"""The documentation site builds without warnings and asks no other host for anything."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

ROOT = Path(__file__).parent.parent
# What a browser loads by itself; a link that is clicked may lead elsewhere.
LOADED = {
    "audio": "src",
    "embed": "src",
    "iframe": "src",
    "img": "src",
    "link": "href",
    "object": "data",
    "script": "src",
    "source": "src",
    "video": "src",
}
OUTSIDE = re.compile(r"(?i)(?:url\(\s*['\"]?|@import\s+['\"]?)(?:https?:)?//")


class Loads(HTMLParser):
    """The addresses that a page makes its browser load."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and given.get("rel") in {"canonical", "next", "prev", "search", "index"}:
            return
        self.addresses.append(given.get(LOADED.get(tag, ""), "") or "")
        self.addresses.extend((given.get("srcset") or "").split())


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("sphinx_book_theme")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"]
    done = subprocess.run(
        [*command, "-d", str(folder / "doctrees"), str(ROOT / "docs"), str(folder / "html")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder / "html"


def test_every_page_is_there(site):
    sources = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert sources <= {path.stem for path in site.glob("*.html")}


def test_a_page_loads_nothing_from_another_host(site):
    for page in site.rglob("*.html"):
        loads = Loads()
        loads.feed(page.read_text("utf-8"))
        outside = [each for each in loads.addresses if re.match(r"(?i)(https?:)?//", each)]
        assert loads.addresses, page
        assert not outside, f"{page.name} loads {outside}"


def test_a_style_loads_nothing_from_another_host(site):
    styles = [*site.rglob("*.css"), *site.rglob("*.html")]
    assert any(path.suffix == ".css" for path in styles)
    for style in styles:
        assert not OUTSIDE.search(style.read_text("utf-8")), style.name


def texts(picture: Path) -> list[str]:
    found = ET.parse(picture).iter("{http://www.w3.org/2000/svg}text")  # noqa: S314
    return [" ".join("".join(each.itertext()).split()) for each in found]


def test_the_pictures_are_those_that_the_script_draws(tmp_path):
    for needed in ("bm25s", "Stemmer", "matplotlib"):
        pytest.importorskip(needed)
    script = [sys.executable, str(ROOT / "docs" / "pictures.py"), str(tmp_path)]
    subprocess.run(script, check=True, cwd=ROOT)
    for name in ("ranking.svg", "speed.svg"):
        assert len(texts(tmp_path / name)) > 10
        assert texts(tmp_path / name) == texts(ROOT / "docs" / "pictures" / name), name


def test_the_chart_shows_the_figures_of_the_notes():
    notes = (ROOT / "benchmarks" / "NOTES.md").read_text("utf-8")
    measured = json.loads((ROOT / "docs" / "pictures" / "speed.json").read_text("utf-8"))
    for machine in measured["machines"]:
        for name, each in machine["times_bfloat16"].items():
            assert re.search(rf"(?<![\d.]){each['times']}(?![\d.])", notes), name
