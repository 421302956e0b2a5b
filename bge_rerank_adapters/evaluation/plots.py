"""Pictures of a report, with matplotlib."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bge_rerank_adapters.calls.trec import (
    FIRST_STAGE,
    check_file_names,
    file_name,
    make_folder,
)
from bge_rerank_adapters.evaluation.extra import require
from bge_rerank_adapters.evaluation.metrics import NDCG
from bge_rerank_adapters.evaluation.report import Report, best_threshold

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that stay apart for most colour-blind eyes (Okabe and Ito, 2008).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_FIRST_STAGE_COLOUR = "#777777"
_INCHES = (6.4, 4.0)
_BINS = 30


def plot_gain_per_query(report: Report, axes: "Axes | None" = None) -> "Axes":
    """Draw what each query gained in nDCG@10, worst to best; one line for each engine."""
    axes = axes or _new_axes()
    before = report.before.per_query[NDCG]
    for name, colour in _coloured(report):
        after = report.after[name].per_query[NDCG]
        gains = sorted(after[query] - before[query] for query in before)
        axes.step(range(len(gains)), gains, where="mid", color=colour, label=name)
        if len(report.scored) == 1:
            axes.fill_between(range(len(gains)), gains, step="mid", color=colour, alpha=0.25)
    axes.axhline(0, color=_FIRST_STAGE_COLOUR, linewidth=1)
    return _labelled(
        axes, "Gain per query", "queries, from most lost to most gained", f"change in {NDCG}"
    )


def plot_depth(report: Report, axes: "Axes | None" = None) -> "Axes":
    """Draw nDCG@10 against the number of candidates that are reranked."""
    axes = axes or _new_axes()
    for name, colour in _coloured(report):
        curve = report.by_depth(name)
        axes.plot(list(curve), list(curve.values()), marker="o", color=colour, label=name)
    _first_stage_line(axes, report)
    axes.set_xscale("log")
    axes.set_xticks(report.depths(), [str(depth) for depth in report.depths()])
    axes.minorticks_off()
    return _labelled(axes, "How many candidates", "candidates reranked", NDCG)


def plot_quality_and_time(report: Report, axes: "Axes | None" = None) -> "Axes":
    """Draw nDCG@10 against the time of a query: for each engine, several numbers of candidates.

    The times of fewer candidates are those of all, in proportion.
    """
    axes = axes or _new_axes()
    for name, colour in _coloured(report):
        curve = report.by_depth(name)
        all_ms = 1000 * report[name].latency_s()
        times = [all_ms * depth / max(report.depth, 1) for depth in curve]
        axes.plot(times, list(curve.values()), marker="o", color=colour, label=name)
        axes.annotate(
            str(report.depth),
            (times[-1], list(curve.values())[-1]),
            textcoords="offset points",
            xytext=(0, 7),
            ha="center",
            fontsize=8,
        )
    _first_stage_line(axes, report)
    _plain_log_scale(axes)
    return _labelled(axes, "Quality and time", "median time of a query, ms", NDCG)


def plot_scores(report: Report, name: str, axes: "Axes | None" = None) -> "Axes":
    """Draw the scores of relevant and other documents, and the threshold with the highest F1.

    Args:
        report: What was measured.
        name: Which engine's scores.
        axes: Where to draw; `None` makes a picture of its own.
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
    return _labelled(axes, f"Scores of {name}", "score", "part of the documents")


def save_plots(report: Report, folder: str | Path) -> list[Path]:
    """Write every picture of a report as PNG.

    Args:
        report: What was measured.
        folder: Where to; it is made if need be.

    Returns:
        The files written.

    Raises:
        SettingsError: The folder cannot be made, or two engines' files would be one.
    """
    check_file_names(each.name for each in report.scored)
    target = make_folder(folder)
    pictures: dict[str, Callable[[], Any]] = {
        "gain-per-query": lambda: plot_gain_per_query(report),
        "depth": lambda: plot_depth(report),
        "quality-and-time": lambda: plot_quality_and_time(report),
    }
    for each in report.scored:
        pictures[f"scores-{file_name(each.name)}"] = _scores_picture(report, each.name)
    paths = []
    for name, draw in pictures.items():
        paths.append(target / f"{name}.png")
        figure: Any = draw().figure
        figure.savefig(paths[-1], dpi=150)
    return paths


def _scores_picture(report: Report, name: str) -> "Callable[[], Axes]":
    return lambda: plot_scores(report, name)


def _new_axes() -> "Axes":
    """Return the axes of a picture that no window and no global state of pyplot holds."""
    require("matplotlib")
    from matplotlib.figure import Figure

    return Figure(figsize=_INCHES, layout="constrained").subplots()


def _plain_log_scale(axes: "Axes") -> None:
    """Scale the times by their logarithm, and write 20, 50, 100 instead of powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _coloured(report: Report) -> list[tuple[str, str]]:
    return [
        (each.name, _COLOURS[place % len(_COLOURS)]) for place, each in enumerate(report.scored)
    ]


def _first_stage_line(axes: "Axes", report: Report) -> None:
    axes.axhline(
        report.before.mean[NDCG], color=_FIRST_STAGE_COLOUR, linestyle="--", label=FIRST_STAGE
    )


def _labelled(axes: "Axes", title: str, x: str, y: str) -> "Axes":
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(visible=True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return axes
