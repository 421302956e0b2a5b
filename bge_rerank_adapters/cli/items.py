"""What `bge-rerank rerank` reads and writes: one item is a query with its documents."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from bge_rerank_adapters.errors import InputTypeError, SettingsError
from bge_rerank_adapters.evaluation.runs import parse_run, run_lines
from bge_rerank_adapters.ranking import RankedDocument


@dataclass(frozen=True, slots=True)
class Item:
    """One query with its documents.

    Attributes:
        line: Number of the input's line where it begins, counted from 1.
        query: The question.
        texts: The documents' texts.
        documents: What is known of each document besides, its id among it.
        extra: What is known of the query besides.
        size: How much of the input it is, in bytes or characters.
    """

    line: int
    query: str
    texts: list[str]
    documents: list[dict[str, Any]]
    extra: dict[str, Any] = field(default_factory=dict)
    size: int = 0

    def to_json(self, ranked: Iterable[RankedDocument]) -> bytes:
        """Return the line that tells the results, with all else that was in the input."""
        results = [
            {**self.documents[each.index], "text": each.text, **_told(each)} for each in ranked
        ]
        return _line({**self.extra, "query": self.query, "results": results})

    def to_trec(self, ranked: Iterable[RankedDocument]) -> bytes:
        """Return a TREC run's lines; what has no id is called by line number or index."""
        query = _id(self.extra, self.line)
        found = {
            _id(self.documents[each.index], each.index): (
                each.score if each.logit is None else each.logit
            )
            for each in ranked
        }
        return "".join(run_lines(query, found, tag="bge-rerank")).encode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class Bad:
    """A part of the input that is no item.

    Attributes:
        line: Its number, counted from 1.
        reason: What is wrong with it.
        text: The line itself.
    """

    line: int
    reason: str
    text: str

    def to_json(self) -> bytes:
        """Return the line that puts it aside."""
        return _line({"line": self.line, "error": self.reason, "input": self.text})


def read_jsonl(lines: Iterable[bytes]) -> Iterator[Item | Bad]:
    """Yield the item of each line that is not blank.

    A line is an object with a `query` and `documents`, each of which is a text or an object with a
    `text`; all its other fields are kept.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield replace(_item(number, json.loads(line)), size=len(line))
        except (ValueError, RecursionError) as error:
            # json's own error, bytes that are not UTF-8, or brackets within brackets without end
            yield Bad(number, f"not JSON: {error}", line.decode("utf-8", "replace").rstrip("\n"))
        except InputTypeError as error:
            yield Bad(number, str(error), line.decode("utf-8", "replace").rstrip("\n"))


def _item(number: int, row: Any) -> Item:
    if not isinstance(row, dict):
        raise InputTypeError(f"must be an object with query and documents, got {_kind(row)}.")
    query, documents = row.get("query"), row.get("documents")
    if not isinstance(query, str):
        raise InputTypeError(f"query must be a text, got {_kind(query)}.")
    if not isinstance(documents, list):
        raise InputTypeError(f"documents must be a list, got {_kind(documents)}.")
    texts, known = [], []
    for index, document in enumerate(documents):
        text = document.get("text") if isinstance(document, dict) else document
        if not isinstance(text, str):
            raise InputTypeError(
                f"documents[{index}] must be a text or an object with a text, got "
                f"{_kind(document)}."
            )
        texts.append(text)
        known.append(document if isinstance(document, dict) else {})
    extra = {name: value for name, value in row.items() if name not in ("query", "documents")}
    return Item(number, query, texts, known, extra)


class RunReader:
    """Reads a TREC run, with the texts of a BEIR folder, a query at a time.

    Of the corpus only ids and places in the file are held in memory.
    """

    def __init__(self, folder: Path) -> None:
        """Find every document of `corpus.jsonl`, and read `queries.jsonl`.

        Raises:
            SettingsError: One of the files is missing or cannot be read; the message names it.
        """
        try:
            self._corpus = (folder / "corpus.jsonl").open("rb")
            self._places = _places(self._corpus, folder / "corpus.jsonl")
            with (folder / "queries.jsonl").open("rb") as lines:
                rows = map(json.loads, filter(bytes.strip, lines))
                self._queries = {str(row["_id"]): str(row["text"]) for row in rows}
        except OSError as error:
            raise SettingsError(
                f"{error.filename} cannot be read ({error.strerror}); a BEIR folder holds "
                "corpus.jsonl and queries.jsonl."
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise SettingsError(
                f"{folder / 'queries.jsonl'}: every line must be an object with _id and text "
                f"({type(error).__name__}: {error})."
            ) from error

    def read(self, lines: Iterable[bytes]) -> Iterator[Item | Bad]:
        """Yield the item of each query; the lines of a query must stand together."""
        seen: set[str] = set()
        parsed = _parsed(lines)
        for query, rows in groupby(parsed, key=lambda row: row[1]):
            found = list(rows)
            number = found[0][0]
            bad = next((reason for _, _, _, reason in found if reason), "")
            if not bad and query in seen:
                bad = f"query {query} came before; sort the run by query."
            if not bad and query not in self._queries:
                bad = f"query {query} is not in queries.jsonl."
            unknown = next((name for _, _, name, _ in found if name not in self._places), None)
            if not bad and unknown is not None:
                bad = f"document {unknown} of query {query} is not in corpus.jsonl."
            seen.add(query)
            if bad:
                yield Bad(number, bad, query)
                continue
            names = [name for _, _, name, _ in found]
            texts = [self._text(name) for name in names]
            yield Item(
                number,
                self._queries[query],
                texts,
                [{"id": name} for name in names],
                {"id": query},
                size=sum(map(len, texts)),
            )

    def _text(self, name: str) -> str:
        self._corpus.seek(self._places[name])
        row = json.loads(self._corpus.readline())
        return f"{row.get('title') or ''} {row['text']}".strip()


def _places(corpus: Iterable[bytes], path: Path) -> dict[str, int]:
    places: dict[str, int] = {}
    place = 0
    for number, line in enumerate(corpus, start=1):
        if line.strip():
            try:
                row = json.loads(line)
                places[str(row["_id"])] = place
                row["text"] + ""
            except (ValueError, KeyError, TypeError) as error:
                raise SettingsError(
                    f"{path}, line {number}: must be an object with _id and text."
                ) from error
        place += len(line)
    return places


def _parsed(lines: Iterable[bytes]) -> Iterator[tuple[int, str, str, str]]:
    """Yield line number, query, document and what is wrong, if anything, of each line of a run."""
    for number, line in enumerate(lines, start=1):
        text = line.decode("utf-8", "replace")
        try:
            for query, document, _ in parse_run([text], name="the run"):
                yield number, query, document, ""
        except SettingsError:
            shown = text.strip()[:80]
            yield (
                number,
                shown,
                "",
                f"must be query, Q0, document, rank, score, tag, got {shown!r}.",
            )


def _line(row: dict[str, Any]) -> bytes:
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        # A lone surrogate, which JSON can escape and UTF-8 cannot hold.
        return (json.dumps(row) + "\n").encode()


def _told(ranked: RankedDocument) -> dict[str, Any]:
    told: dict[str, Any] = {"index": ranked.index, "score": ranked.score, "logit": ranked.logit}
    if ranked.truncated:
        told["truncated"] = True
    if ranked.span is not None:
        told["span"] = list(ranked.span)
    return told


def _id(known: dict[str, Any], otherwise: int) -> str:
    # A TREC run parts its columns by spaces.
    return "_".join(str(known.get("_id", known.get("id", otherwise))).split())


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__
