"""TREC runs as what `bge-rerank rerank` reads, with the texts of a BEIR folder."""

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
    """The lines of one query that stand together, those that could be read."""

    number: int
    query: str
    names: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


class RunReader:
    """Reads a TREC run, with the texts of a BEIR folder, a query at a time.

    Of the corpus only ids and places in the file are held in memory; its file is open until
    `close`, or the end of a `with`.
    """

    def __init__(self, folder: Path) -> None:
        """Find every document of `corpus.jsonl`, and read `queries.jsonl`.

        Raises:
            SettingsError: One of the files is missing or cannot be read; the message names it.
        """
        corpus, queries = self.files = (folder / "corpus.jsonl", folder / "queries.jsonl")
        self._places = {row.name: row.offset for row in read_rows(corpus)}
        self._queries = {row.name: row.values["text"] for row in read_rows(queries)}
        self._corpus = corpus.open("rb")

    def __enter__(self) -> Self:
        """Return the reader itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the corpus."""
        self.close()

    def close(self) -> None:
        """Close the corpus; nothing can be read after."""
        self._corpus.close()

    def read(self, lines: Iterable[bytes]) -> Iterator[Item | Bad]:
        """Yield the item of each query; the lines of a query must stand together.

        A line that cannot be read is yielded by itself, and parts nothing.
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
        unknown = next((name for name in group.names if name not in self._places), None)
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
        self._corpus.seek(self._places[name])
        return document_text(parse_row(self._corpus.readline())[1])


def _groups(lines: Iterable[bytes]) -> Iterator[_Group | Bad]:
    """Yield the lines of each query together, and before them those that cannot be read."""
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
