"""Finds rows on which their actor's process dies, and puts them aside.

Ray Data restarts an actor that has died and gives it the same rows again, without end. A row that
kills the actor each time, for example for lack of memory, would keep the job from ending.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import ray

from bge_rerank_adapters.calls.items import Bad, Item, rank_items
from bge_rerank_adapters.calls.limits import Limits
from bge_rerank_adapters.calls.ranking import Ranking

# How often rows are tried together; afterwards one by one, to find the row that fails.
_TRIES_TOGETHER = 2
# How often an actor may die on a single row: once may be the machine's fault.
_TRIES_ALONE = 2


class Unfinished:
    """An actor that counts how often each piece of work was begun and not finished."""

    def __init__(self) -> None:
        self._begun: dict[str, int] = {}

    def begin(self, work: str) -> int:
        """Count an attempt; return how many earlier ones were not finished."""
        before = self._begun.get(work, 0)
        self._begun[work] = before + 1
        return before

    def finish(self, work: str) -> None:
        """Forget a piece of work and the pieces within it."""
        for name in [each for each in self._begun if each == work or each.startswith(f"{work}/")]:
            del self._begun[name]


class Attempts:
    """Ranks rows for the actors of a job, and counts attempts that do not finish."""

    def __init__(self) -> None:
        """Start the actor that counts; it ends with the last reference to this object."""
        self._counts: Any = ray.remote(Unfinished).options(num_cpus=0, max_restarts=-1).remote()

    def rank(
        self, engine: Any, items: Sequence[Item | Bad], *, limits: Limits
    ) -> list[Ranking | Bad]:
        """Return the ranking of each item, in order, or why there is none.

        Items on which the process died before are ranked one by one, and one on which it dies again
        is put aside.

        Args:
            engine: The reranker.
            items: n items; may be empty.
            limits: The limits of each ranking.
        """
        # An actor keeps its id when it is restarted, and runs one call at a time.
        work = f"{ray.get_runtime_context().get_actor_id()}:{_digest(items)}"
        if self._begin(work) < _TRIES_TOGETHER:
            rankings = rank_items(engine, items, limits=limits)
        else:
            rankings = [
                self._rank_alone(engine, item, limits=limits, work=f"{work}/{place}")
                for place, item in enumerate(items)
            ]
        self._finish(work)
        return rankings

    def _rank_alone(
        self, engine: Any, item: Item | Bad, *, limits: Limits, work: str
    ) -> Ranking | Bad:
        if isinstance(item, Item) and self._begin(work) >= _TRIES_ALONE:
            # Not finished, so that it stays aside if another row kills the process later.
            return Bad(
                item.line,
                f"the process that ranked it ended, each of {_TRIES_ALONE} times that it was "
                "ranked alone; Ray's logs may say why, and too little memory is the usual cause",
                item.source,
            )
        (ranking,) = rank_items(engine, [item], limits=limits)
        self._finish(work)
        return ranking

    def _begin(self, work: str) -> int:
        try:
            return int(ray.get(self._counts.begin.remote(work)))
        except ray.exceptions.RayActorError:
            return 0  # its machine was lost, with the counts

    def _finish(self, work: str) -> None:
        self._counts.finish.remote(work)


def _digest(items: Sequence[Item | Bad]) -> str:
    content = [(each.query, each.texts) if isinstance(each, Item) else each.line for each in items]
    return hashlib.blake2b(repr(content).encode("utf-8", "backslashreplace")).hexdigest()
