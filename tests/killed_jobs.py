"""Jobs of `rerank_files` in processes of their own, to be killed; without torch, so soon there."""

import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

from bge_rerank_adapters.calls.limits import Limits
from bge_rerank_adapters.calls.ranking import PairScore, Ranking, ScoredRequest, sigmoid
from bge_rerank_adapters.calls.requests import Request
from bge_rerank_adapters.ray import files, rerank_files
from bge_rerank_adapters.ray.recipe import Recipe
from bge_rerank_adapters.settings import EngineSettings

SETTINGS = EngineSettings(model="tiny", device="cpu", dtype="float32")
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([__name__])


class ByLength:
    """Stands for an engine: the logit of a document is its number of characters."""

    def rerank_many(self, requests: Sequence[Request], **limits: Any) -> Iterator[Ranking]:
        for query, texts in requests:
            request = Request(query, list(texts))
            scores = [PairScore(sigmoid(len(text)), float(len(text))) for text in texts]
            yield ScoredRequest(request, scores).rank(Limits(**limits))


def start_job(
    source: str, output: str, *, part_bytes: int
) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    """Return a process that does a job alone, and what it says where it is through.

    It says "begun" once, and "part" before each part, for which it waits to hear something back. At
    the end it sends the report.
    """
    ours, theirs = _processes.Pipe()
    job = _processes.Process(target=_work, args=(theirs, source, output, part_bytes), daemon=True)
    job.start()
    theirs.close()
    return job, ours


def _work(told: Connection, source: str, output: str, part_bytes: int) -> None:
    def run_here(job: files.Job, parts: Sequence[files.Part], *_: Any, progress: bool) -> None:
        ranker = files.PartRanker(job)
        for part in parts:
            told.send("part")
            told.recv()
            ranker(asdict(part))

    Recipe.load = lambda self: ByLength()  # type: ignore[method-assign,assignment,return-value]
    files._run = run_here
    files.Attempts = lambda: None  # type: ignore[misc,assignment]
    told.send("begun")
    report = rerank_files(source, output, settings=SETTINGS, part_bytes=part_bytes)
    told.send(report)
