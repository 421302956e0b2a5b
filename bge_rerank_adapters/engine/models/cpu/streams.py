"""Data parallelism on one CPU: each thread runs whole pairs instead of a share of every product.

Threads that share products meet after each of them, several hundred times a pack. Where products
are short, as in half precision on a CPU with matrix units, waking and waiting takes as long as they
do, and longer once another part of the program computes with torch as well.
"""

import weakref
from collections.abc import Sequence
from concurrent.futures import Future, wait

import torch

from bge_rerank_adapters.engine.models.base import Model, NativeModel
from bge_rerank_adapters.engine.models.cpu.threads import (
    Helpers,
    Tasks,
    end_threads,
    fulfil,
    start_threads,
)
from bge_rerank_adapters.engine.text.pairs import TokenPair

# Python runs one stream's lines at a time, which take a fifteenth of what its products take; so
# where there are more threads, a stream has several.
_MOST_STREAMS = 8
# With this package's own kernels they take a sixtieth at most, and no kernel has several threads.
_MOST_STREAMS_OF_ONE_THREAD = 64
# Tokens of a pack for each stream where the user leaves it open: shares of 512 to 2,048 tokens are
# about as fast as each other.
_STREAM_TOKENS = 1024
# Threads that share products are as fast as so many of their number to this power: 1.7 for two,
# 4.8 for eight. Measured for two: 1.0 to 1.4 in bfloat16 with AMX, 1.7 to 1.9 in float32.
_SHARED_SPEED = 0.75


def stream_count(device: torch.device, dtype: torch.dtype) -> int:
    """Return how many streams suit layers that use torch's threads; 1 leaves threads together.

    In float32 products are long enough that threads lose nothing by sharing them.

    Args:
        device: Where the model runs.
        dtype: Of its layers.
    """
    if device.type != "cpu" or dtype == torch.float32:
        return 1
    threads = torch.get_num_threads()
    own = -(-threads // _MOST_STREAMS)
    return threads // own


def one_thread_stream_count() -> int:
    """Return how many streams suit layers that run in one thread each, as own kernels do."""
    return min(torch.get_num_threads(), _MOST_STREAMS_OF_ONE_THREAD)


def with_streams(model: NativeModel, streams: int) -> Model:
    """Return the model with its packs shared out among streams, or as it is for a single one."""
    return StreamedModel(model, streams) if streams > 1 else model


class StreamedModel:
    """A model whose packs are shared out by the pair among streams.

    What does not share out well, a long pair alone for one, is run by all threads together.

    Attributes:
        device: As of the model.
        dtype: As of the model.
        streams: How many there are.
        pack_tokens: Token budget of a pack that gives each stream enough to do.
    """

    def __init__(self, model: NativeModel, streams: int) -> None:
        """Share the threads that torch would compute with here among the streams.

        Args:
            model: Can be used by several threads at once.
            streams: 2 to the number of threads.
        """
        self.device, self.dtype, self.streams = model.device, model.dtype, streams
        self.pack_tokens = max(model.pack_tokens, streams * _STREAM_TOKENS)
        self._model = model
        threads = torch.get_num_threads()
        own = threads // streams
        # How many times as fast as a stream all threads are together.
        self._together = (threads / own) ** _SHARED_SPEED
        self._helpers = Helpers(Tasks(), streams)
        weakref.finalize(self, end_threads, self._helpers.tasks, streams).atexit = False
        start_threads(streams, own, self._helpers.tasks)

    def logits(self, pairs: Sequence[TokenPair]) -> list[float]:
        """Return the logit of each pair of a pack; the same for the same pack each time."""
        parts = _share_out([len(pair) for pair in pairs], self.streams)
        longest = max(sum(len(pairs[place]) for place in part) for part in parts)
        if longest > sum(map(len, pairs)) / self._together:
            return self._model.logits(pairs, helpers=self._helpers)
        futures = [self._score([pairs[place] for place in part]) for part in parts]
        # All of them, so that none holds memory any longer when one has failed for want of it.
        wait(futures)
        logits = [0.0] * len(pairs)
        for part, future in zip(parts, futures, strict=True):
            for place, logit in zip(part, future.result(), strict=True):
                logits[place] = logit
        return logits

    def _score(self, pairs: Sequence[TokenPair]) -> Future[list[float]]:
        future, model = Future[list[float]](), self._model
        self._helpers.tasks.put(lambda: fulfil(future, lambda: model.logits(pairs)))
        return future


def _share_out(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Return the places of each part: the longest first, each to the part with the least so far."""
    shares: list[list[int]] = [[] for _ in range(min(parts, len(lengths)))]
    tokens = [0] * len(shares)
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        least = tokens.index(min(tokens))
        shares[least].append(place)
        tokens[least] += lengths[place]
    return shares
