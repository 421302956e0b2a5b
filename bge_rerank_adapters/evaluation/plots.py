"""Plots of a report, with matplotlib."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bge_rerank_adapters.calls.extras import require
from bge_rerank_adapters.evaluation.metrics import NDCG, Comparison
from bge_rerank_adapters.evaluation.report import Report, best_threshold
from bge_rerank_adapters.evaluation.result_files import check_file_names, file_name, make_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that most colour-blind people can distinguish (Okabe and Ito, 2008).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_FIRST_STAGE_COLOUR = "#777777"
_MARKERS = ("o", "s", "^", "D", "v")
_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_INCHES = (6.4, 4.0)
# If times differ by more than this factor, their scale is logarithmic.
_LOG_SCALE_FACTOR = 10
_BINS = 30


def plot_gain_per_query(report: Report, axes: "Axes | None" = None) -> "Axes":
    """Draw the gain of each query in nDCG@10, worst to best; one line for each engine."""
    axes = axes or _new_axes()
    before = report.before.per_query[NDCG]
    for name, style in _styled(report):
        after, test = report.after[name].per_query[NDCG], report.comparison(name)
        gains = sorted(after[query] - before[query] for query in before)
        label = f"{name}: {test.difference:+.3f} ({test.low:+.3f} to {test.high:+.3f})"
        style = {**style, "marker": None}
        axes.step(range(1, len(gains) + 1), gains, where="mid", label=label, **style)
    axes.axhline(0, color=_FIRST_STAGE_COLOUR, linewidth=1)
    axes.set_xlim(0.5, len(before) + 0.5)
    highest = max(0.1, *(abs(end) for end in axes.get_ylim()))
    axes.set_ylim(-highest, highest)
    labelled = _labelled(
        axes,
        report,
        "Gain per query",
        "queries, from most lost to most gained",
        f"change in {NDCG}",
    )
    axes.legend(frameon=False, fontsize=9, title="mean (95 % interval)", title_fontsize=9)
    return labelled


def plot_depth(report: Report, axes: "Axes | None" = None) -> "Axes":
    """Draw nDCG@10 against the number of candidates that are reranked, with 95% intervals.

    An interval is that of the difference from the first stage, which is drawn at 0 candidates.
    """
    axes = axes or _new_axes()
    # At equal distances, since most changes happen at few candidates.
    depths = [0, *report.depths()]
    for name, style in _styled(report):
        gains = report.gain_by_depth(name)
        curve = [(place, gains[depth]) for place, depth in enumerate(depths) if depth]
        _draw_curve(axes, report, [(0.0, None), *curve], name, style)
    _first_stage_line(axes, report)
    axes.set_xticks(range(len(depths)), [str(depth) for depth in depths])
    axes.set_xlim(0, len(depths) - 1 + 0.2)
    return _labelled(axes, report, "How many candidates", "candidates reranked", NDCG)


def plot_quality_and_time(report: Report, axes: "Axes | None" = None) -> "Axes":
    """Draw nDCG@10 against the median measured time of a query, with 95% intervals.

    With `evaluate(..., time_depths=True)` there is a point for each number of candidates that was
    timed, otherwise one for all candidates.
    """
    axes = axes or _new_axes()
    slowest = []
    for name, style in _styled(report):
        scored, gains = report[name], report.gain_by_depth(name)
        times = scored.depth_seconds or {report.depth: scored.latency_s()}
        curve = [(1000 * seconds, gains[depth]) for depth, seconds in times.items()]
        _draw_curve(axes, report, curve, name, style, band=False)
        slowest.append(curve[-1][0])
        for depth, (x, gain) in zip(times, curve, strict=True):
            _number_point(axes, depth, x, report.before.mean[NDCG] + gain.difference)
    _first_stage_line(axes, report)
    if max(slowest) > _LOG_SCALE_FACTOR * min(slowest):
        _plain_log_scale(axes)
    else:
        axes.set_xlim(0, 1.05 * max(slowest))
    label = "median time of a query, ms; numbers are candidates reranked"
    return _labelled(axes, report, "Quality and time", label, NDCG)


def _draw_curve(
    axes: "Axes",
    report: Report,
    curve: Sequence[tuple[float, Comparison | None]],
    name: str,
    style: dict[str, Any],
    *,
    band: bool = True,
) -> None:
    """Draw points with their intervals, as a band or as a line through each point.

    A gain of `None` is the first stage itself.
    """
    start = report.before.mean[NDCG]
    points = [(x, start, start, start) for x, gain in curve if gain is None]
    points += [
        (x, start + gain.difference, start + gain.low, start + gain.high)
        for x, gain in curve
        if gain is not None
    ]
    x, middle, low, high = zip(*points, strict=True)
    axes.plot(x, middle, label=name, **style)
    if not all(map(math.isfinite, (*low, *high))):
        return  # a single query has no interval
    if band:
        axes.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
    else:
        axes.vlines(x, low, high, color=style["color"], linewidth=1)


def _number_point(axes: "Axes", depth: int, x: float, y: float) -> None:
    axes.annotate(
        str(depth), (x, y), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8
    )


def plot_scores(report: Report, name: str, axes: "Axes | None" = None) -> "Axes":
    """Draw the scores of relevant and other documents, and the threshold with the highest F1.

    Args:
        report: The report.
        name: The engine's name.
        axes: Where to draw; `None` makes a new figure.
    """
    axes = axes or _new_axes()
    relevant, other = report.scores(name)
    threshold, f1 = best_threshold(relevant, other)
    edges = [place / _BINS for place in range(_BINS + 1)]
    for values, label, colour in (
        (other, f"other ({len(other)})", _FIRST_STAGE_COLOUR),
        (relevant, f"relevant ({len(relevant)})", _COLOURS[0]),
    ):
        if not values:
            continue
        weights = [1 / len(values)] * len(values)
        axes.hist(values, edges, weights=weights, alpha=0.6, color=colour, label=label)
    axes.axvline(
        threshold,
        color=_COLOURS[1],
        linestyle="--",
        label=f"threshold {threshold:.3f} (F1 {f1:.2f})",
    )
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    return _labelled(axes, report, f"Scores of {name}", "score", "part of the documents")


def save_plots(report: Report, folder: str | Path) -> list[Path]:
    """Write all plots of a report as PNG.

    Args:
        report: The report.
        folder: The folder, created if it is missing.

    Returns:
        The files written.

    Raises:
        SettingsError: The folder cannot be created, or two engines' files would be the same.
    """
    check_file_names(each.name for each in report.scored)
    target = make_folder(folder)
    pictures: dict[str, Callable[[], Any]] = {
        "gain-per-query": partial(plot_gain_per_query, report),
        "depth": partial(plot_depth, report),
        "quality-and-time": partial(plot_quality_and_time, report),
    }
    for each in report.scored:
        pictures[f"scores-{file_name(each.name)}"] = partial(plot_scores, report, each.name)
    paths = []
    for name, draw in pictures.items():
        paths.append(target / f"{name}.png")
        figure: Any = draw().figure
        figure.savefig(paths[-1], dpi=150)
    return paths


def _new_axes() -> "Axes":
    """Return the axes of a new figure, made without pyplot and its global state."""
    require("matplotlib", of="evaluation", extra="eval")
    from matplotlib.figure import Figure

    return Figure(figsize=_INCHES, layout="constrained").subplots()


def _plain_log_scale(axes: "Axes") -> None:
    """Make the scale of times logarithmic, labelled 20, 50, 100 instead of powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _styled(report: Report) -> list[tuple[str, dict[str, Any]]]:
    """Return the line style of each engine.

    Later lines are drawn over earlier ones and are thinner, so that equal lines are all visible.
    """
    count = len(report.scored)
    return [
        (
            each.name,
            {
                "color": _COLOURS[place % len(_COLOURS)],
                "marker": _MARKERS[place % len(_MARKERS)],
                "markersize": 9 - 5 * place / max(count - 1, 1),
                "linestyle": "-" if place == 0 else _DASHES[place % len(_DASHES)],
                "linewidth": 4.0 - 2.5 * place / max(count - 1, 1) if count > 1 else 2.0,
            },
        )
        for place, each in enumerate(report.scored)
    ]


def _first_stage_line(axes: "Axes", report: Report) -> None:
    axes.axhline(
        report.before.mean[NDCG],
        color=_FIRST_STAGE_COLOUR,
        linestyle=":",
        label=report.first_stage_name,
    )


def _labelled(axes: "Axes", report: Report, title: str, x: str, y: str) -> "Axes":
    queries = len(report.collection.queries)
    axes.set(title=f"{title} ({queries} queries of {report.collection.name})", xlabel=x, ylabel=y)
    axes.grid(visible=True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return axes
