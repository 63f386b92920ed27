"""The steps of a batch as CUDA graphs, started with a few calls.

A step is hundreds of small kernels. Started one by one they cost more time on the CPU than on the GPU, unless a batch has
many hundreds of images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch.nn import functional as F

from rear_scale.progress import say
from rear_scale.sample.batch import Batch

_STEPS = 32  # of one graph, as many as AdaLN's tables hold: long graphs take long to instantiate
_SHAPES = 4  # of batches whose graphs are kept, each with memory of its own


class Graph(Protocol):
    def record(self, work: Callable[[], None]) -> None:
        """Notes what the work does on the device, without doing it."""
        ...

    def replay(self) -> None: ...


class CudaGraph:
    """Graphs of one pool share the memory between their kernels, so they are replayed in the order they were recorded."""

    def __init__(self, pool: tuple[int, int]) -> None:
        self.graph, self.pool = torch.cuda.CUDAGraph(), pool

    def record(self, work: Callable[[], None]) -> None:
        # Only this thread is held to what a recording allows: another may be decoding the images of the batch before.
        with torch.cuda.graph(self.graph, pool=self.pool, capture_error_mode="thread_local"):
            work()

    def replay(self) -> None:
        self.graph.replay()


class GraphedSteps:
    """Draws batches with graphs from the second batch of a shape on; the first is drawn step by step.

    draw(batch, steps) draws some steps of a batch without waiting for the device.
    """

    def __init__(
        self, draw: Callable[[Batch, range], None], new_graph: Callable[[tuple[int, int] | None], Graph]
    ) -> None:
        self.draw, self.new_graph = draw, new_graph
        self.recorded: dict[tuple[object, ...], tuple[Batch, list[Graph]] | None] = {}  # None: drawn once, step by step
        self.usable = True

    def __call__(self, batch: Batch) -> Batch:
        """The batch with its tokens drawn. They are overwritten by the next call."""
        # Few numbers of classes, so that few batches need a recording of their own: the tables' spare rows are not read.
        batch.classes = F.pad(batch.classes, (0, _padded(batch) - len(batch.classes)))
        shape = batch.shape
        if shape in self.recorded and self.recorded[shape] is None and self.usable:
            self.recorded[shape] = self._record(batch)
        found = self.recorded.setdefault(shape, None)
        if found is None:
            while len(self.recorded) > _SHAPES:
                del self.recorded[next(iter(self.recorded))]  # with its memory
            self.draw(batch, range(batch.num_tokens))
            return batch
        static, graphs = found
        static.fill(batch)
        for graph in graphs:
            graph.replay()
        return static

    def _record(self, batch: Batch) -> tuple[Batch, list[Graph]] | None:
        pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
        graphs = []
        try:
            for start in range(0, batch.num_tokens, _STEPS):
                steps = range(start, min(start + _STEPS, batch.num_tokens))
                graphs.append(self.new_graph(pool))
                graphs[-1].record(lambda steps=steps: self.draw(batch, steps))
        except RuntimeError as error:
            self.usable = False
            say(f"warning: no CUDA graphs, kernels are started one by one ({str(error).splitlines()[0]})")
            return None
        return batch, graphs


def _padded(batch: Batch) -> int:
    """The first power of two that is not below the number of classes; the null class of guidance comes on top."""
    null = int(len(batch.rows) > len(batch.ids))
    return (1 << max(0, len(batch.classes) - null - 1).bit_length()) + null
