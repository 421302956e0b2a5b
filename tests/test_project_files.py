"""What CONTRIBUTING.md, SECURITY.md and the templates say is there."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def text(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md", "docs/how_it_works.md"])
def test_every_path_is_there(page):
    # What is made is not there before.
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"build", "dist"}
    quoted = re.findall(r"[`(]([\w./-]+/[\w./-]+)(?:::\w+)?[`)]", text(page))
    paths = {each for each in quoted if each.split("/")[0] in folders and "HOST" not in each}
    assert paths
    assert not [each for each in paths if not (ROOT / each).exists()]


def test_every_promise_of_security_has_its_test():
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", text("SECURITY.md"))
    assert len(named) > 20
    for file, name in named:
        assert re.search(rf"^(async )?def {name}\(", text(file), re.MULTILINE), f"{file}::{name}"


def test_names_in_contributing_are_in_the_code():
    code = "".join(path.read_text("utf-8") for path in ROOT.glob("bge_rerank_adapters/**/*.py"))
    code += "".join(path.read_text("utf-8") for path in ROOT.glob("tests/*.py"))
    for name in re.findall(r"`(test_\w+|[A-Z]\w+[a-z]\w+|[A-Z]{4,})`", text("CONTRIBUTING.md")):
        assert re.search(rf"\b{name}\b", code), name


def test_make_knows_the_targets_that_contributing_names():
    named = set(re.findall(r"`make (?:[A-Z]+=\S+ )?([\w-]+)`", text("CONTRIBUTING.md")))
    assert named
    assert named <= set(re.findall(r"(?m)^([\w-]+):", text("Makefile")))


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_is_a_form(path):
    form = yaml.safe_load(path.read_text("utf-8"))
    if path.stem == "config":
        assert form["blank_issues_enabled"] is True
        return
    assert {"name", "description", "body"} <= set(form)
    ids = [each["id"] for each in form["body"] if each["type"] != "markdown"]
    assert len(ids) == len(set(ids))
    assert all("label" in each["attributes"] for each in form["body"] if "id" in each)
