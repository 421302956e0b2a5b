"""A ranking as people see it: a table in a notebook, columns in a terminal, records for pandas."""

import re
import shutil
import textwrap
from collections.abc import Sequence
from html import escape
from typing import Any, Protocol

# Of a text, in a notebook: enough to judge it, and a whole ranking still fits a screen.
_SHOWN_CHARACTERS = 400
_NARROWEST_TEXT = 20
_SURROGATE = re.compile("[\ud800-\udfff]")
_CELL = "style='text-align:left;vertical-align:top'"
_BAR = "display:inline-block;width:60px;border:1px solid #888;vertical-align:middle"
_FILLED = "display:block;height:.7em;background:#4c78a8"


class Shown(Protocol):
    """What of a ranked document is shown; see `RankedDocument`."""

    @property
    def index(self) -> int:
        """Its place in the input, counted from 0."""
        ...

    @property
    def score(self) -> float:
        """In [0, 1]."""
        ...

    @property
    def logit(self) -> float | None:
        """Unbounded."""
        ...

    @property
    def text(self) -> str:
        """All of it."""
        ...

    @property
    def truncated(self) -> bool:
        """Whether its end was cut off."""
        ...

    @property
    def query_truncated(self) -> bool:
        """Whether the query was cut."""
        ...

    @property
    def span(self) -> tuple[int, int] | None:
        """The characters of its best window."""
        ...


def to_records(ranking: Sequence[Shown]) -> list[dict[str, Any]]:
    """Return a plain dict for each result, best first: `pandas.DataFrame(records)` is a table.

    `rank` counts from 1, `index` from 0; `span` is `[start, end]` in characters, or `None`.
    """
    return [
        {
            "rank": rank,
            "index": each.index,
            "score": each.score,
            "logit": each.logit,
            "truncated": each.truncated,
            "query_truncated": each.query_truncated,
            "span": None if each.span is None else list(each.span),
            "text": each.text,
        }
        for rank, each in enumerate(ranking, start=1)
    ]


def to_html(ranking: Sequence[Shown]) -> str:
    """Return a table of HTML: rank, movement against the input order, score, text.

    The characters of the best window are marked where it is not the whole text.
    """
    rows = "".join(_row(rank, each) for rank, each in enumerate(ranking, start=1))
    head = "".join(f"<th {_CELL}>{name}</th>" for name in ("rank", "moved", "score", "text"))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def to_text(ranking: Sequence[Shown], *, width: int | None = None) -> str:
    """Return plain columns: rank, movement, score and as much of each text as fits.

    All but the texts is ASCII, which any console can show; lone surrogates, which none can, become
    question marks. A movement of `+2` is two places up.

    Args:
        ranking: Best first; of none only the head is left.
        width: Columns of the terminal; `None` asks it.
    """
    columns = width or shutil.get_terminal_size().columns
    lines = ["rank  moved  score  text"]
    room = max(columns - len(lines[0]) + len("text"), _NARROWEST_TEXT)
    for rank, each in enumerate(ranking, start=1):
        start, end = each.span or (0, len(each.text))
        text = textwrap.shorten(_encodable(each.text[start:end]), room, placeholder=" ...")
        places = places_up(rank, each.index)
        moved = f"{places:+d}" if places else "="
        lines.append(f"{rank:>4}  {moved:>5}  {each.score:.3f}  {text}")
    return "\n".join(lines)


def places_up(rank: int, index: int) -> int:
    """Return how many places up a result has come; below 0 it went down.

    Args:
        rank: Counted from 1.
        index: Its place in the input, counted from 0.
    """
    return index + 1 - rank


def _encodable(text: str) -> str:
    # As long as before, for the spans count characters.
    return _SURROGATE.sub("?", text)


def _row(rank: int, each: Shown) -> str:
    bar = f"<span style='{_BAR}'><span style='{_FILLED};width:{each.score:.0%}'></span></span>"
    places = places_up(rank, each.index)
    moved = f"↑{places}" if places > 0 else f"↓{-places}" if places < 0 else "="
    score = f"<span style='white-space:nowrap'>{bar}&nbsp;{each.score:.3f}</span>"
    cells = (str(rank), moved, score, _text(each))
    return f"<tr>{''.join(f'<td {_CELL}>{cell}</td>' for cell in cells)}</tr>"


def _text(each: Shown) -> str:
    """Return the text for HTML, its best window marked, its far ends left out."""
    text = _encodable(each.text)
    end = len(text)
    if each.span is None or each.span == (0, end):
        return escape(text[:_SHOWN_CHARACTERS]) + ("…" if end > _SHOWN_CHARACTERS else "")
    start, stop = each.span
    around = max((_SHOWN_CHARACTERS - (stop - start)) // 2, _NARROWEST_TEXT)
    first, last = max(start - around, 0), min(stop + around, end)
    return (
        ("…" if first else "")
        + escape(text[first:start])
        + f"<mark>{escape(text[start:stop])}</mark>"
        + escape(text[stop:last])
        + ("…" if last < end else "")
    )
