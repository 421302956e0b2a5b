"""Cuts input files into parts, which an actor reads, ranks and writes one at a time."""

from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from bge_rerank_adapters.calls.items import Bad, Item, read_jsonl
from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.ray.corpus import IDS
from bge_rerank_adapters.ray.rows import DOCUMENTS, ERROR, RESULTS, Prepare, items_of
from bge_rerank_adapters.ray.storage import kind_of, read_lines, read_rows


@dataclass(frozen=True, slots=True)
class Part:
    """A range of an input file.

    Attributes:
        number: Its number among all parts, counted from 0.
        path: The file.
        start: Where it begins: a byte of JSONL, a row of Parquet.
        stop: Where it ends, exclusive.
    """

    number: int
    path: str
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The name of its files, without suffix."""
        return f"part-{self.number:06d}"

    def place(self, where: int) -> dict[str, Any]:
        """Return a place in the input, given its byte or row, as JSON values."""
        unit = "row" if kind_of(self.path) == "parquet" else "byte"
        return {"file": self.path, unit: where}


@dataclass(frozen=True, slots=True)
class PartContent:
    """The content of a part.

    Attributes:
        items: Each row, or what is wrong with it; its `line` is its row or byte in the file.
        table: The rows of Parquet; `None` for JSONL.
        sources: The lines of JSONL; empty for Parquet.
    """

    items: list[Item | Bad]
    table: pa.Table | None
    sources: list[str]

    def source(self, place: int) -> Any:
        """Return a row as it is in the input, to be put aside."""
        if self.table is None:
            return self.sources[place]
        (row,) = self.table.slice(place, 1).to_pylist()
        return row


def cut(
    system: fs.FileSystem, files: list[fs.FileInfo], *, part_bytes: int, documents: str
) -> list[Part]:
    """Return the parts of files, each of about the same size in memory.

    Args:
        system: Their file system.
        files: Files of one format.
        part_bytes: Size of a part.
        documents: The column that Parquet must have in addition to `query`.

    Raises:
        SettingsError: A Parquet file cannot be read, or has columns that the ranking would
            overwrite.
    """
    parts: list[Part] = []
    for file in files:
        if kind_of(file.path) == "parquet":
            length, step = _rows_of(system, file.path, part_bytes, documents)
        else:
            length, step = file.size, part_bytes
        for start in range(0, length, step):
            parts.append(Part(len(parts), file.path, start, min(start + step, length)))
    return parts


def read_part(system: fs.FileSystem, part: Part, *, prepare: Prepare | None) -> PartContent:
    """Return the content of a part."""
    if kind_of(part.path) == "parquet":
        table = _table(system, part)
        return PartContent(items_of(table, first=part.start, prepare=prepare), table, [])
    lines, places = read_lines(system, part.path, start=part.start, stop=part.stop)
    items = [*read_jsonl(lines, prepare=prepare)]
    sources = [lines[item.line - 1].decode("utf-8", "replace").rstrip("\r\n") for item in items]
    return PartContent([replace(item, line=places[item.line - 1]) for item in items], None, sources)


def _table(system: fs.FileSystem, part: Part) -> pa.Table:
    batches, rows = [], part.stop - part.start
    for batch in read_rows(system, part.path, start=part.start):
        batches.append(batch.slice(0, rows))
        rows -= batches[-1].num_rows
        if not rows:
            break
    return pa.Table.from_batches(batches)


def _rows_of(system: fs.FileSystem, path: str, part_bytes: int, documents: str) -> tuple[int, int]:
    """Return the number of rows of a file, and of each part."""
    try:
        with system.open_input_file(path) as file, pq.ParquetFile(file) as parquet:
            metadata, names = parquet.metadata, parquet.schema_arrow.names
            groups = [metadata.row_group(place) for place in range(metadata.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        raise SettingsError(f"{path} is not a readable Parquet file: {error}.") from error
    if not {"query", documents} <= set(names):
        raise SettingsError(
            f"{path} must have the columns query and {documents}, it has {', '.join(names)}; "
            f"rename its columns. ({IDS} go with a corpus, {DOCUMENTS} without.)"
        )
    taken = sorted({RESULTS, ERROR} & set(names))
    if taken:
        raise SettingsError(
            f"{path} has a column {taken[0]}, which the ranking would overwrite; rename it."
        )
    size = sum(group.total_byte_size for group in groups)
    rows = metadata.num_rows
    return rows, max(1, rows * part_bytes // size) if size else 1
