"""The state of a job in its output folder: its options, and which parts are done."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from pyarrow import fs

from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.ray.parts import Part
from bge_rerank_adapters.ray.storage import (
    UNFINISHED,
    forget_listings,
    names_in,
    read_bytes,
    remove_file,
    remove_folders,
    write_whole,
)

_MANIFEST = "_job.json"
_DONE = "_done"
PUT_ASIDE = "_put_aside"


@dataclass(frozen=True, slots=True)
class Counts:
    """The counts of one finished part.

    Attributes:
        queries: Number of ranked rows.
        pairs: Number of their documents.
        put_aside: Number of rows without results.
    """

    queries: int = 0
    pairs: int = 0
    put_aside: int = 0


@dataclass(frozen=True, slots=True)
class Folder:
    """A job's output folder.

    Attributes:
        system: Its file system.
        path: Its path.
    """

    system: fs.FileSystem
    path: str

    def begin(self, options: dict[str, Any], parts: list[Part]) -> list[Part]:
        """Return the parts that are not done; a new folder is marked as this job's.

        Raises:
            SettingsError: The folder has other files, or is of a job with other options.
        """
        manifest = f"{self.path}/{_MANIFEST}"
        options = json.loads(json.dumps(options))
        there = self._names()
        # A job that has written nothing, for example for lack of its model, may change its options.
        if not there - {_MANIFEST}:
            write_whole(self.system, manifest, json.dumps({"asked": options}, indent=1).encode())
            return parts
        if _MANIFEST not in there:
            raise SettingsError(
                f"{self.path} has files that are no earlier job's, such as {min(there)}; give "
                "output a new folder."
            )
        self._refuse_changed(manifest, options)
        done = names_in(self.system, f"{self.path}/{_DONE}")
        return [part for part in parts if f"{part.name}.json" not in done]

    def counts(self, part: Part) -> Counts | None:
        """Return the counts of a part; `None` if it is not done."""
        (found,) = self.system.get_file_info([self._mark(part)])
        if found.type == fs.FileType.NotFound:
            return None
        return Counts(**json.loads(read_bytes(self.system, self._mark(part))))

    def finish_part(self, part: Part, counts: Counts, files: dict[str, bytes | None]) -> None:
        """Write the files of a part; it is done once all of them are written.

        Args:
            part: The part.
            counts: Its counts.
            files: Its files, by their names in the folder; `None` for one that must not exist. An
                interrupted attempt may have written it, and put a row aside that is ranked now.
        """
        for name, data in files.items():
            if data is None:
                remove_file(self.system, f"{self.path}/{name}")
            else:
                write_whole(self.system, f"{self.path}/{name}", data)
        write_whole(self.system, self._mark(part), json.dumps(asdict(counts)).encode())

    def finish(self) -> None:
        """Remove files that interrupted actors left unfinished."""
        forget_listings(self.system)
        folders = ("", f"/{_DONE}", f"/{PUT_ASIDE}")
        remove_folders(self.system, [f"{self.path}{each}/{UNFINISHED}" for each in folders])

    def _mark(self, part: Part) -> str:
        return f"{self.path}/{_DONE}/{part.name}.json"

    def _names(self) -> set[str]:
        """Return the names in the folder, without that of unfinished files."""
        (found,) = self.system.get_file_info([self.path])
        if found.type == fs.FileType.File:
            raise SettingsError(f"{self.path} is a file; give output the name of a folder.")
        below = self.system.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        return {each.base_name for each in below} - {UNFINISHED}

    def _refuse_changed(self, manifest: str, options: dict[str, Any]) -> None:
        try:
            before = dict(json.loads(read_bytes(self.system, manifest))["asked"])
        except (ValueError, TypeError, KeyError) as error:
            raise SettingsError(
                f"{manifest} is damaged ({type(error).__name__}: {error}), so the job cannot go "
                "on; give output a new folder."
            ) from error
        names = sorted({*options, *before})
        changed = [name for name in names if options.get(name) != before.get(name)]
        if changed:
            raise SettingsError(
                f"{self.path} is of a job that differs in {', '.join(changed)}; give the same to "
                "finish it, or give output a new folder."
            )
