"""Test collections in the layout of BEIR."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bge_rerank_adapters.errors import SettingsError

_QRELS = ("qrels.tsv", "qrels/test.tsv")


@dataclass(frozen=True, slots=True)
class Collection:
    """Documents, queries, and which of the documents answer which query.

    Attributes:
        name: What reports call it.
        documents: Title and text of each document, joined by a space, by id.
        queries: The queries that have judgements, by id, in the order of their file.
        judgements: For each query the grade of each judged document; above 0 is relevant.
    """

    name: str
    documents: dict[str, str]
    queries: dict[str, str]
    judgements: dict[str, dict[str, int]]

    def sample(self, queries: int) -> "Collection":
        """Return the collection with so many of its queries, evenly spread, always the same.

        Raises:
            SettingsError: `queries` is below 1.
        """
        if queries < 1:
            raise SettingsError(f"queries must be at least 1, got {queries}.")
        names = list(self.queries)
        if queries >= len(names):
            return self
        step = (len(names) - 1) / max(queries - 1, 1)
        kept = dict.fromkeys(names[round(place * step)] for place in range(queries))
        return replace(
            self,
            queries={name: self.queries[name] for name in kept},
            judgements={name: self.judgements[name] for name in kept},
        )

    def fingerprint(self) -> str:
        """Return a short text that another content would change."""
        digest = hashlib.sha256()
        for texts in (self.documents, self.queries):
            for name, text in texts.items():
                digest.update(f"{name}\0{text}\0".encode("utf-8", "surrogatepass"))
        digest.update(json.dumps(self.judgements, sort_keys=True).encode())
        return digest.hexdigest()[:16]


def read_collection(folder: str | Path) -> Collection:
    """Return the collection of a BEIR folder.

    Args:
        folder: Holds `corpus.jsonl` (`_id`, `title`, `text`), `queries.jsonl` (`_id`, `text`) and
            `qrels.tsv` or `qrels/test.tsv` (query, document, grade, after a header line).

    Returns:
        All documents, and those queries that have a judgement.

    Raises:
        SettingsError: A file is missing, or a line of one cannot be read; the message names it.
    """
    path = Path(folder)
    documents = {
        name: f"{row.get('title') or ''} {row['text']}".strip()
        for name, row in _rows(path / "corpus.jsonl")
    }
    judgements = _judgements(path)
    texts = {name: row["text"] for name, row in _rows(path / "queries.jsonl")}
    queries = {name: text for name, text in texts.items() if name in judgements}
    if not queries:
        raise SettingsError(f"{path}: no query of queries.jsonl has a judgement; check the ids.")
    return Collection(
        path.resolve().name,
        documents,
        queries,
        {name: judgements[name] for name in queries},
    )


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, _ = row["_id"], row["text"] + ""
        except (ValueError, TypeError, KeyError) as error:
            raise SettingsError(
                f"{path}, line {number}: must be a JSON object with the texts _id and text "
                f"({type(error).__name__}: {error})."
            ) from error
        yield str(name), row


def _judgements(folder: Path) -> dict[str, dict[str, int]]:
    path = next((folder / name for name in _QRELS if (folder / name).is_file()), folder / _QRELS[0])
    judgements: dict[str, dict[str, int]] = {}
    for number, line in _lines(path):
        cells = line.split("\t")
        if number == 1 and not cells[-1].strip().lstrip("-").isdecimal():
            continue  # the header
        try:
            query, document, grade = cells
            judgements.setdefault(query, {})[document] = int(grade)
        except ValueError as error:
            raise SettingsError(
                f"{path}, line {number}: must be query, document and a whole number, separated by "
                f"tabs, got {line[:80]!r}."
            ) from error
    return judgements


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                yield number, line.rstrip("\n")
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be read ({error.strerror}); a BEIR folder holds corpus.jsonl, "
            "queries.jsonl and qrels.tsv."
        ) from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not UTF-8: {error}.") from error
