"""The items of bulk runs, on one machine or many: a query with its documents, read and written."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bge_rerank_adapters.calls.base import BaseReranker
from bge_rerank_adapters.calls.limits import Limits
from bge_rerank_adapters.calls.ranked_document import RankedDocument
from bge_rerank_adapters.calls.ranking import Ranking
from bge_rerank_adapters.calls.trec import parse_run, run_lines
from bge_rerank_adapters.errors import InputTypeError, ScoringError, SettingsError

_IDS = ("_id", "id")
_RESULT_FIELDS = ("index", "score", "logit", "truncated", "query_truncated", "span")


@dataclass(frozen=True, slots=True)
class Item:
    """One query with its documents.

    Attributes:
        line: Number of its first line in the input, counted from 1.
        query: The query's text.
        texts: The documents' texts.
        documents: The other fields of each document, such as its id.
        extra: The other fields of the query.
        source: Its part of the input, without the final line end.
        size: Length of that part, in bytes or characters.
    """

    line: int
    query: str
    texts: list[str]
    documents: list[dict[str, Any]]
    extra: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    size: int = 0

    def to_json(self, ranked: Iterable[RankedDocument], *, with_text: bool = True) -> bytes:
        """Return a JSON line with the results and all other fields of the input."""
        results = [
            {**_kept(self.documents[each.index]), "text": each.text, **_result_fields(each)}
            for each in ranked
        ]
        if not with_text:
            results = [{n: each[n] for n in each if n != "text"} for each in results]
        return _line({**self.extra, "query": self.query, "results": results})

    def to_trec(self, ranked: Iterable[RankedDocument]) -> bytes:
        """Return the lines of a TREC run; line number and index stand in for missing ids."""
        names = self.document_names()
        found = [
            (names[each.index], each.score if each.logit is None else each.logit) for each in ranked
        ]
        lines = run_lines(self.query_name(), found, tag="bge-rerank")
        return "".join(lines).encode("utf-8", "replace")

    def query_name(self) -> str:
        """Return the query's id in a TREC run."""
        return _id(self.extra, self.line, names=(*_IDS, "query_id"))

    def document_names(self) -> list[str]:
        """Return the documents' ids in a TREC run."""
        return [_id(known, index) for index, known in enumerate(self.documents)]


@dataclass(frozen=True, slots=True)
class Bad:
    """A part of the input that cannot be read or ranked.

    Attributes:
        line: Its line number, counted from 1.
        reason: What is wrong with it.
        text: The part itself, to be corrected and given again.
    """

    line: int
    reason: str
    text: str

    def to_json(self) -> bytes:
        """Return a JSON line with the reason and the part itself."""
        return _line({"line": self.line, "error": self.reason, "input": self.text})


