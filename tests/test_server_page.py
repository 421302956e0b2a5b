"""The page on the server against the server: its variables, endpoints, statuses and metrics."""

import re
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from prometheus_client.parser import text_string_to_metric_families

from bge_rerank_adapters import Reranker
from bge_rerank_adapters.serve import ReplicaSettings, ServerSettings, create_app
from bge_rerank_adapters.serve.settings import variable
from bge_rerank_adapters.settings.table import Row, rows

PAGE = (Path(__file__).parent.parent / "docs" / "serving.md").read_text("utf-8")


def line(row: Row) -> str:
    default = f"{row.default:,g}" if type(row.default) is float else f"{row.default}"
    default = f"{row.default:,}" if type(row.default) is int else default
    default = "`false`" if row.default is False else default
    shown = row.none or ("" if row.default == () else default)
    return f"| `{variable(row.name)}` | {shown}{' ' if shown else ''}| {row.text} |"


@pytest.mark.parametrize("table", [ServerSettings, ReplicaSettings])
def test_a_table_of_variables_is_that_of_the_code(table):
    wanted = "\n".join(["|---|---|---|", *map(line, rows(table).values()), ""])
    assert wanted in PAGE, f"put there:\n{wanted}"


def test_all_endpoints_are_there():
    # The paths' other names and what is for people alone are in no description for tools.
    described = set(create_app(ServerSettings()).openapi()["paths"])
    told = set(re.findall(r"`?(?:GET |POST |, )?(/[\w./{}]*)`", PAGE))
    assert described <= told


def test_all_statuses_are_there():
    answers = create_app(ServerSettings()).openapi()["paths"]["/rerank"]["post"]["responses"]
    told = set(re.findall(r"^\| (\d{3}) \|", PAGE, re.MULTILINE))
    assert set(answers) - {"200"} == told


def test_all_metrics_are_there(reranker: Reranker):
    app = create_app(ServerSettings(), engine=reranker)
    app.state.service.load()
    text = app.state.metrics.text().decode()
    kinds = {each.name: each.type for each in text_string_to_metric_families(text)}
    names = {f"{name}_total" if kind == "counter" else name for name, kind in kinds.items()}
    told = set(re.findall(r"`(bge_rerank_\w+)`", PAGE.split("## Metrics")[1].split("Useful")[0]))
    assert {name for name in names if not name.endswith("_created")} == told
