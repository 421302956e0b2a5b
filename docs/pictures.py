"""Draws the pictures of README and docs from real runs: `make pictures`.

`ranking.svg` is a question of the bundled collection, ranked now by BM25 and by the bundled
checkpoint. `speed.svg` shows the measured times that `pictures/speed.json` keeps, with the machine
and the command of each.
"""

import argparse
import json
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib import pyplot as plt

from bge_rerank_adapters import RankedDocument, Reranker
from bge_rerank_adapters.evaluation import bm25, sample_collection

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOLDER = Path(__file__).parent / "pictures"
QUESTION = "en-56e0fc3f7aa994140058e878"
CANDIDATES = 5
LETTERS, LINES = 30, 3
# Colours that stay apart for most colour-blind eyes (Okabe and Ito, 2008), on a light ground.
OURS, PEERS, QUIET, INK, GROUND = "#0072b2", "#9aa5b1", "#c3ccd4", "#1f2933", "#f4f7f9"
STYLE = {
    "axes.edgecolor": INK,
    "axes.facecolor": GROUND,
    "figure.facecolor": GROUND,
    "font.size": 10,
    "savefig.facecolor": GROUND,
    # Text stays text, and equal pictures are equal files.
    "svg.fonttype": "none",
    "svg.hashsalt": "bge-rerank-adapters",
    "text.color": INK,
}


def ranked_example() -> tuple[str, str, list[RankedDocument]]:
    """Return a question, the text of its answer, and BM25's best documents, reranked."""
    collection = sample_collection()
    query = collection.queries[QUESTION]
    (answer,) = collection.judgements[QUESTION]
    found = list(bm25(collection, depth=CANDIDATES)[QUESTION])
    with Reranker("tiny", device="cpu", dtype="float32") as reranker:
        ranking = reranker.rerank(query, [collection.documents[each] for each in found])
    return query, collection.documents[answer], ranking


def draw_ranking(path: Path) -> None:
    """Draw BM25's order at the left and the reranked one at the right, joined by lines."""
    query, answer, ranking = ranked_example()
    figure, axes = plt.subplots(figsize=(7.4, 5), layout="constrained")
    axes.set(xlim=(0, 100), ylim=(CANDIDATES + 0.1, -1.75))
    axes.axis("off")
    axes.text(50, -1.3, f"“{query}”", ha="center", size=13, weight="bold")
    axes.text(0, -0.4, "found by BM25", size=11, weight="bold")
    axes.text(53, -0.4, "reranked, with the score", size=11, weight="bold")
    for place, each in enumerate(ranking):
        colour, weight = (OURS, "bold") if each.text == answer else (INK, "normal")
        lines = _shown(each.text)
        look = {"color": colour, "va": "center", "linespacing": 1.3}
        axes.text(0, each.index + 0.5, str(each.index + 1), **look)
        axes.text(3, each.index + 0.5, lines, **look)
        axes.text(53, place + 0.5, f"{each.score:.2f}", weight=weight, **look)
        axes.text(61, place + 0.5, lines, weight=weight, **look)
        axes.annotate(
            "",
            (52, place + 0.5),
            (39, each.index + 0.5),
            arrowprops={"arrowstyle": "-|>", "color": OURS if each.text == answer else QUIET},
        )
    _save(figure, path)


def _shown(text: str) -> str:
    lines = wrap(text, LETTERS, max_lines=LINES, placeholder=" …", break_on_hyphens=False)
    return "\n".join(lines)


def draw_speed(path: Path) -> None:
    """Draw how long each contender takes beside bfloat16 here, a panel for each processor."""
    measured = json.loads((FOLDER / "speed.json").read_text("utf-8"))
    figure, panels = plt.subplots(1, 2, figsize=(7.4, 4.4), sharey=True, layout="constrained")
    for axes, machine in zip(panels, measured["machines"], strict=True):
        _draw_machine(axes, machine)
    panels[0].invert_yaxis()
    figure.suptitle(f"Time for {measured['task']}", size=11, weight="bold")
    figure.supxlabel("times the time of this package in bfloat16 (shorter is faster)", size=10)
    _save(figure, path)


def _draw_machine(axes: "Axes", machine: dict[str, Any]) -> None:
    names = list(machine["times_bfloat16"])
    times = [each["times"] for each in machine["times_bfloat16"].values()]
    colours = [OURS if name.startswith("this package") else PEERS for name in names]
    bars = axes.barh(names, times, color=colours, height=0.7)
    axes.bar_label(bars, labels=[f"{each:.3g}" for each in times], padding=3)
    axes.set_xlim(0, 1.2 * max(times))
    axes.set_title(f"{machine['processor']}\n1 is {machine['bfloat16_seconds']:.3g} s", size=10)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(bottom=False, labelbottom=False, left=False)


def _save(figure: Any, path: Path) -> None:
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Draw both pictures into a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    folder = parser.parse_args().folder
    with mpl.rc_context(STYLE):
        draw_ranking(folder / "ranking.svg")
        draw_speed(folder / "speed.svg")


if __name__ == "__main__":
    main()
