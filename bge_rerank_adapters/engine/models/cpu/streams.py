"""Data parallelism on one CPU: each thread runs whole pairs instead of a share of every product.

Threads that share products synchronise after each of them, several hundred times a pack. If
products are short, as in half precision on a CPU with matrix units, this takes as long as the
products, and longer if another part of the program also computes with torch.
"""

import weakref
from collections.abc import Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import NamedTuple

import torch

from bge_rerank_adapters.engine.models.base import Model, NativeModel, PendingLogits
from bge_rerank_adapters.engine.models.cpu.threads import (
    ALONE,
    Helpers,
    Tasks,
    end_threads,
    fulfil,
    start_threads,
)
from bge_rerank_adapters.engine.text.pairs import TokenPair

# Python code runs in one stream at a time, and takes a fifteenth of the time of its products. So
# with more threads than this, each stream has several.
_MOST_STREAMS = 8
# With own kernels Python takes at most a sixtieth, and a kernel runs in one thread.
_MOST_STREAMS_OF_ONE_THREAD = 64
# The default token budget of a pack for each stream; 512 to 2,048 are about equally fast.
_STREAM_TOKENS = 1024
# n threads that share products are about n to this power times as fast as one: 1.7 for two, 4.8 for
# eight. Measured for two: 1.0 to 1.4 in bfloat16 with AMX, 1.7 to 1.9 in float32.
_SHARED_SPEED = 0.75


def stream_count(device: torch.device, dtype: torch.dtype) -> int:
    """Return the number of streams for layers that use torch's threads; 1 is no streams.

    In float32 products are long enough for threads to share them without loss.

    Args:
        device: The model's device.
        dtype: The dtype of its layers.
    """
    if device.type != "cpu" or dtype == torch.float32:
        return 1
    threads = torch.get_num_threads()
    own = -(-threads // _MOST_STREAMS)
    return threads // own


def one_thread_stream_count() -> int:
    """Return the number of streams for layers that run in one thread each, as own kernels do."""
    return min(torch.get_num_threads(), _MOST_STREAMS_OF_ONE_THREAD)


class SmallPack(NamedTuple):
    """Up to how many tokens streams run a pack together; 0 is never.

    Attributes:
        even: If its pairs could be divided evenly among the streams.
        uneven: If not.
    """

    even: int
    uneven: int


NO_SMALL_PACK = SmallPack(even=0, uneven=0)


def with_streams(model: NativeModel, streams: int, *, small: SmallPack = NO_SMALL_PACK) -> Model:
    """Return the model with its packs divided among streams; the model itself for one stream.

    Args:
        model: A thread-safe model.
        streams: Number of streams.
        small: Which packs the streams run together.
    """
    return StreamedModel(model, streams, small=small) if streams > 1 else model


class StreamedModel:
    """A model whose packs are divided by pairs among streams.

    Small packs are run by the streams together. A larger one that cannot be divided evenly, such as
    one long pair, is run by all threads together.

    Attributes:
        device: The model's device.
        dtype: The model's dtype.
        streams: Number of streams.
        pack_tokens: Token budget of a pack, enough for all streams.
        runs_ahead: False: a CPU has nothing to do meanwhile.
    """

    runs_ahead = False

    def __init__(
        self, model: NativeModel, streams: int, *, small: SmallPack = NO_SMALL_PACK
    ) -> None:
        """Divide the threads that torch uses in this thread among the streams.

        Args:
            model: A thread-safe model.
            streams: From 2 to the number of threads.
            small: Which packs the streams run together.
        """
        self.device, self.dtype, self.streams = model.device, model.dtype, streams
        self.pack_tokens = max(model.pack_tokens, streams * _STREAM_TOKENS)
        self._model, self._small = model, small
        threads = torch.get_num_threads()
        own = threads // streams
        # How many times as fast all threads together are as one stream.
        self._together = (threads / own) ** _SHARED_SPEED
        self._helpers = Helpers(Tasks(), streams)
        weakref.finalize(self, end_threads, self._helpers.tasks, streams).atexit = False
        start_threads(streams, own, self._helpers.tasks)

    def launch(self, pairs: Sequence[TokenPair]) -> PendingLogits:
        """Return a function that scores a pack."""
        return partial(self.logits, pairs)

    def logits(self, pairs: Sequence[TokenPair]) -> list[float]:
        """Return the logit of each pair of a pack; the same pack always gives the same."""
        tokens = sum(map(len, pairs))
        parts = _share_out([len(pair) for pair in pairs], self.streams)
        longest = max(sum(len(pairs[place]) for place in part) for part in parts)
        uneven = longest > tokens / self._together
        if tokens <= (self._small.uneven if uneven else self._small.even):
            # In one of the streams: in this thread torch may use several threads, which spin for a
            # while after each of its steps, on cores that the streams need.
            return self._score(pairs, self._helpers).result()
        if uneven:
            return self._model.logits(pairs, helpers=self._helpers)
        futures = [self._score([pairs[place] for place in part]) for part in parts]
        # Wait for all, so that when one lacks memory no other still holds some.
        wait(futures)
        logits = [0.0] * len(pairs)
        for part, future in zip(parts, futures, strict=True):
            for place, logit in zip(part, future.result(), strict=True):
                logits[place] = logit
        return logits

    def _score(self, pairs: Sequence[TokenPair], helpers: Helpers = ALONE) -> Future[list[float]]:
        future, model = Future[list[float]](), self._model
        self._helpers.tasks.put(
            lambda: fulfil(future, lambda: model.logits(pairs, helpers=helpers))
        )
        return future


def _share_out(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Return the indexes of each part: longest first, each to the part with the fewest tokens."""
    shares: list[list[int]] = [[] for _ in range(min(parts, len(lengths)))]
    tokens = [0] * len(shares)
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        least = tokens.index(min(tokens))
        shares[least].append(place)
        tokens[least] += lengths[place]
    return shares
