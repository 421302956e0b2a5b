"""What bulk runs read and write, from a shell or on many machines: a query with its documents."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bge_rerank_adapters.calls.base import BaseReranker
from bge_rerank_adapters.calls.limits import Limits
from bge_rerank_adapters.calls.ranking import RankedDocument, Ranking
from bge_rerank_adapters.calls.trec import parse_run, run_lines
from bge_rerank_adapters.errors import InputTypeError, ScoringError, SettingsError

# What a result says of a document.
_RESULT_FIELDS = ("index", "score", "logit", "truncated", "query_truncated", "span")


@dataclass(frozen=True, slots=True)
class Item:
    """One query with its documents.

    Attributes:
        line: Number of the input's line where it begins, counted from 1.
        query: The question.
        texts: The documents' texts.
        documents: What is known of each document besides, its id among it.
        extra: What is known of the query besides.
        source: The part of the input that it is, without the last line's end.
        size: How much of the input it is, in bytes or characters.
    """

    line: int
    query: str
    texts: list[str]
    documents: list[dict[str, Any]]
    extra: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    size: int = 0

    def to_json(self, ranked: Iterable[RankedDocument], *, with_text: bool = True) -> bytes:
        """Return the line with the results, and with all else that was in the input."""
        results = [
            {**_kept(self.documents[each.index]), "text": each.text, **_result_fields(each)}
            for each in ranked
        ]
        if not with_text:
            results = [{n: each[n] for n in each if n != "text"} for each in results]
        return _line({**self.extra, "query": self.query, "results": results})

    def to_trec(self, ranked: Iterable[RankedDocument]) -> bytes:
        """Return a TREC run's lines; what has no id is called by line number or index."""
        names = self.document_names()
        found = [
            (names[each.index], each.score if each.logit is None else each.logit) for each in ranked
        ]
        lines = run_lines(self.query_name(), found, tag="bge-rerank")
        return "".join(lines).encode("utf-8", "replace")

    def query_name(self) -> str:
        """Return what a TREC run calls the query."""
        return _id(self.extra, self.line)

    def document_names(self) -> list[str]:
        """Return what a TREC run calls each document."""
        return [_id(known, index) for index, known in enumerate(self.documents)]


@dataclass(frozen=True, slots=True)
class Bad:
    """A part of the input that is no item.

    Attributes:
        line: Its number, counted from 1.
        reason: What is wrong with it.
        text: The line itself, or the lines, to be mended and given again.
    """

    line: int
    reason: str
    text: str

    def to_json(self) -> bytes:
        """Return the line that puts it aside."""
        return _line({"line": self.line, "error": self.reason, "input": self.text})


def read_jsonl(
    lines: Iterable[bytes], *, prepare: Callable[[Any], Any] | None = None
) -> Iterator[Item | Bad]:
    """Yield the item of each line that is not blank.

    A line is an object with a `query` and `documents`, each of which is a text or an object with a
    `text`; all its other fields are kept.

    Args:
        lines: Read as they are needed.
        prepare: Makes such an object of what a line holds; raises `InputTypeError`.
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
            # json's own error, bytes that are not UTF-8, or brackets within brackets without end
            yield Bad(number, f"not JSON: {error}{_run_hint(source)}", source)
        except InputTypeError as error:
            yield Bad(number, str(error), source)


def rank_items(
    engine: BaseReranker[Any], items: Sequence[Item], *, limits: Limits
) -> list[Ranking | Bad]:
    """Return the ranking of each item, in order, or why there is none.

    Args:
        engine: What scores.
        items: n items; may be none.
        limits: Of each ranking.
    """
    requests = [(item.query, item.texts) for item in items]
    try:
        return [*engine.rerank_many(requests, **limits.to_dict())]
    except ScoringError:
        # One of them is to blame, and the others need not suffer for it.
        return [_rank_alone(engine, item, limits) for item in items]


def _rank_alone(engine: BaseReranker[Any], item: Item, limits: Limits) -> Ranking | Bad:
    try:
        # Not `rerank`, which other callers of the engine could have refused as `Overloaded`.
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
    """Return what to write for each item of a chunk, in order, or why there is nothing to write."""
    good = [item for item in chunk if isinstance(item, Item)]
    ranked = iter(rank_items(engine, good, limits=limits))
    outcomes: list[bytes | Bad] = []
    for item in chunk:
        outcome = item if isinstance(item, Bad) else next(ranked)
        outcomes.append(outcome if isinstance(outcome, Bad) else write(item, outcome))  # type: ignore[arg-type]
    return outcomes


def with_own_names(items: Iterable[Item | Bad]) -> Iterator[Item | Bad]:
    """Yield the items that a TREC run can distinguish, and `Bad` in place of the others.

    A run knows queries and documents by their ids alone: equal ones would be one.
    """
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


def _run_hint(line: str) -> str:
    """Return what to do about a line of a TREC run, and nothing about others."""
    try:
        found = list(parse_run([line], name="the run"))
    except SettingsError:
        return ""
    return "; a TREC run needs --collection, the BEIR folder with its texts" if found else ""


def parse_item(number: int, row: Any) -> Item:
    """Return the item of a row: its query and documents, and all its other fields.

    Raises:
        InputTypeError: The row is none; the message says what is wrong with it.
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
        # A lone surrogate, which JSON can escape and UTF-8 cannot hold.
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
    """Return a document's fields without those of an earlier ranking, but for its score."""
    kept = {name: value for name, value in document.items() if name not in _RESULT_FIELDS}
    if "score" in document:
        kept.setdefault("retrieval_score", document["score"])
    return kept


def _id(known: dict[str, Any], otherwise: int) -> str:
    named = (str(known[name]) for name in ("_id", "id") if known.get(name) is not None)
    # A TREC run parts its columns by spaces.
    words = next(filter(None, (each.split() for each in named)), [str(otherwise)])
    return "_".join(words)


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__
