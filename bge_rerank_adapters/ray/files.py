"""`rerank_files`: ranks files into files, by a job that can be interrupted and continued."""

import os
from dataclasses import asdict, dataclass, replace
from typing import Any

import ray.data
from pyarrow import fs
from ray.data import ActorPoolStrategy

from bge_rerank_adapters.calls.items import Item, rank_items
from bge_rerank_adapters.calls.ranking import Ranking
from bge_rerank_adapters.errors import RerankError, SettingsError
from bge_rerank_adapters.ray.attempts import Attempts
from bge_rerank_adapters.ray.corpus import IDS, CorpusSource, corpus_source
from bge_rerank_adapters.ray.dataset import preparation
from bge_rerank_adapters.ray.job import PUT_ASIDE, Counts, Folder
from bge_rerank_adapters.ray.parts import Part, cut, read_part
from bge_rerank_adapters.ray.recipe import Recipe, Resources, check_concurrency, make_recipe
from bge_rerank_adapters.ray.rows import DOCUMENTS
from bge_rerank_adapters.ray.storage import fingerprint, kind_of, list_files, locate, storage_errors
from bge_rerank_adapters.ray.writing import aside_jsonl, ranked_jsonl, ranked_parquet
from bge_rerank_adapters.settings import EngineSettings, checks

FORMATS = ("parquet", "jsonl")
# Maximum number of Ray's blocks; with more parts a block has several.
_MAX_BLOCKS = 4096


@dataclass(frozen=True, slots=True)
class FilesReport:
    """What a job has done, including its earlier runs.

    Attributes:
        parts: Number of parts of the input.
        parts_before: How many of them an earlier run had finished.
        queries: Number of ranked rows.
        pairs: Number of their documents.
        put_aside: Number of rows without results; they are in the output's folder `_put_aside`.
    """

    parts: int
    parts_before: int
    queries: int
    pairs: int
    put_aside: int


def rerank_files(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    model: str | None = None,
    settings: EngineSettings | None = None,
    top_k: int | None = None,
    score_threshold: float | None = None,
    corpus: Any = None,
    with_text: bool = True,
    output_format: str | None = None,
    part_bytes: int = 32_000_000,
    concurrency: int | tuple[int, int] = 1,
    num_gpus: float = 0,
    num_cpus: float = 1,
    progress: bool = False,
) -> FilesReport:
    """Rank the rows of files, and write the rankings to files, each row exactly once.

    The input is cut into parts. An actor reads, ranks and writes one part at a time, to a file
    named after the part. So a job that was interrupted and is started again does only what is not
    done. A row on which actors die each time is put aside.

    Args:
        source: A Parquet or JSONL file, or a folder of them: a path that is accessible from every
            machine, or a URI that pyarrow can open.
        output: A folder, given likewise: a new one, or that of the same job.
        model: A checkpoint, as in `Reranker`.
        settings: All engine settings, in place of `model`; see `rerank_dataset`.
        top_k: Maximum number of results of a row; `None` is all.
        score_threshold: Lowest score to keep, in [0, 1], inclusive.
        corpus: Texts by id, for rows that have `document_ids`; see `rerank_dataset`.
        with_text: Whether results have the document's text.
        output_format: `"parquet"` or `"jsonl"`; `None` is that of the input.
        part_bytes: Size of a part of the input in memory.
        concurrency: Number of actors, or their minimum and maximum.
        num_gpus: GPUs of each actor.
        num_cpus: CPUs of each actor, and its number of threads.
        progress: Whether Ray shows its bar.

    Returns:
        What was done, including earlier runs. The folder has `part-000000.parquet` or `.jsonl` and
        so on, in the order of the input; a part without ranked rows has no file. JSONL has the
        lines of `bge-rerank rerank`. Parquet has the input's columns and `results`, as
        `rerank_dataset` has them; from JSONL input, it has `query_id`, `query`, `results`, and
        `rest`: all other fields as JSON. `_put_aside` has a JSONL file for each part with bad rows:
        each row's `file` and `row` or `byte`, its `error`, and the `input` itself.

    Raises:
        SettingsError: A setting is not allowed, the input cannot be read or has changed since the
            job began, or the output is of another job.
        RerankError: The job ended early, for example because the model cannot be loaded; the
            message says why.
    """
    actors = check_concurrency(concurrency)
    resources = Resources(num_gpus, num_cpus)
    recipe = make_recipe(
        model, settings, top_k=top_k, score_threshold=score_threshold, resources=resources
    )
    texts = corpus_source(corpus)
    system, path = locate(source)
    folder = Folder(*locate(output))
    _refuse_inside(folder.path, path)
    with storage_errors("source", source):
        files = list_files(system, path)
    job = Job(
        recipe=recipe,
        corpus=texts,
        system=system,
        folder=folder,
        output_format=_check_format(output_format) or kind_of(files[0].path),
        with_text=with_text,
    )
    options = {
        **recipe.settings.to_dict(),
        **recipe.limits.to_dict(),
        "source": fingerprint(files),
        "corpus": texts.identity() if texts else None,
        "output_format": job.output_format,
        "with_text": with_text,
        "part_bytes": checks.count("part_bytes", part_bytes),
    }
    parts = cut(system, files, part_bytes=part_bytes, documents=IDS if texts else DOCUMENTS)
    with storage_errors("output", output):
        todo = folder.begin(options, parts)
    if todo:
        # Not before: the counts need a cluster, and Ray starts one if there is none.
        _run(replace(job, attempts=Attempts()), todo, actors, resources, progress=progress)
    folder.finish()
    return _report(folder, parts, parts_before=len(parts) - len(todo))


