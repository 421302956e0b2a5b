"""Test collections in the layout of BEIR."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bge_rerank_adapters.errors import SettingsError

_SAMPLE = Path(__file__).parent / "xquad-r-en"
_QRELS = ("qrels.tsv", "qrels/test.tsv")


@dataclass(frozen=True, slots=True)
class Collection:
    """Documents, queries, and judgements of which documents answer which query.

    Attributes:
        name: Its name in reports.
        documents: Title and text of each document, joined by a space, by id.
        queries: The queries that have judgements, by id, in the order of their file.
        judgements: For each query the grade of each judged document; above 0 is relevant.
    """

    name: str
    documents: dict[str, str]
    queries: dict[str, str]
    judgements: dict[str, dict[str, int]]

    def sample(self, queries: int) -> "Collection":
        """Return the collection with this many of its queries, evenly spread and always the same.

        Raises:
            SettingsError: `queries` is below 1.
        """
        if queries < 1:
            raise SettingsError(f"queries must be at least 1, got {queries}.")
        names = list(self.queries)
        if queries >= len(names):
            return self
        step = (len(names) - 1) / max(queries - 1, 1)
        kept = dict.fromkeys(names[round(step * number)] for number in range(queries))
        return replace(
            self,
            queries={name: self.queries[name] for name in kept},
            judgements={name: self.judgements[name] for name in kept},
        )

    def fingerprint(self) -> str:
        """Return a short hash of the content."""
        digest = hashlib.sha256()
        for texts in (self.documents, self.queries):
            for name, text in texts.items():
                digest.update(f"{name}\0{text}\0".encode("utf-8", "surrogatepass"))
        digest.update(json.dumps(self.judgements, sort_keys=True).encode())
        return digest.hexdigest()[:16]


def sample_collection() -> Collection:
    """Return a small collection that comes with the package, for trying things out.

    It is part of the English XQuAD-R: 600 sentences of Wikipedia, and 260 questions that each have
    one of them as the answer. The README next to its files names source and licence.
    """
    return read_collection(_SAMPLE)


def read_collection(folder: str | Path) -> Collection:
    """Return the collection of a BEIR folder.

    Args:
        folder: Holds `corpus.jsonl` (`_id`, `title`, `text`), `queries.jsonl` (`_id`, `text`) and
            `qrels.tsv` or `qrels/test.tsv` (query, document, grade, after a header line).

    Returns:
        All documents, and the queries that have a judgement.

    Raises:
        SettingsError: A file is missing, or a line of one cannot be read; the message names it.
    """
    path = Path(folder)
    documents = {row.name: document_text(row.values) for row in read_rows(path / "corpus.jsonl")}
    judgements = _judgements(path)
    texts = {row.name: row.values["text"] for row in read_rows(path / "queries.jsonl")}
    queries = {name: text for name, text in texts.items() if name in judgements}
    if not queries:
        raise SettingsError(f"{path}: no query of queries.jsonl has a judgement; check the ids.")
    return Collection(
        path.resolve().name,
        documents,
        queries,
        {name: judgements[name] for name in queries},
    )


@dataclass(frozen=True, slots=True)
class Row:
    """A line of `corpus.jsonl` or `queries.jsonl`.

    Attributes:
        name: Its `_id`.
        values: All its fields; `text` is a text.
        offset: The byte offset in the file where it begins.
    """

    name: str
    values: dict[str, Any]
    offset: int


def read_rows(path: Path) -> Iterator[Row]:
    """Yield each line of a JSON Lines file of a BEIR folder that is not blank.

    Raises:
        SettingsError: The file cannot be read, a line is not an object with `_id` and `text`, or an
            `_id` is repeated; the message names the line.
    """
    seen: dict[str, int] = {}
    offset = 0
    for number, line in _lines(path):
        if line.strip():
            try:
                name, values = parse_row(line)
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise SettingsError(
                    f"{path}, line {number}: must be a JSON object with the texts _id and text "
                    f"({type(error).__name__}: {error})."
                ) from error
            if not _can_be_named(name):
                raise SettingsError(
                    f"{path}, line {number}: _id {name!r} has a NUL or half a surrogate pair, "
                    "which trec_eval cannot read; give the line another _id."
                )
            if name in seen:
                raise SettingsError(
                    f"{path}, line {number}: _id {name!r} came before, in line {seen[name]}; give "
                    "each line an _id of its own."
                )
            seen[name] = number
            yield Row(name, values, offset)
        offset += len(line)


def _can_be_named(name: str) -> bool:
    return "\0" not in name and not any("\ud800" <= letter <= "\udfff" for letter in name)


def parse_row(line: bytes) -> tuple[str, dict[str, Any]]:
    """Return the `_id` of one such line and all its fields.

    Raises:
        ValueError: It is not JSON in UTF-8.
        TypeError: It is not an object, or `_id` or `text` has another type.
        KeyError: `_id` or `text` is missing.
    """
    values = json.loads(line)
    name = values["_id"]
    # Some collections use numbers as ids, which are text in qrels.
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise TypeError(f"_id is a {type(name).__name__}")
    if not isinstance(values["text"], str):
        raise TypeError(f"text is a {type(values['text']).__name__}")
    return str(name), values


def document_text(values: Mapping[str, Any]) -> str:
    """Return a document's title and text, joined by a space."""
    return f"{values.get('title') or ''} {values['text']}".strip()


def _judgements(folder: Path) -> dict[str, dict[str, int]]:
    path = next((folder / name for name in _QRELS if (folder / name).is_file()), folder / _QRELS[0])
    judgements: dict[str, dict[str, int]] = {}
    begun = False
    for number, line in _lines(path):
        if not line.strip():
            continue
        header, begun = not begun, True
        text = _decoded(line, path, number).rstrip("\r\n")
        cells = text.split("\t")
        if header and len(cells) == 3 and not _is_number(cells[-1]):
            continue
        try:
            query, document, grade = cells
            judgements.setdefault(query, {})[document] = int(grade)
        except ValueError as error:
            raise SettingsError(
                f"{path}, line {number}: must be query, document and a whole number, separated by "
                f"tabs, got {text[:80]!r}."
            ) from error
    return judgements


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _decoded(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}, line {number}: not UTF-8: {error}.") from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as lines:
            yield from enumerate(lines, start=1)
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be read ({error.strerror}); a BEIR folder holds corpus.jsonl, "
            "queries.jsonl and qrels.tsv."
        ) from error
