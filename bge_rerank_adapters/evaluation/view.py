"""Shows a report: a sentence for each engine, and a table, as text or HTML."""

import math
import textwrap
from html import escape

from bge_rerank_adapters.evaluation.measurements import Measurements
from bge_rerank_adapters.evaluation.metrics import NDCG

_COLUMNS = 80
# Engines' names are wrapped, so that several fit side by side into 80 columns.
_MAX_NAME, _MIN_NAME = 22, 8
_CELL = "style='text-align:right'"
_LABEL = "style='text-align:left'"


def title(report: Measurements) -> str:
    """Return the name and size of the collection."""
    return (
        f"{report.collection.name}: {len(report.collection.queries)} queries, "
        f"{len(report.collection.documents)} documents, {report.depth} candidates"
    )


def answer(report: Measurements, name: str) -> str:
    """Return a sentence that says whether reranking helps; see `Report.answer`."""
    test = report.comparison(name)
    queries = len(report.collection.queries)
    before, after = report.before.mean[NDCG], report.after[name].mean[NDCG]
    interval = f"95 % interval {test.low:+.3f} to {test.high:+.3f}"
    if not math.isfinite(test.low):
        interval = "one query has no interval"
    elif test.low > 0:
        return (
            f"Yes, {name} helps: {NDCG} rises by {test.difference:.3f} ({interval}), from "
            f"{before:.3f} to {after:.3f}; of {queries} queries {test.better} get better and "
            f"{test.worse} worse."
        )
    elif test.high < 0:
        return (
            f"No, {name} harms: {NDCG} falls by {-test.difference:.3f} ({interval}), from "
            f"{before:.3f} to {after:.3f}; of {queries} queries {test.better} get better and "
            f"{test.worse} worse."
        )
    return (
        f"Whether {name} helps cannot be told from {queries} queries: {NDCG} changes by "
        f"{test.difference:+.3f} ({interval}); {test.better} get better and {test.worse} worse."
    )


def rows(report: Measurements) -> list[list[str]]:
    """Return the table: a header with the names of first stage and engines, then a row each."""
    engines = [each.name for each in report.scored]
    table = [["", report.first_stage_name, *engines]]
    for metric, value in report.before.mean.items():
        after = [f"{report.after[name].mean[metric]:.4f}" for name in engines]
        table.append([_metric_name(metric), f"{value:.4f}", *after])
    tests = [report.comparison(name) for name in engines]
    for label, cells in (
        (f"change in {NDCG}", [f"{test.difference:+.4f}" for test in tests]),
        ("  95 % interval from", [f"{test.low:+.4f}" for test in tests]),
        ("  to", [f"{test.high:+.4f}" for test in tests]),
        ("  p of a paired t-test", [f"{test.p_value:.2g}" for test in tests]),
        ("queries that get better", [str(test.better) for test in tests]),
        ("queries that get worse", [str(test.worse) for test in tests]),
        ("half of the queries within, ms", [_ms(each.latency_s()) for each in report.scored]),
        ("95 % of the queries within, ms", [_ms(each.latency_s(0.95)) for each in report.scored]),
        ("pairs a second", [f"{each.passages_per_s:.0f}" for each in report.scored]),
        ("documents cut", [str(each.truncated) for each in report.scored]),
        ("queries cut", [str(each.queries_truncated) for each in report.scored]),
    ):
        table.append([label, "", *cells])
    return table


def to_text(report: Measurements) -> str:
    """Return the answers and the table as plain text, for 80 columns."""
    head, *body = rows(report)
    label = max(len(row[0]) for row in body)
    room = (_COLUMNS - label) // max(len(head) - 1, 1) - 2
    room = min(max(room, _MIN_NAME), _MAX_NAME)
    folded = [textwrap.wrap(name, room, break_on_hyphens=True) or [""] for name in head]
    lines = max(map(len, folded))
    heads = [[""] * (lines - len(name)) + name for name in folded]
    table = [[name[line] for name in heads] for line in range(lines)] + body
    widths = [max(len(row[place]) for row in table) for place in range(len(head))]
    text = [
        "  ".join(
            cell.ljust(wide) if place == 0 else cell.rjust(wide)
            for place, (cell, wide) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    answers = [textwrap.fill(answer(report, each.name), _COLUMNS) for each in report.scored]
    return "\n".join([title(report), "", *answers, "", *text])


def to_html(report: Measurements) -> str:
    """Return the answers and the table for a notebook."""
    head, *body = rows(report)
    answers = "".join(f"<p>{escape(answer(report, each.name))}</p>" for each in report.scored)
    heads = "".join(f"<th {_CELL}>{escape(name)}</th>" for name in head)
    lines = "".join(
        f"<tr><td {_LABEL}>{escape(row[0].strip())}</td>"
        + "".join(f"<td {_CELL}>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in body
    )
    return (
        f"<p><b>{escape(title(report))}</b></p>{answers}"
        f"<table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table>"
    )


def _metric_name(metric: str) -> str:
    return metric.replace("R@", "recall@") if metric.startswith("R@") else metric


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:.0f}"