def read_jsonl(
    lines: Iterable[bytes], *, prepare: Callable[[Any], Any] | None = None
) -> Iterator[Item | Bad]:
    """Yield the item of each line that is not blank.

    A line is an object with a `query` and `documents`, each of which is a text or an object with a
    `text`; all its other fields are kept.

    Args:
        lines: Read as needed.
        prepare: Converts a line's JSON value into such an object; may raise `InputTypeError`.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        source = line.decode("utf-8", "replace").rstrip("\r\n")
        try:
            row = json.loads(line)
            item = parse_item(number, row if prepare is None else prepare(row))
            yield replace(item, source=source, size=len(line))
        except (ValueError, RecursionError) as error:
            # Not JSON, not UTF-8, or nested too deep.
            yield Bad(number, f"not JSON: {error}{_hint(source)}", source)
        except InputTypeError as error:
            yield Bad(number, str(error), source)


def rank_items(
    engine: BaseReranker[Any], items: Sequence[Item | Bad], *, limits: Limits
) -> list[Ranking | Bad]:
    """Return the ranking of each item, in order, or why there is none.

    Args:
        engine: The reranker.
        items: n items; may be empty. `Bad` ones are returned as they are.
        limits: The limits of each ranking.
    """
    ranked = iter(_rank(engine, [item for item in items if isinstance(item, Item)], limits))
    return [item if isinstance(item, Bad) else next(ranked) for item in items]


def _rank(
    engine: BaseReranker[Any], items: Sequence[Item], limits: Limits
) -> Sequence[Ranking | Bad]:
    requests = [(item.query, item.texts) for item in items]
    try:
        return engine.rerank_many(requests, **limits.to_dict())
    except ScoringError:
        # One of them failed; the others still get their rankings.
        return [_rank_alone(engine, item, limits) for item in items]


def _rank_alone(engine: BaseReranker[Any], item: Item, limits: Limits) -> Ranking | Bad:
    try:
        # Not `rerank`, which raises `Overloaded` while other callers fill the queue.
        return engine._rerank_unbounded(item.query, item.texts, limits)  # noqa: SLF001 - its layer
    except ScoringError as error:
        return Bad(item.line, str(error), item.source)


def rank_and_write(
    engine: BaseReranker[Any],
    chunk: Sequence[Item | Bad],
    *,
    limits: Limits,
    write: Callable[[Item, Iterable[RankedDocument]], bytes],
) -> list[bytes | Bad]:
    """Return the bytes to write for each item, in order, or why there are none."""
    rankings = rank_items(engine, chunk, limits=limits)
    return [
        ranking if isinstance(ranking, Bad) else write(item, ranking)  # type: ignore[arg-type]
        for item, ranking in zip(chunk, rankings, strict=True)
    ]


def with_unique_names(items: Iterable[Item | Bad]) -> Iterator[Item | Bad]:
    """Yield the items whose ids are unique in a TREC run, and `Bad` in place of the others."""
    seen: dict[str, int] = {}
    for item in items:
        wrong = "" if isinstance(item, Bad) else _shared_name(item, seen)
        yield Bad(item.line, wrong, item.source) if wrong and isinstance(item, Item) else item


def _shared_name(item: Item, seen: dict[str, int]) -> str:
    ways_out = "give each an id of its own, or write --format jsonl."
    query = item.query_name()
    if query in seen:
        return f"a TREC run calls this query {query}, as that of line {seen[query]}; {ways_out}"
    places: dict[str, int] = {}
    for place, name in enumerate(item.document_names()):
        if name in places:
            return (
                f"a TREC run calls both documents[{places[name]}] and documents[{place}] {name}; "
                f"{ways_out}"
            )
        places[name] = place
    seen[query] = item.line
    return ""


def _hint(line: str) -> str:
    """Return advice on a line that is no JSON."""
    try:
        found = list(parse_run([line], name="the run"))
    except SettingsError:
        found = []
    if found:
        return "; a TREC run needs --collection, the BEIR folder with its texts"
    return '; each line is an object such as {"query": "...", "documents": ["...", "..."]}'


def parse_item(number: int, row: Any) -> Item:
    """Return the item of a row: its query and documents, and all its other fields.

    Raises:
        InputTypeError: It is not such a row; the message says why.
    """
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


def _line(row: dict[str, Any]) -> bytes:
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        # A lone surrogate, which UTF-8 cannot encode but JSON can escape.
        return (json.dumps(row) + "\n").encode()


def _result_fields(ranked: RankedDocument) -> dict[str, Any]:
    fields: dict[str, Any] = {"index": ranked.index, "score": ranked.score, "logit": ranked.logit}
    if ranked.truncated:
        fields["truncated"] = True
    if ranked.query_truncated:
        fields["query_truncated"] = True
    if ranked.span is not None:
        fields["span"] = list(ranked.span)
    return fields


def _kept(document: dict[str, Any]) -> dict[str, Any]:
    """Return a document's fields without an earlier ranking's; its score is renamed."""
    kept = {name: value for name, value in document.items() if name not in _RESULT_FIELDS}
    if "score" in document:
        kept.setdefault("retrieval_score", document["score"])
    return kept


def _id(known: dict[str, Any], otherwise: int, *, names: Sequence[str] = _IDS) -> str:
    named = (str(known[name]) for name in names if known.get(name) is not None)
    # A TREC run separates its columns by spaces.
    words = next(filter(None, (each.split() for each in named)), [str(otherwise)])
    return "_".join(words)


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__
