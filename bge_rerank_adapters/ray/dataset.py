"""`rerank_dataset`: ranks a Ray dataset of queries with documents by a pool of actors."""

import logging
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset
from ray.data.dataset import MaterializedDataset

from bge_rerank_adapters.calls.items import rank_items
from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.ray.attempts import Attempts
from bge_rerank_adapters.ray.corpus import IDS, CorpusSource, corpus_source, with_texts
from bge_rerank_adapters.ray.recipe import Recipe, Resources, check_concurrency, make_recipe
from bge_rerank_adapters.ray.rows import (
    DOCUMENTS,
    ERROR,
    RESULTS,
    Prepare,
    exploded_table,
    items_of,
    ranked_table,
)
from bge_rerank_adapters.settings import EngineSettings, checks

_log = logging.getLogger(__name__)


def rerank_dataset(
    dataset: Dataset,
    *,
    model: str | None = None,
    settings: EngineSettings | None = None,
    top_k: int | None = None,
    score_threshold: float | None = None,
    corpus: Any = None,
    with_text: bool = True,
    concurrency: int | tuple[int, int] = 1,
    num_gpus: float = 0,
    num_cpus: float = 1,
    batch_size: int = 64,
) -> Dataset:
    """Return a dataset of the rows' rankings, one row for each row of the input.

    It is lazy, like all of Ray Data: nothing runs before the result is read or written. Each actor
    loads the model once and holds one batch at a time; Ray's object store limits what waits between
    reading, ranking and writing. An actor that dies is restarted and its rows are repeated: none is
    lost or duplicated. A row on which actors die each time is put aside.

    Args:
        dataset: Rows of `query` and `documents`: a list of texts, or of objects with a `text` and
            an optional `id`. With a `corpus`, `document_ids` instead: a list of ids. All other
            columns, such as `query_id`, are kept.
        model: A checkpoint, as in `Reranker`.
        settings: All engine settings, in place of `model`. The device "auto" becomes "cuda" if the
            actors have a GPU, otherwise "cpu".
        top_k: Maximum number of results of a row; `None` is all.
        score_threshold: Lowest score to keep, in [0, 1], inclusive.
        corpus: Texts by id: a dict, which is copied to every actor; or the path of Parquet or JSONL
            files with `doc_id` and `text`, which each machine copies into a database file in its
            temporary folder once.
        with_text: Whether results have the document's text.
        concurrency: Number of actors, or their minimum and maximum.
        num_gpus: GPUs of each actor.
        num_cpus: CPUs of each actor, and its number of threads.
        batch_size: Rows that an actor ranks at a time.

    Returns:
        The columns of the input without the documents, in the order in which Ray finishes the rows,
        unless `execution_options.preserve_order` is set in `DataContext`; and also:

        - `results`: a list, best first, of `rank` (from 1), `index` (from 0, in the row's own
          documents), `id` (as a text; null if it has none), `score`, `logit`, `truncated`,
          `query_truncated`, `span` (`[start, end]`, null without windows) and `text` (null if
          `with_text` is false).
        - `error`: null, or why the row has no results: it could not be read, the model failed
          on it, or actors died on it.

    Raises:
        SettingsError: A setting is not allowed, or the dataset lacks a column.
    """
    if not isinstance(dataset, Dataset):
        raise SettingsError(
            f"dataset must be a ray.data.Dataset, got {type(dataset).__name__}; make one with "
            "ray.data.read_parquet, read_json or from_items."
        )
    min_actors, max_actors = check_concurrency(concurrency)
    resources = Resources(num_gpus, num_cpus)
    recipe = make_recipe(
        model, settings, top_k=top_k, score_threshold=score_threshold, resources=resources
    )
    source = corpus_source(corpus)
    _check_columns(dataset, IDS if source else DOCUMENTS)
    _warn_of_full_cluster(dataset, min_actors * num_cpus)
    return dataset.map_batches(
        RowRanker,
        fn_constructor_kwargs={
            "recipe": recipe,
            "source": source,
            "with_text": with_text,
            "attempts": Attempts(),
        },
        batch_format="pyarrow",
        batch_size=checks.count("batch_size", batch_size),
        compute=ActorPoolStrategy(min_size=min_actors, max_size=max_actors),
        num_gpus=num_gpus or None,
        num_cpus=num_cpus,
    )


