"""`bge-rerank rerank --query`: ranks the documents of one query."""

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bge_rerank_adapters.calls.display import places_up
from bge_rerank_adapters.calls.items import Item
from bge_rerank_adapters.calls.limits import Limits
from bge_rerank_adapters.calls.ranking import Ranking
from bge_rerank_adapters.settings import EngineSettings


def documents_of(arguments: Sequence[str]) -> list[str]:
    """Return the given documents, or the lines of standard input if there are none."""
    if arguments:
        return list(arguments)
    lines: Iterable[bytes] = sys.stdin.buffer
    texts = (line.decode("utf-8", "replace").rstrip("\r\n") for line in lines)
    return [text for text in texts if text.strip()]


def answer(
    query: str,
    documents: list[str],
    settings: EngineSettings,
    *,
    limits: Limits,
    as_json: bool,
) -> None:
    """Print the ranking: a table with whole texts, or a line of JSON.

    Raises:
        RerankError: The model cannot be loaded, or failed.
    """
    # Imported here, since torch takes seconds.
    from bge_rerank_adapters.engine.reranker import Reranker

    with Reranker.from_settings(settings) as engine:
        ranking = engine.rerank(query, documents, **limits.to_dict())
    if as_json:
        item = Item(1, query, documents, [{} for _ in documents])
        sys.stdout.buffer.write(item.to_json(ranking))
        sys.stdout.buffer.flush()
        return
    console = Console()
    if console.is_terminal:
        console.print(_table(query, ranking))
    else:
        # Not every encoding has every character.
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.buffer.write(_columns(ranking).encode(encoding, "replace"))
        sys.stdout.buffer.flush()


def _table(query: str, ranking: Ranking) -> Table:
    table = Table(title=escape(query), title_justify="left")
    for heading in ("rank", "moved", "score"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("document", overflow="fold")
    for cells in _rows(ranking):
        table.add_row(*map(escape, cells))
    return table


def _columns(ranking: Ranking) -> str:
    rows = [("rank", "moved", "score", "document"), *_rows(ranking)]
    return "".join(f"{a:>4}  {b:>5}  {c:>5}  {d}\n" for a, b, c, d in rows)


def _rows(ranking: Ranking) -> Iterable[tuple[str, str, str, str]]:
    for rank, each in enumerate(ranking, start=1):
        places = places_up(rank, each.index)
        # One line for each document, without line ends in its text.
        text = " ".join(each.text.encode("utf-8", "replace").decode().split())
        yield str(rank), f"{places:+d}" if places else "=", f"{each.score:.3f}", text
