"""All layers of an encoder for one small pack, run by several threads together.

`stack.h` describes how they share the work.
"""

import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from bge_rerank_adapters.engine.models.cpu.kernels.layers import KernelLayer, check
from bge_rerank_adapters.engine.models.cpu.kernels.library import InstructionSet, address, kernel
from bge_rerank_adapters.engine.models.encoder.config import EncoderConfig
from bge_rerank_adapters.engine.models.layers.attention import Layout

# More threads do not find enough outputs to share: 24 panels at bge-reranker-base's width.
_MAX_THREADS = 8


class _Progress(ctypes.Structure):
    _fields_ = (
        ("next", ctypes.c_uint64),
        ("done", ctypes.c_uint32),
        ("sleepers", ctypes.c_uint32),
        ("failed", ctypes.c_int32),
    )


class _Pack(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "pairs", "heads", "hidden")),
        *((name, ctypes.c_int64) for name in ("intermediate", "layers", "threads")),
        *((name, ctypes.c_void_p) for name in ("layer", "bounds", "attention")),
        *((name, ctypes.c_void_p) for name in ("states", "first", "memory")),
        ("progress", _Progress),
    )


class Stack:
    """The layers of a model; threads that run a pack share the outputs of each product.

    A pack's results are the same to the last bit as those of `KernelLayer`.
    """

    def __init__(
        self,
        layers: Sequence[KernelLayer],
        config: EncoderConfig,
        *,
        instruction_set: InstructionSet,
        attention: InstructionSet,
        prefix: str = "",
    ) -> None:
        """Gather what the kernels need of each layer.

        Args:
            layers: All layers of the model.
            config: The model's config.
            instruction_set: The instruction set of the layers' kernels.
            attention: That of the attention kernel.
            prefix: What the names of the kernels for these layers begin with, such as `"int8_"`.
        """
        # The kernels get only addresses, so the layers must stay alive.
        self._kept = list(layers)
        self._config, self._instruction_set = config, instruction_set
        self._attention, self._prefix = attention, prefix
        self._layers = _structures(self._kept)
        # As many pieces as packs have been run at the same time: usually one.
        self._spare: deque[Tensor] = deque()

    def __call__(self, states: Tensor, layout: Layout) -> Tensor:
        """Return the last layer's output for the pairs' first tokens, shape (n, hidden).

        Args:
            states: The first layer's input, in bfloat16, contiguous, shape (rows, hidden). It is
                overwritten.
            layout: The pack's layout, with the threads that run it.
        """
        config, threads = self._config, min(layout.helpers.size, _MAX_THREADS)
        first = states.new_empty(len(layout.lengths), config.hidden)
        attention = address(self._attention, "attention")
        pack = _Pack(
            *(len(states), len(first), config.heads, config.hidden),
            *(config.intermediate, config.layers, threads),
            *(ctypes.addressof(self._layers), layout.bounds.data_ptr(), attention),
            *(states.data_ptr(), first.data_ptr()),
        )
        place = ctypes.addressof(pack)
        memory = self._take_memory(self._kernel("stack_memory")(place))
        pack.memory = memory.data_ptr()
        # A thread that comes late finds nothing left to do.
        layout.helpers.split(threads, 1, lambda *_: check(self._kernel("stack_run")(place)))
        self._spare.append(memory)
        return first

    def _take_memory(self, size: int) -> Tensor:
        """Return memory for a pack, which is kept for the next ones, since new pages are slow."""
        with suppress(IndexError):
            memory = self._spare.pop()
            if len(memory) >= size:
                return memory
        return torch.empty(size, dtype=torch.uint8)

    def _kernel(self, name: str) -> Callable[..., int]:
        return kernel(self._instruction_set, self._prefix + name)


def _structures(layers: Sequence[KernelLayer]) -> ctypes.Array[Any]:
    """Return an array of the kernels' `struct stack_layer`."""
    projection = type(layers[0].projections[0].structure)

    class Layer(ctypes.Structure):
        _fields_ = (
            ("of_all", projection),
            ("of_first", projection),
            ("after", ctypes.c_void_p),
        )

    made = (Layer * len(layers))()
    for structure, layer in zip(made, layers, strict=True):
        # In the last layer the first projection is that of the query.
        *of_first, of_all = (each.structure for each in layer.projections)
        structure.of_all = of_all
        for each in of_first:
            structure.of_first = each
        structure.after = ctypes.addressof(layer.after.structure)
    return made
