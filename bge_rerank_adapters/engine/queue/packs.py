"""Builds packs from waiting pairs: short calls first, longest pairs first."""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, Protocol, TypeVar

# Every n-th pack begins with the call that has waited longest, so that it makes progress whatever
# arrives. At 8, a call of ten long documents is delayed by only one or two such packs.
_OLDEST_EVERY = 8


class Sized(Protocol):
    """Anything with a number of tokens."""

    def __len__(self) -> int:
        """Return the number of tokens, special tokens included."""
        ...


PairT = TypeVar("PairT", bound=Sized)


def _plain_name(index: int) -> str:
    return f"the pair at index {index}"


@dataclass(eq=False)
class Job(Generic[PairT]):
    """The pairs of one call, and where their logits go.

    Attributes:
        pairs: n tokenised pairs.
        future: Resolves to n logits in the order of `pairs`, or to the error of one of them.
        name: Returns the name in errors of the pair at an index of the caller's list.
        logits: The logits so far; `None` for pairs not yet scored.
        waiting: Positions in `pairs` that no pack has taken yet, the longest pair last.
        tokens_left: Number of tokens of the waiting pairs.
        missing: How many pairs have no logit yet.
        arrival: Number of the job in order of arrival.
        queued_at: When it was queued, by the monotonic clock; `None` once a pack has taken a pair.
        waited_s: Seconds between the two; 0 before.
    """

    pairs: Sequence[PairT]
    future: Future[list[float]] = field(default_factory=Future)
    name: Callable[[int], str] = _plain_name
    logits: list[float | None] = field(init=False)
    waiting: list[int] = field(init=False)
    tokens_left: int = field(init=False)
    missing: int = field(init=False)
    arrival: int = field(init=False, default=0)
    queued_at: float | None = field(init=False, default=None)
    waited_s: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        """Sort the pairs into the order in which packs take them."""
        self.logits = [None] * len(self.pairs)
        self.waiting = sorted(range(len(self.pairs)), key=lambda i: len(self.pairs[i]))
        self.tokens_left = sum(map(len, self.pairs))
        self.missing = len(self.pairs)

    @property
    def size(self) -> tuple[int, int]:
        """Sort key of jobs: tokens left, then arrival."""
        return self.tokens_left, self.arrival


Pack = list[tuple[Job[PairT], int]]


class PackQueue(Generic[PairT]):
    """The jobs that wait for the model, from which packs of a token budget are taken.

    The job with the fewest tokens left goes first: a call of ten pairs overtakes a call of ten
    thousand, and calls of equal size are served in order of arrival. Every eighth pack begins with
    the job that has waited longest instead, so that short calls cannot starve a long one. A pack
    with room left is filled from the next job.

    Adding and taking take time logarithmic in the number of jobs. Not thread-safe.
    """

    def __init__(self) -> None:
        """Make an empty queue."""
        self._arrivals = count()
        # Both hold every waiting job, in order of arrival and of size. An OrderedDict, since a
        # plain dict skips over all its deleted keys to find the first.
        self._jobs: OrderedDict[int, Job[PairT]] = OrderedDict()
        self._sizes: list[tuple[int, int]] = []
        self._packs = 0
        self.pairs = 0

    def __len__(self) -> int:
        """Return how many pairs wait."""
        return self.pairs

    def put(self, job: Job[PairT]) -> None:
        """Add a job, which has at least one pair."""
        job.arrival = next(self._arrivals)
        self._jobs[job.arrival] = job
        insort(self._sizes, job.size)
        self.pairs += len(job.waiting)

    def drop(self, job: Job[PairT]) -> None:
        """Remove the waiting pairs of a job, if there are any."""
        if self._jobs.get(job.arrival) is job:
            self._remove_size(job)
            del self._jobs[job.arrival]
            self.pairs -= len(job.waiting)
            job.waiting.clear()

    def take(self, max_tokens: int, *, multiple: int = 1) -> Pack[PairT]:
        """Return the next pack: at least one pair, and no more than fit `max_tokens`.

        Pairs come longest first, whatever their job: a model may share work between neighbours of
        equal length.

        Args:
            max_tokens: Token budget of the pack; a single longer pair makes a pack of its own.
            multiple: A pack that does not finish a job has a multiple of this many pairs, so that
                as many streams can share them evenly.

        Returns:
            The jobs and positions of its pairs; `[]` if nothing waits.
        """
        pack: Pack[PairT] = []
        room = max_tokens
        oldest_first = self._packs % _OLDEST_EVERY == _OLDEST_EVERY - 1
        while self._jobs:
            job = self._jobs[next(iter(self._jobs)) if oldest_first else self._sizes[0][1]]
            taken = self._take_from(job, room, before=len(pack), multiple=multiple)
            pack.extend((job, position) for position in taken)
            room -= sum(len(job.pairs[position]) for position in taken)
            if job.waiting:
                break
        self._packs += bool(pack)
        pack.sort(key=lambda place: -len(place[0].pairs[place[1]]))
        return pack

    def clear(self) -> None:
        """Remove all jobs."""
        self._jobs.clear()
        self._sizes.clear()
        self.pairs = 0

    def _take_from(self, job: Job[PairT], room: int, *, before: int, multiple: int) -> list[int]:
        """Take the longest pairs of a job that fit; at least one if the pack is empty.

        Args:
            job: The job to take from.
            room: How many more tokens fit the pack.
            before: How many pairs the pack has already.
            multiple: As for `take`.
        """
        taken: list[int] = []
        while job.waiting:
            tokens = len(job.pairs[job.waiting[-1]])
            if tokens > room and (before or taken):
                break
            taken.append(job.waiting.pop())
            room -= tokens
        if job.waiting and before + len(taken) > multiple:
            for _ in range(min(len(taken), (before + len(taken)) % multiple)):
                job.waiting.append(taken.pop())
        if taken:
            self._remove_size(job)
            job.tokens_left -= sum(len(job.pairs[position]) for position in taken)
            self.pairs -= len(taken)
            if job.waiting:
                insort(self._sizes, job.size)
            else:
                del self._jobs[job.arrival]
        return taken

    def _remove_size(self, job: Job[PairT]) -> None:
        del self._sizes[bisect_left(self._sizes, job.size)]
