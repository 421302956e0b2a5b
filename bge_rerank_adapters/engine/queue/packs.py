"""Which waiting pairs go through the model together: short calls first, longest pairs first."""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, Protocol, TypeVar

# One pack in so many begins with the call that has waited longest: enough that it gets done
# whatever arrives, and seldom enough that a call of ten long documents meets one or two.
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
        future: Resolves to n logits in the order of `pairs`, or to the error that befell them.
        name: What an error calls the pair at an index of the caller's list.
        logits: What has been scored so far; `None` where nothing has.
        waiting: Positions in `pairs` that no pack has taken yet, the longest pair last.
        tokens_left: Tokens of those.
        missing: How many pairs have no logit yet.
        arrival: Its number among all jobs of a queue.
        queued_at: When it was queued, by the monotonic clock; `None` once a pack has some of it.
        waited_s: Seconds until then; 0 before.
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
        """Put the pairs in the order in which packs take them."""
        self.logits = [None] * len(self.pairs)
        self.waiting = sorted(range(len(self.pairs)), key=lambda i: len(self.pairs[i]))
        self.tokens_left = sum(map(len, self.pairs))
        self.missing = len(self.pairs)

    @property
    def size(self) -> tuple[int, int]:
        """What jobs are ordered by: tokens left, and of equals the one that came first."""
        return self.tokens_left, self.arrival


Pack = list[tuple[Job[PairT], int]]


class PackQueue(Generic[PairT]):
    """Jobs that wait for the model; gives out packs of at most a budget of tokens.

    The job with the fewest tokens left goes first, so a call of ten pairs overtakes the rest of a
    call of ten thousand, and calls of one size are served as they came. Every eighth pack begins
    with the job that has waited longest instead, so no stream of short calls starves a long one:
    the oldest gets about an eighth of the work. What room is left goes to the next in line.

    Adding and taking cost the logarithm of the number of jobs. Not safe to share between threads
    without a lock.
    """

    def __init__(self) -> None:
        """Make an empty queue."""
        self._arrivals = count()
        # Both hold every job that waits: in the order of arrival, and of size. An OrderedDict, for
        # the first key of a plain one is found only after all that were deleted before it.
        self._jobs: OrderedDict[int, Job[PairT]] = OrderedDict()
        self._sizes: list[tuple[int, int]] = []
        self._packs = 0
        self.pairs = 0

    def __len__(self) -> int:
        """Return how many pairs wait."""
        return self.pairs

    def put(self, job: Job[PairT]) -> None:
        """Let a job wait; it has at least one pair."""
        job.arrival = next(self._arrivals)
        self._jobs[job.arrival] = job
        insort(self._sizes, job.size)
        self.pairs += len(job.waiting)

    def drop(self, job: Job[PairT]) -> None:
        """Forget the pairs of a job that no pack has taken; harmless if there are none."""
        if self._jobs.get(job.arrival) is job:
            self._forget_size(job)
            del self._jobs[job.arrival]
            self.pairs -= len(job.waiting)
            job.waiting.clear()

    def take(self, max_tokens: int, *, multiple: int = 1) -> Pack[PairT]:
        """Return the next pack: at least one pair, and no more than fit `max_tokens`.

        Pairs come longest first, whatever job they are of: a model may share work between
        neighbours of equal length.

        Args:
            max_tokens: Token budget of the pack; a single longer pair makes a pack of its own.
            multiple: A pack that leaves pairs of a job behind has a multiple of so many pairs: of
                much the same length, they share out evenly among as many streams.

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
        """Forget all jobs."""
        self._jobs.clear()
        self._sizes.clear()
        self.pairs = 0

    def _take_from(self, job: Job[PairT], room: int, *, before: int, multiple: int) -> list[int]:
        """Take the longest pairs of a job that fit the room; one at least for an empty pack.

        Args:
            job: The one in turn.
            room: Tokens that the pack may still take.
            before: How many pairs the pack has already.
            multiple: As of `take`.
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
            self._forget_size(job)
            job.tokens_left -= sum(len(job.pairs[position]) for position in taken)
            self.pairs -= len(taken)
            if job.waiting:
                insort(self._sizes, job.size)
            else:
                del self._jobs[job.arrival]
        return taken

    def _forget_size(self, job: Job[PairT]) -> None:
        del self._sizes[bisect_left(self._sizes, job.size)]
