"""Documents that rows refer to by id, in memory or in a database file on each machine."""

import hashlib
import json
import os
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pyarrow import fs

from bge_rerank_adapters.errors import InputTypeError, SettingsError
from bge_rerank_adapters.ray.storage import (
    fingerprint,
    kind_of,
    list_files,
    locate,
    read_lines,
    read_rows,
)

IDS = "document_ids"
# How long to wait while another actor of the machine fills the database.
_FILLING_S = 24 * 3600
_LINES_BYTES = 16_000_000
_AT_ONCE = 500


class Corpus(Protocol):
    """The texts of documents by id."""

    def find(self, ids: list[str]) -> Mapping[str, str]:
        """Return the texts of known ids."""
        ...


class CorpusSource(Protocol):
    """What is sent to the actors, which open a corpus from it."""

    def open(self) -> Corpus:
        """Return the corpus."""
        ...

    def identity(self) -> Any:
        """Return JSON values that identify the corpus."""
        ...


def corpus_source(corpus: object) -> CorpusSource | None:
    """Return the source of documents that rows refer to by id.

    Args:
        corpus: A dict of texts by id; a path of Parquet or JSONL files with `doc_id` and `text`,
            accessible from every machine; or `None`.

    Raises:
        SettingsError: It is none of these, or there are no such files.
    """
    if corpus is None:
        return None
    if isinstance(corpus, Mapping):
        return TextsInMemory({str(name): text for name, text in corpus.items()})
    if isinstance(corpus, str | os.PathLike):
        system, path = locate(corpus)
        return CorpusFiles(system, tuple(map(tuple, fingerprint(list_files(system, path)))))
    raise SettingsError(
        "corpus must be a dict of texts by id, or a path of Parquet or JSONL files with doc_id and "
        f"text, got {type(corpus).__name__}; write a dataset to Parquet first: "
        'dataset.write_parquet("corpus").'
    )


def with_texts(row: Any, corpus: Corpus) -> Any:
    """Return a row with `documents` in place of `document_ids`.

    Raises:
        InputTypeError: The ids are not a list, or one of them is not in the corpus.
    """
    if not isinstance(row, dict):
        return row
    ids = row.get(IDS)
    if not isinstance(ids, list) or not all(isinstance(each, str | int) for each in ids):
        raise InputTypeError(f"{IDS} must be a list of ids, got {str(ids)[:80]}.")
    names = [str(each) for each in ids]
    known = corpus.find(names)
    lost = next((name for name in names if name not in known), None)
    if lost is not None:
        raise InputTypeError(f"document {lost} is not in the corpus.")
    documents = [{"id": name, "text": known[name]} for name in names]
    return {key: value for key, value in row.items() if key != IDS} | {"documents": documents}


@dataclass(frozen=True, slots=True)
class TextsInMemory:
    """A dict of texts, copied to every actor."""

    texts: dict[str, str]

    def open(self) -> "TextsInMemory":
        """Return itself."""
        return self

    def find(self, ids: list[str]) -> Mapping[str, str]:  # noqa: ARG002 - the protocol's
        """Return all texts."""
        return self.texts

    def identity(self) -> Any:
        """Return a digest of ids and texts."""
        digest = hashlib.sha256()
        for name in sorted(self.texts):
            digest.update(json.dumps([name, self.texts[name]]).encode())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class CorpusFiles:
    """Files with the texts, which each machine copies into its own database file once.

    Attributes:
        system: The files' file system.
        files: Path, size and modification time of each.
    """

    system: fs.FileSystem
    files: tuple[tuple[Any, ...], ...]

    def open(self) -> "TextsInFile":
        """Return the texts in this machine's database, which is filled if it is empty.

        Other actors of the machine wait meanwhile. SQLite rolls back what an interrupted one began.

        Raises:
            SettingsError: A file has no `doc_id` and `text`, or two documents have one id.
        """
        path = _own_folder() / f"{self._key()}.sqlite"
        with closing(sqlite3.connect(path, timeout=_FILLING_S, isolation_level=None)) as database:
            database.execute("BEGIN EXCLUSIVE")
            if not database.execute("SELECT 1 FROM sqlite_master").fetchone():
                self._fill(database)
            database.execute("COMMIT")
        return TextsInFile(path)

    def identity(self) -> Any:
        """Return the files' paths, sizes and times."""
        return [list(each) for each in self.files]

    def _key(self) -> str:
        return hashlib.sha256(json.dumps(self.identity()).encode()).hexdigest()[:32]

    def _fill(self, database: sqlite3.Connection) -> None:
        database.execute("CREATE TABLE documents (id TEXT NOT NULL, text TEXT NOT NULL)")
        rows = (row for file in self.files for row in _documents(self.system, *file[:2]))
        try:
            database.executemany("INSERT INTO documents VALUES (?, ?)", rows)
            # Afterwards, since sorting once is faster than keeping a tree in order.
            database.execute("CREATE UNIQUE INDEX by_id ON documents (id)")
        except sqlite3.IntegrityError as error:
            raise SettingsError(
                f"Two documents of the corpus have one doc_id, or one has no text ({error}); give "
                "each an id and a text of its own."
            ) from error


class TextsInFile:
    """Texts in a database file, of which only the requested ones are held in memory."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(f"file:{path}?mode=ro", uri=True, check_same_thread=False)

    def find(self, ids: list[str]) -> dict[str, str]:
        """Return the texts of those ids that are in the file."""
        found: dict[str, str] = {}
        for start in range(0, len(ids), _AT_ONCE):
            some = ids[start : start + _AT_ONCE]
            marks = ",".join("?" * len(some))
            # The statement has only placeholders for the ids.
            statement = f"SELECT id, text FROM documents WHERE id IN ({marks})"  # noqa: S608
            found.update(self._database.execute(statement, some))
        return found


def _documents(system: fs.FileSystem, path: str, size: int) -> Iterator[tuple[str, str | None]]:
    for row in _rows(system, path, size):
        name = row.get("doc_id") if isinstance(row, dict) else None
        text = row.get("text") if isinstance(row, dict) else None
        if name is None or not isinstance(text, str):
            raise SettingsError(
                f"{path} has a row without doc_id and text: {str(row)[:80]}; each row of a corpus "
                "needs both."
            )
        yield str(name), text


def _rows(system: fs.FileSystem, path: str, size: int) -> Iterable[Any]:
    if kind_of(path) == "parquet":
        for batch in read_rows(system, path, start=0, columns=["doc_id", "text"]):
            yield from batch.to_pylist()
        return
    for start in range(0, size, _LINES_BYTES):
        stop = min(start + _LINES_BYTES, size)
        lines, places = read_lines(system, path, start=start, stop=stop)
        for line, place in zip(lines, places, strict=True):
            if line.strip():
                yield _parsed(line, f"{path}, byte {place}")


def _parsed(line: bytes, place: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise SettingsError(f"{place}: not JSON: {error}; correct the corpus.") from error


def _own_folder() -> Path:
    """Return this user's folder for databases, in which no other user can have put files."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"bge-rerank-corpus-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
        raise SettingsError(
            f"{folder} belongs to another user; remove it, or give the job a TMPDIR of its own."
        )
    return folder
