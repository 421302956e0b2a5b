"""Reads TREC runs for `bge-rerank rerank`, with the texts of a BEIR folder."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from bge_rerank_adapters.calls.items import Bad, Item
from bge_rerank_adapters.calls.trec import parse_run
from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.evaluation.collection import document_text, parse_row, read_rows


@dataclass(slots=True)
class _Group:
    """The consecutive readable lines of one query."""

    number: int
    query: str
    names: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


class RunReader:
    """Reads a TREC run with the texts of a BEIR folder, one query at a time.

    Only ids and offsets of the corpus are held in memory; its file is open until `close`, or the
    end of a `with` block.
    """

    def __init__(self, folder: Path) -> None:
        """Index the documents of `corpus.jsonl`, and read `queries.jsonl`.

        Raises:
            SettingsError: One of the files is missing or cannot be read; the message names it.
        """
        corpus, queries = self.files = (folder / "corpus.jsonl", folder / "queries.jsonl")
        self._offsets = {row.name: row.offset for row in read_rows(corpus)}
        self._queries = {row.name: row.values["text"] for row in read_rows(queries)}
        self._corpus = corpus.open("rb")

    def __enter__(self) -> Self:
        """Return the reader itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the corpus."""
        self.close()

    def close(self) -> None:
        """Close the corpus; nothing can be read afterwards."""
        self._corpus.close()

    def read(self, lines: Iterable[bytes]) -> Iterator[Item | Bad]:
        """Yield the item of each query, whose lines must be consecutive.

        An unreadable line is yielded by itself, and does not separate the lines around it.
        """
        seen: set[str] = set()
        for group in _groups(lines):
            if isinstance(group, Bad):
                yield group
                continue
            wrong = self._wrong(group, seen)
            seen.add(group.query)
            source = "\n".join(group.lines)
            yield Bad(group.number, wrong, source) if wrong else self._item(group, source)

    def _wrong(self, group: _Group, seen: set[str]) -> str:
        if group.query in seen:
            return f"query {group.query} came before; sort the run by query."
        if group.query not in self._queries:
            return f"query {group.query} is not in queries.jsonl."
        unknown = next((name for name in group.names if name not in self._offsets), None)
        if unknown is None:
            return ""
        return f"document {unknown} of query {group.query} is not in corpus.jsonl."

    def _item(self, group: _Group, source: str) -> Item:
        texts = [self._text(name) for name in group.names]
        return Item(
            group.number,
            self._queries[group.query],
            texts,
            [{"id": name} for name in group.names],
            {"id": group.query},
            source=source,
            size=sum(map(len, texts)),
        )

    def _text(self, name: str) -> str:
        self._corpus.seek(self._offsets[name])
        return document_text(parse_row(self._corpus.readline())[1])


def _groups(lines: Iterable[bytes]) -> Iterator[_Group | Bad]:
    """Yield the lines of each query together, and unreadable lines before them."""
    group: _Group | None = None
    for number, line in enumerate(lines, start=1):
        text = line.decode("utf-8", "replace").rstrip("\r\n")
        try:
            rows = list(parse_run([text], name="the run"))
        except SettingsError:
            wrong = f"must be query, Q0, document, rank, score, tag, got {text.strip()[:80]!r}."
            yield Bad(number, wrong, text)
            continue
        for query, document, _ in rows:
            if group is not None and group.query != query:
                yield group
                group = None
            group = group or _Group(number, query)
            group.names.append(document)
            group.lines.append(text)
    if group is not None:
        yield group