def explode(ranked: Dataset) -> Dataset:
    """Return a dataset with a row for each result of each row of a ranked one.

    Returns:
        The ranked dataset's columns without `results` and `error`, and those of a result: `rank`,
        `index`, `id`, `score`, `logit`, `truncated`, `query_truncated`, `span` and `text`. Rows
        without results, such as those put aside, give none. The dataset must not have columns with
        these names, or the job fails.
    """
    return ranked.map_batches(exploded_table, batch_format="pyarrow")


def split_errors(ranked: Dataset) -> tuple[Dataset, Dataset]:
    """Return the rows that were ranked, and those that were put aside.

    The ranking runs now, once, and is kept in Ray's object store, which spills to disk. For larger
    results write the dataset, and split what was written.

    Returns:
        Two datasets: the rows whose `error` is null, without that column, and the others, without
        `results`.
    """
    whole = ranked.materialize()
    return (
        whole.map_batches(_without_error, batch_format="pyarrow"),
        whole.map_batches(_with_error, batch_format="pyarrow"),
    )


class RowRanker:
    """An actor with an engine, and perhaps a corpus."""

    def __init__(
        self,
        recipe: Recipe,
        source: CorpusSource | None,
        *,
        with_text: bool,
        attempts: Attempts | None = None,
    ) -> None:
        """Load the model; errors as in `Reranker`.

        Args:
            recipe: The settings for the engine.
            source: Documents that rows refer to by id, if any.
            with_text: Whether results have the document's text.
            attempts: Finds rows on which actors die; `None` looks for none.
        """
        self._limits, self._rank = recipe.limits, attempts.rank if attempts else rank_items
        self._with_text = with_text
        self._prepare = preparation(source)
        self._engine = recipe.load()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the table's rows, ranked."""
        items = items_of(table, prepare=self._prepare)
        rankings = self._rank(self._engine, items, limits=self._limits)
        return ranked_table(table, items, rankings, with_text=self._with_text)


def preparation(source: CorpusSource | None) -> Prepare | None:
    """Return the function that adds documents to rows, or `None` if they have them."""
    if source is None:
        return None
    corpus = source.open()
    return lambda row: with_texts(row, corpus)


def _check_columns(dataset: Dataset, documents: str) -> None:
    """Refuse a dataset without the columns, if they are known without reading it."""
    names = dataset.columns(fetch_if_missing=False)
    if names is None:
        return
    for name in ("query", documents):
        if name not in names:
            raise SettingsError(
                f"The dataset must have a column {name}, it has {', '.join(names)}; rename one: "
                f'dataset.rename_columns({{"...": "{name}"}}).'
            )
    for name in (RESULTS, ERROR):
        if name in names:
            raise SettingsError(
                f"The dataset has a column {name} already, which the ranking would overwrite; "
                f'rename it: dataset.rename_columns({{"{name}": "..."}}).'
            )


def _warn_of_full_cluster(dataset: Dataset, cpus: float) -> None:
    """Log a warning if the actors leave no CPU to the tasks that read the dataset.

    Ray would wait for one without end. It is not an error, since a cluster may grow.
    """
    if isinstance(dataset, MaterializedDataset) or not ray.is_initialized():
        return
    there = ray.cluster_resources().get("CPU", 0.0)  # type: ignore[no-untyped-call]
    if cpus and there - cpus < 1:
        _log.warning(
            "The actors take %g of the cluster's %g CPUs; if it cannot grow, none is left to "
            "read the dataset with, and the job waits for ever. Take fewer actors, or a smaller "
            "num_cpus.",
            cpus,
            there,
        )


def _without_error(table: pa.Table) -> pa.Table:
    return table.filter(table[ERROR].is_null()).drop_columns([ERROR])


def _with_error(table: pa.Table) -> pa.Table:
    return table.filter(table[ERROR].is_valid()).drop_columns([RESULTS])
