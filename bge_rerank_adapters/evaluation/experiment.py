"""Runs an experiment: scores a first stage's documents with each engine."""

import hashlib
import json
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

from bge_rerank_adapters.calls.limits import check_top_k
from bge_rerank_adapters.calls.progress import ProgressBar
from bge_rerank_adapters.calls.ranking import Scorer
from bge_rerank_adapters.calls.trec import Run
from bge_rerank_adapters.engine.checkpoints.hub import TINY_FOLDER
from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.evaluation.collection import Collection
from bge_rerank_adapters.evaluation.report import Report
from bge_rerank_adapters.evaluation.result_files import (
    FIRST_STAGE,
    check_file_names,
    file_name,
    make_folder,
)
from bge_rerank_adapters.evaluation.scored import Scored
from bge_rerank_adapters.evaluation.state import State, weights_stamp
from bge_rerank_adapters.evaluation.timing import time_query, timed_queries
from bge_rerank_adapters.settings import EngineSettings
from bge_rerank_adapters.settings.checkpoints import TINY

# Version of the files with scores; increased when their content changes.
_LAYOUT = 3


def evaluate(
    collection: Collection,
    first_stage: Run,
    engines: Mapping[str, EngineSettings | Scorer],
    *,
    depth: int | None = None,
    folder: str | Path | None = None,
    progress: bool = False,
    time_depths: bool = False,
    first_stage_name: str = FIRST_STAGE,
) -> Report:
    """Return a report on reranking a first stage's documents with each engine.

    Queries are scored and timed one at a time.

    Args:
        collection: Documents, queries and judgements.
        first_stage: For each query the documents to rerank, best first; other queries are ignored.
        engines: The engines to compare, by their names in reports: settings, from which an engine
            is loaded and closed again, or a ready engine. With `folder`, the `repr` of a scorer of
            another package must contain everything that its scores depend on.
        depth: How many documents of each query are reranked; `None` is all.
        folder: Where scores are kept, so that an interrupted run can continue; created if it is
            missing. `None` keeps none.
        progress: Whether to show a bar on standard error.
        time_depths: Whether to time fewer candidates as well, on up to 20 queries, for
            `plot_quality_and_time`.
        first_stage_name: The name of the first stage in tables and pictures, such as "BM25".

    Raises:
        SettingsError: A value is out of range or is not an engine, two names would be the same in
            files, the run has a document that the collection lacks, or the folder cannot be used
            or has another experiment under the same name.
        RerankError: A model cannot be loaded, or failed.
    """
    depth = check_top_k(depth, name="depth")
    if not engines:
        raise SettingsError("engines is empty; name at least one, like {'tiny': EngineSettings()}.")
    check_file_names(engines)
    for name, engine in engines.items():
        _check_engine(name, engine)
    candidates = _candidates(collection, first_stage, depth)
    scored = []
    for name, engine in engines.items():
        scores, times = State(), State()
        if folder is not None:
            _check_identity(name, engine)
            header = _header(collection, candidates, engine)
            scores = State(_state_path(folder, name, "scores"), header)
            if time_depths:
                times = State(_state_path(folder, name, "times"), header)
        timed = timed_queries(candidates) if time_depths else []
        waiting, untimed = scores.missing(candidates), times.missing(timed)
        if waiting or untimed:
            with (
                _opened(engine) as reranker,
                ProgressBar([*waiting, *untimed], shown=progress) as bar,
            ):
                for query in waiting:
                    names = list(candidates[query])
                    scores.add(_score_query(reranker, query, collection, names))
                    bar.advance(1)
                for query in untimed:
                    times.add(time_query(reranker, query, collection, candidates))
                    bar.advance(1)
        scored.append(Scored.from_rows(name, scores.rows, times.rows))
    return Report(collection, candidates, scored, first_stage_name=first_stage_name)


def _check_engine(name: str, engine: object) -> None:
    if not isinstance(engine, EngineSettings | Scorer):
        raise SettingsError(
            f"The engine {name!r} must be an EngineSettings or a ready engine, got {engine!r}; "
            "write EngineSettings(model=...)."
        )


def _check_identity(name: str, engine: EngineSettings | Scorer) -> None:
    """Refuse to keep scores of a scorer that cannot be distinguished from another one."""
    known = isinstance(getattr(engine, "settings", engine), EngineSettings)
    if not known and type(engine).__repr__ is object.__repr__:
        raise SettingsError(
            f"The engine {name!r}, a {type(engine).__name__}, has no __repr__ that says what its "
            "scores depend on, so kept scores might be another's; add one, or leave folder out."
        )


def _candidates(collection: Collection, first_stage: Run, depth: int | None) -> Run:
    if not first_stage.keys() & collection.queries.keys():
        raise SettingsError(
            f"The first stage has none of the {len(collection.queries)} queries of "
            f"{collection.name} that are judged; use a run of the same collection."
        )
    candidates: Run = {}
    for query in collection.queries:
        found = first_stage.get(query, {})
        unknown = next((name for name in found if name not in collection.documents), None)
        if unknown is not None:
            raise SettingsError(
                f"The first stage found document {unknown!r} for query {query!r}, which is not in "
                f"{collection.name}; use a run of the same collection."
            )
        candidates[query] = dict(islice(found.items(), depth))
    return candidates


def _score_query(
    reranker: Scorer, query: str, collection: Collection, names: list[str]
) -> dict[str, Any]:
    texts = [collection.documents[name] for name in names]
    begin = time.perf_counter()
    ranked = reranker.rerank(collection.queries[query], texts)
    seconds = time.perf_counter() - begin
    logits = [each.score if each.logit is None else each.logit for each in ranked]
    return {
        "query": query,
        "documents": [names[each.index] for each in ranked],
        "logits": logits,
        "scores": [each.score for each in ranked],
        "truncated": sum(each.truncated for each in ranked),
        "query_truncated": any(each.query_truncated for each in ranked),
        "seconds": seconds,
        "engine": repr(reranker),
    }


def _opened(engine: EngineSettings | Scorer) -> AbstractContextManager[Scorer]:
    if isinstance(engine, Scorer):
        return nullcontext(engine)
    # Imported here, so that reading reports needs no torch.
    from bge_rerank_adapters.engine.reranker import Reranker

    reranker = Reranker.from_settings(engine)
    reranker.warm_up()
    return reranker


def _state_path(folder: str | Path, name: str, kind: str) -> Path:
    return make_folder(folder) / f"{file_name(name)}.{kind}.jsonl"


def _header(
    collection: Collection, candidates: Run, engine: EngineSettings | Scorer
) -> dict[str, Any]:
    settings = engine if isinstance(engine, EngineSettings) else getattr(engine, "settings", None)
    described, model = repr(engine), ""
    if isinstance(settings, EngineSettings):
        described = json.dumps(settings.to_dict())
        model = str(TINY_FOLDER) if settings.model == TINY else settings.model
    found = json.dumps([[query, *names] for query, names in candidates.items()])
    return {
        "layout": _LAYOUT,
        "settings": described,
        "weights": [list(each) for each in weights_stamp(model)] if model else [],
        "collection": collection.fingerprint(),
        "first_stage": hashlib.sha256(found.encode()).hexdigest()[:16],
    }
