"""Shows a ranking as a table in a notebook, columns in a terminal, or records for pandas."""

import re
import shutil
import textwrap
from collections.abc import Sequence
from html import escape
from typing import Any

from bge_rerank_adapters.calls.ranked_document import RankedDocument

# Characters of a text in a notebook: enough to judge it, and a ranking still fits a screen.
_SHOWN_CHARACTERS = 400
_NARROWEST_TEXT = 20
_SURROGATE = re.compile("[\ud800-\udfff]")
_CELL = "style='text-align:left;vertical-align:top'"
_BAR = "display:inline-block;width:60px;border:1px solid #888;vertical-align:middle"
_FILLED = "display:block;height:.7em;background:#4c78a8"


def to_records(ranking: Sequence[RankedDocument]) -> list[dict[str, Any]]:
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


def to_html(ranking: Sequence[RankedDocument]) -> str:
    """Return an HTML table: rank, movement against the input order, score, text.

    The best window is marked if it is not the whole text.
    """
    rows = "".join(_row(rank, each) for rank, each in enumerate(ranking, start=1))
    head = "".join(f"<th {_CELL}>{name}</th>" for name in ("rank", "moved", "score", "text"))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def to_text(ranking: Sequence[RankedDocument], *, width: int | None = None) -> str:
    """Return plain columns: rank, movement, score and as much of each text as fits.

    All but the texts is ASCII, which any console can show. Lone surrogates, which no console can
    show, become question marks. A movement of `+2` is two places up.

    Args:
        ranking: Best first; if empty, only the header is returned.
        width: Columns of the terminal; `None` asks the terminal.
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
    """Return how many places a result has moved up; negative if it moved down.

    Args:
        rank: Counted from 1.
        index: Its place in the input, counted from 0.
    """
    return index + 1 - rank


def _encodable(text: str) -> str:
    # The length stays the same, since spans count characters.
    return _SURROGATE.sub("?", text)


def _row(rank: int, each: RankedDocument) -> str:
    bar = f"<span style='{_BAR}'><span style='{_FILLED};width:{each.score:.0%}'></span></span>"
    places = places_up(rank, each.index)
    moved = f"↑{places}" if places > 0 else f"↓{-places}" if places < 0 else "="
    score = f"<span style='white-space:nowrap'>{bar}&nbsp;{each.score:.3f}</span>"
    cells = (str(rank), moved, score, _text(each))
    return f"<tr>{''.join(f'<td {_CELL}>{cell}</td>' for cell in cells)}</tr>"


def _text(each: RankedDocument) -> str:
    """Return the text as HTML with its best window marked, shortened at both ends."""
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
