"""A processor's threads apart: each takes pairs of its own instead of a share of every product.

Threads that share products meet after each of them, several hundred times a pack. Where products
are short, as in half precision on a processor with matrix units, waking and waiting takes as long
as they do, and longer once another part of the program computes with torch as well.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Protocol, TypeVar

import torch

from bge_rerank_adapters.tokenization import TokenPair

# Python runs one stream's lines at a time, which take a fifteenth of what its products take; so
# where there are more threads, a stream has several.
_MOST_STREAMS = 8
# Threads that share products are as fast as so many of their number to this power: 1.7 for two,
# 4.8 for eight. Measured for two: 1.0 to 1.4 in bfloat16 with AMX, 1.7 to 1.9 in float32.
_SHARED_SPEED = 0.75

T = TypeVar("T")


class _Model(Protocol):
    device: torch.device
    dtype: torch.dtype

    def logits(self, pairs: Sequence[TokenPair]) -> list[float]: ...


def stream_count(device: torch.device, dtype: torch.dtype) -> int:
    """Return how many streams a model of this dtype gets here; 1 leaves threads together.

    In float32 products are long enough that threads lose nothing by sharing them.
    """
    if device.type != "cpu" or dtype == torch.float32:
        return 1
    return min(torch.get_num_threads(), _MOST_STREAMS)


class StreamedModel:
    """A model whose packs are shared out by the pair among streams.

    What does not share out well, a long pair alone for one, is run by all threads together.

    Attributes:
        device: As of the model.
        dtype: As of the model.
        streams: How many there are.
    """

    def __init__(self, model: _Model, streams: int) -> None:
        """Share the threads that torch would compute with here among the streams.

        Args:
            model: Can be used by several threads at once.
            streams: 2 to the number of threads.
        """
        self.device, self.dtype, self.streams = model.device, model.dtype, streams
        self._model = model
        self._together = torch.get_num_threads() ** _SHARED_SPEED
        self._pool = ThreadPoolExecutor(
            streams,
            thread_name_prefix="bge-rerank-stream",
            initializer=_limit_threads,
            initargs=(torch.get_num_threads() // streams, torch.get_num_threads()),
        )

    def logits(self, pairs: Sequence[TokenPair]) -> list[float]:
        """Return the logit of each pair of a pack; the same for the same pack each time."""
        parts = _share_out([len(pair) for pair in pairs], self.streams)
        longest = max(sum(len(pairs[place]) for place in part) for part in parts)
        if longest > sum(map(len, pairs)) / self._together:
            return self._model.logits(pairs)
        futures = [
            self._pool.submit(self._model.logits, [pairs[place] for place in part])
            for part in parts
        ]
        # All of them, so that none holds memory any longer when one has failed for want of it.
        wait(futures)
        logits = [0.0] * len(pairs)
        for part, future in zip(parts, futures, strict=True):
            for place, logit in zip(part, future.result(), strict=True):
                logits[place] = logit
        return logits


def in_one_thread(work: Callable[[], T]) -> T:
    """Return what `work` returns, done as a stream of one thread would do it."""
    limits = (1, torch.get_num_threads())
    with ThreadPoolExecutor(1, initializer=_limit_threads, initargs=limits) as pool:
        return pool.submit(work).result()


def _share_out(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Return the places of each part: the longest first, each to the part with the least so far."""
    shares: list[list[int]] = [[] for _ in range(min(parts, len(lengths)))]
    tokens = [0] * len(shares)
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        least = tokens.index(min(tokens))
        shares[least].append(place)
        tokens[least] += lengths[place]
    return shares


def _limit_threads(own: int, default: int) -> None:
    """Let torch compute with so many threads in this one, and in others as before.

    torch.set_num_threads speaks for its own thread, and for all that use torch for the first time
    later. The latter is taken back by a thread that ends at once. This one's first use, which would
    set its own number to theirs, is made before.
    """
    torch.get_num_threads()
    torch.set_num_threads(own)
    taking_back = threading.Thread(target=torch.set_num_threads, args=(default,))
    taking_back.start()
    taking_back.join()
