"""What a release rests on: the workflows, one version, and links that hold on the index's page."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import bge_rerank_adapters
from release.absolute_links import absolute_links

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
REPOSITORY = "https://host.example/owner/name"


def steps(workflow: Path) -> list[dict[str, str]]:
    jobs = yaml.safe_load(workflow.read_text("utf-8"))["jobs"].values()
    return [step for job in jobs for step in job["steps"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_commit(workflow):
    used = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert used
    assert [each for each in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", each)] == []


def test_only_the_job_that_publishes_may_publish():
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text("utf-8"))["jobs"]
    publishing = {name for name, job in jobs.items() if "id-token" in job.get("permissions", {})}
    assert publishing == {"publish"}
    assert set(jobs["publish"]["needs"]) == set(jobs) - {"publish"}


def test_the_versions_of_python_are_those_that_the_workflow_tests():
    jobs = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text("utf-8"))["jobs"]
    tested = jobs["test"]["strategy"]["matrix"]["python"]
    named = [
        classifier.rpartition(" ")[2]
        for classifier in PROJECT["project"]["classifiers"]
        if re.search(r":: 3\.\d+$", classifier)
    ]
    assert named == tested
    assert PROJECT["project"]["requires-python"] == f">={tested[0]}"


def test_the_lowest_torch_is_the_one_that_the_workflow_tests():
    steps = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text("utf-8"))["jobs"]
    [command] = [step["run"] for step in steps["floors"]["steps"] if "run" in step]
    [lowest] = re.findall(r"torch>=(\S+?)'", str(PROJECT["project"]["dependencies"]))
    assert command.endswith(f"FLOOR_TORCH={lowest}.0")


def test_the_version_stands_in_one_place():
    assert "version" not in PROJECT["project"]
    version = bge_rerank_adapters.__version__
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.search(r"^## (\S+)", changes, re.MULTILINE)[1] == version
    citation = ROOT / "CITATION.cff"
    if citation.exists():
        assert yaml.safe_load(citation.read_text("utf-8"))["version"] == version


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("[a](docs/a.md#b)", f"[a]({REPOSITORY}/blob/v1/docs/a.md#b)"),
        ("![a](docs/a.png)", f"![a]({REPOSITORY}/raw/v1/docs/a.png)"),
        (
            "[![a](docs/a.svg)](LICENSE)",
            f"[![a]({REPOSITORY}/raw/v1/docs/a.svg)]({REPOSITORY}/blob/v1/LICENSE)",
        ),
        ('<img src="docs/a.png">', f'<img src="{REPOSITORY}/raw/v1/docs/a.png">'),
        ('<source srcset="a.png">', f'<source srcset="{REPOSITORY}/raw/v1/a.png">'),
        ('<a href="docs/a.md">', f'<a href="{REPOSITORY}/blob/v1/docs/a.md">'),
        ("[a](https://b.example/c)", "[a](https://b.example/c)"),
        ("[a](#part) and results[0](b)", f"[a](#part) and results[0]({REPOSITORY}/blob/v1/b)"),
    ],
)
def test_relative_links_are_made_absolute(given, made):
    assert absolute_links(given, REPOSITORY, revision="v1") == made


def test_the_readmes_links_name_files_that_are_there():
    readme = (ROOT / "README.md").read_text("utf-8")
    absolute = absolute_links(readme, REPOSITORY, revision="v1")
    targets = re.findall(rf"{REPOSITORY}/(?:raw|blob)/v1/([^)#\s\"]+)", absolute)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
