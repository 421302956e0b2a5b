"""Lists, reads and atomically writes files that all machines of a cluster can access."""

import io
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from bge_rerank_adapters.errors import SettingsError

PARQUET = (".parquet",)
JSONL = (".jsonl", ".ndjson")
UNFINISHED = "_unfinished"


def locate(path: str | os.PathLike[str]) -> tuple[fs.FileSystem, str]:
    """Return the file system of a path or URI (`s3://...`), and the path within it.

    Raises:
        SettingsError: There is no such file system.
    """
    text = os.fspath(path)
    if "://" not in text:
        return fs.LocalFileSystem(), str(Path(text).resolve())
    try:
        system, place = fs.FileSystem.from_uri(text)
        forget_listings(system)
    except (pa.ArrowException, ValueError, OSError) as error:
        # Without its cause, whose message may have the URI with a password.
        shown = without_secrets(text)
        raise SettingsError(
            f"{shown} cannot be reached: {str(error).replace(text, shown)}; give a path, or a URI "
            "that pyarrow can open."
        ) from None
    return system, place


def forget_listings(system: fs.FileSystem) -> None:
    """Have a file system of fsspec ask again: it keeps listings, which other processes outdate."""
    if isinstance(system, fs.PyFileSystem) and isinstance(system.handler, fs.FSSpecHandler):
        system.handler.fs.invalidate_cache()


def without_secrets(uri: str) -> str:
    """Return a URI without user, password and query, which may be secret."""
    scheme, _, rest = uri.partition("://")
    place = rest.partition("?")[0]
    return f"{scheme}://{place.rpartition('@')[2]}"


@contextmanager
def storage_errors(what: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors of a file system into `SettingsError` with the path and advice.

    Args:
        what: "source" or "output".
        path: As it was given.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        text = os.fspath(path)
        shown = without_secrets(text) if "://" in text else text
        raise SettingsError(
            f"{what} {shown} cannot be used: {error}; check that its bucket or folder is there, "
            "and that these credentials may list, read and write it."
        ) from error


def list_files(system: fs.FileSystem, path: str) -> list[fs.FileInfo]:
    """Return a file itself, or all files below a folder, sorted by name.

    Names that begin with "_" or "." are skipped, as Parquet readers do.

    Raises:
        SettingsError: There are none, or they are of several formats or of an unknown one.
    """
    (root,) = system.get_file_info([path])
    if root.type == fs.FileType.NotFound:
        raise SettingsError(f"{path} cannot be read: there is no such file, folder or bucket.")
    found = [root]
    if root.type == fs.FileType.Directory:
        below = system.get_file_info(fs.FileSelector(path, recursive=True))
        found = [each for each in below if each.is_file and not _hidden(each.path, path)]
    if not found:
        raise SettingsError(f"{path} has no files; give a folder of Parquet or JSONL files.")
    kinds = {kind_of(each.path) for each in found}
    if len(kinds) > 1:
        raise SettingsError(
            f"{path} has both Parquet and JSONL files; give each a folder, and run two jobs."
        )
    return sorted(found, key=lambda each: each.path)


def kind_of(path: str) -> str:
    """Return `"parquet"` or `"jsonl"`, by a file's name.

    Raises:
        SettingsError: It is neither.
    """
    for kind, suffixes in (("parquet", PARQUET), ("jsonl", JSONL)):
        if path.endswith(suffixes):
            return kind
    raise SettingsError(
        f"{path} is of an unknown format; give files whose names end in "
        f"{', '.join((*PARQUET, *JSONL))}."
    )


def fingerprint(files: list[fs.FileInfo]) -> list[list[Any]]:
    """Return path, size and modification time of files, which change when they do."""
    return [[each.path, each.size, each.mtime_ns] for each in files]


def read_rows(
    system: fs.FileSystem, path: str, *, start: int, columns: list[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a Parquet file from `start` on, in batches."""
    with system.open_input_file(path) as file, pq.ParquetFile(file) as parquet:
        groups: list[int] = []
        for group in range(parquet.metadata.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            if groups or rows > start:
                groups.append(group)
            else:
                start -= rows
        for batch in parquet.iter_batches(batch_size=1024, row_groups=groups, columns=columns):
            if start < batch.num_rows:
                yield batch.slice(start)
            start = max(0, start - batch.num_rows)


def read_lines(
    system: fs.FileSystem, path: str, *, start: int, stop: int
) -> tuple[list[bytes], list[int]]:
    """Return the lines that begin in [start, stop) of a file, and their byte offsets."""
    with system.open_input_file(path) as file:
        begin = max(0, start - 1)
        file.seek(begin)
        data: bytes = file.read(stop - begin)
        if start:
            # A line that begins before `start` belongs to the range before.
            end = data.find(b"\n") + 1
            begin, data = begin + end, data[end:] if end else b""
        while data and not data.endswith(b"\n"):
            more: bytes = file.read(65_536)
            if not more:
                break
            end = more.find(b"\n") + 1
            data += more[:end] if end else more
    lines, places = io.BytesIO(data).readlines(), []
    for line in lines:
        places.append(begin)
        begin += len(line)
    return lines, places


def write_whole(system: fs.FileSystem, path: str, data: bytes) -> None:
    """Write or replace a file atomically.

    An interrupted job leaves its unfinished file in the folder `UNFINISHED` next to it.
    """
    folder, _, name = path.rpartition("/")
    aside = f"{folder}/{UNFINISHED}"
    system.create_dir(aside, recursive=True)
    unfinished = f"{aside}/{name}.{uuid.uuid4().hex}"
    with system.open_output_stream(unfinished) as file:
        file.write(data)
    if isinstance(system, fs.LocalFileSystem):
        # After a power cut the name must not exist without its content.
        with Path(unfinished).open("rb+") as written:
            os.fsync(written.fileno())
    system.move(unfinished, path)


def names_in(system: fs.FileSystem, folder: str) -> set[str]:
    """Return the names of a folder's files; none if there is no folder."""
    found = system.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    return {each.base_name for each in found if each.is_file}


def read_bytes(system: fs.FileSystem, path: str) -> bytes:
    """Return the content of a file."""
    with system.open_input_stream(path) as file:
        return file.read()  # type: ignore[no-any-return]


def remove_file(system: fs.FileSystem, path: str) -> None:
    """Remove a file, if it is there."""
    (found,) = system.get_file_info([path])
    if found.is_file:
        system.delete_file(path)


def remove_folders(system: fs.FileSystem, folders: list[str]) -> None:
    """Remove folders with their content; missing ones are ignored."""
    for folder in folders:
        (found,) = system.get_file_info([folder])
        if found.type == fs.FileType.Directory:
            system.delete_dir(folder)


def _hidden(path: str, root: str) -> bool:
    below = path.removeprefix(root).strip("/")
    return any(name.startswith(("_", ".")) for name in below.split("/"))