@dataclass(frozen=True, slots=True)
class Job:
    """The description of a job that all its actors get.

    Attributes:
        recipe: The settings for the engine.
        corpus: Documents that rows refer to by id, if any.
        system: The input's file system.
        folder: The output.
        output_format: `"parquet"` or `"jsonl"`.
        with_text: Whether results have the document's text.
        attempts: Finds rows on which actors die; `None` looks for none.
    """

    recipe: Recipe
    corpus: CorpusSource | None
    system: fs.FileSystem
    folder: Folder
    output_format: str
    with_text: bool
    attempts: Attempts | None = None


class PartRanker:
    """An actor with an engine, which ranks whole parts."""

    def __init__(self, job: Job) -> None:
        """Load the model; errors as in `Reranker`."""
        self._job = job
        self._prepare = preparation(job.corpus)
        self._engine = job.recipe.load()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Rank a part and write it, unless that is done; return its row."""
        part = Part(**row)
        # Rows that Ray repeats after an actor died may be done already.
        if self._job.folder.counts(part) is None:
            self._rank(part)
        return row

    def _rank(self, part: Part) -> None:
        read = read_part(self._job.system, part, prepare=self._prepare)
        rank = self._job.attempts.rank if self._job.attempts else rank_items
        rankings = rank(self._engine, read.items, limits=self._job.recipe.limits)
        ranked = [
            item
            for item, ranking in zip(read.items, rankings, strict=True)
            if isinstance(item, Item) and isinstance(ranking, Ranking)
        ]
        bad = len(rankings) - len(ranked)
        write = ranked_jsonl if self._job.output_format == "jsonl" else ranked_parquet
        files = {
            f"{PUT_ASIDE}/{part.name}.jsonl": aside_jsonl(part, read, rankings) if bad else None,
            f"{part.name}.{self._job.output_format}": (
                write(read, rankings, with_text=self._job.with_text) if ranked else None
            ),
        }
        pairs = sum(len(item.texts) for item in ranked)
        self._job.folder.finish_part(part, Counts(len(ranked), pairs, bad), files)


def _run(
    job: Job,
    parts: list[Part],
    concurrency: tuple[int, int],
    resources: Resources,
    *,
    progress: bool,
) -> None:
    min_actors, max_actors = concurrency
    # Blocks of few parts, so that all actors share the last ones.
    blocks = min(len(parts), _MAX_BLOCKS)
    dataset = ray.data.from_items([asdict(part) for part in parts], override_num_blocks=blocks)
    dataset.context.enable_progress_bars = progress
    ranked = dataset.map(
        PartRanker,  # type: ignore[arg-type]  # Ray takes classes as well
        fn_constructor_kwargs={"job": job},
        compute=ActorPoolStrategy(
            min_size=min_actors, max_size=max_actors, max_tasks_in_flight_per_actor=1
        ),
        num_gpus=resources.num_gpus or None,
        num_cpus=resources.num_cpus,
    )
    try:
        for _ in ranked.iter_rows():
            pass
    except ray.exceptions.RayError as error:
        # The last line of Ray's traceback is the reason.
        reason = str(error).strip().splitlines()[-1]
        raise RerankError(
            f"The job ended early: {reason} What was finished stays; remove the cause, and start "
            "the job again."
        ) from error


def _report(folder: Folder, parts: list[Part], *, parts_before: int) -> FilesReport:
    counts = [folder.counts(part) for part in parts]
    lost = [part.name for part, each in zip(parts, counts, strict=True) if each is None]
    if lost:
        raise RerankError(
            f"{len(lost)} parts are not done, {lost[0]} among them, though the job has ended; "
            "start it again."
        )
    return FilesReport(
        parts=len(parts),
        parts_before=parts_before,
        queries=sum(each.queries for each in counts if each),
        pairs=sum(each.pairs for each in counts if each),
        put_aside=sum(each.put_aside for each in counts if each),
    )


def _check_format(output_format: str | None) -> str | None:
    if output_format is not None and output_format not in FORMATS:
        raise SettingsError(
            f"output_format must be one of {', '.join(FORMATS)}, or None, got {output_format!r}."
        )
    return output_format


def _refuse_inside(output: str, source: str) -> None:
    """Refuse an output within the input, which the next run would read."""
    if output == source or output.startswith(f"{source}/"):
        raise SettingsError(f"output {output} is within the input {source}; give another folder.")
