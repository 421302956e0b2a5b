"""Which waiting pairs go through the model together: fair between calls, longest first."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """Anything with a number of tokens."""

    def __len__(self) -> int:
        """Return the number of tokens, special tokens included."""
        ...


PairT = TypeVar("PairT", bound=Sized)


@dataclass(eq=False)
class Job(Generic[PairT]):
    """The pairs of one call, and where their logits go.

    Attributes:
        pairs: n tokenised pairs.
        future: Resolves to n logits in the order of `pairs`, or to the error that befell them.
        logits: What has been scored so far; `None` where nothing has.
        waiting: Positions in `pairs` that no pack has taken yet, the longest pair last.
        served: Tokens taken so far, counted from the queue's clock at the job's arrival.
        missing: How many pairs have no logit yet.
    """

    pairs: Sequence[PairT]
    future: Future[list[float]] = field(default_factory=Future)
    logits: list[float | None] = field(init=False)
    waiting: list[int] = field(init=False)
    served: int = field(init=False, default=0)
    missing: int = field(init=False)

    def __post_init__(self) -> None:
        """Put the pairs in the order in which packs take them."""
        self.logits = [None] * len(self.pairs)
        self.waiting = sorted(range(len(self.pairs)), key=lambda i: len(self.pairs[i]))
        self.missing = len(self.pairs)


Pack = list[tuple[Job[PairT], int]]


class PackQueue(Generic[PairT]):
    """Jobs that wait for the model; gives out packs of at most a budget of tokens.

    Fair queueing by tokens: the job that has been served least goes first, and one that arrives
    starts level with the least served, so a call of ten pairs overtakes the rest of a call of ten
    thousand while neither can starve the other. Not safe to share between threads without a lock.
    """

    def __init__(self) -> None:
        self._jobs: list[Job[PairT]] = []
        self.pairs = 0

    def __len__(self) -> int:
        """Return how many pairs wait."""
        return self.pairs

    def put(self, job: Job[PairT]) -> None:
        """Let a job wait; it has at least one pair."""
        job.served = min((each.served for each in self._jobs), default=0)
        self._jobs.append(job)
        self.pairs += len(job.waiting)

    def drop(self, job: Job[PairT]) -> None:
        """Forget the pairs of a job that no pack has taken; harmless if there are none."""
        if job in self._jobs:
            self._jobs.remove(job)
            self.pairs -= len(job.waiting)
            job.waiting.clear()

    def take(self, max_tokens: int) -> Pack[PairT]:
        """Return the next pack: at least one pair, and no more than fit `max_tokens`.

        A single pair longer than the budget makes a pack of its own. `[]` if nothing waits.
        """
        pack: Pack[PairT] = []
        room = max_tokens
        while self._jobs:
            job = min(self._jobs, key=lambda each: (each.served, len(each.waiting)))
            taken = self._take_from(job, room, alone=not pack)
            if not taken:
                break
            pack.extend((job, position) for position in taken)
            room -= sum(len(job.pairs[position]) for position in taken)
        return pack

    def drain(self) -> list[Job[PairT]]:
        """Empty the queue and return the jobs that were in it."""
        jobs, self._jobs, self.pairs = self._jobs, [], 0
        return jobs

    def _take_from(self, job: Job[PairT], room: int, *, alone: bool) -> list[int]:
        """Take from one job until the room is used up or another job has been served less."""
        limit = min((each.served for each in self._jobs if each is not job), default=None)
        taken: list[int] = []
        while job.waiting and (limit is None or job.served <= limit):
            tokens = len(job.pairs[job.waiting[-1]])
            if tokens > room and not (alone and not taken):
                break
            taken.append(job.waiting.pop())
            job.served += tokens
            room -= tokens
        self.pairs -= len(taken)
        if not job.waiting:
            self._jobs.remove(job)
        return taken
