"""The steps of a batch as CUDA graphs, started with a few calls.

A step is hundreds of small kernels. Started one by one they cost more time on the CPU than on the GPU, unless a batch has
many hundreds of images.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import torch
from torch.nn import functional as F

from rear_scale.progress import say
from rear_scale.sample.batch import Batch
from rear_scale.sample.decode_worker import wait_for_workers

_STEPS = 32  # of one graph, as many as AdaLN's tables hold: long graphs take long to instantiate
_SHAPES = 4  # of batches whose graphs are kept, each with memory of its own


class Graph(Protocol):
    """Work on a device that is recorded once and replayed."""

    def record(self, work: Callable[[], None]) -> None:
        """Notes what the work does on the device, without doing it."""
        ...

    def replay(self) -> None: ...


class CudaGraph:
    """Graphs of one pool share the memory between their kernels, so they are replayed in the order they were recorded."""

    def __init__(self, pool: tuple[int, int]) -> None:
        self.graph, self.pool = torch.cuda.CUDAGraph(), pool

    def record(self, work: Callable[[], None]) -> None:
        """Raises RuntimeError for work that cannot be recorded; stream, allocator and generator are then as before."""
        stream = torch.cuda.current_stream()
        generator = torch.cuda.default_generators[stream.device_index]
        numbers = generator.clone_state()
        try:
            # thread_local: NCCL's watchdog asks for the state of events at any time, which would end a recording that holds
            # all threads.
            with torch.cuda.graph(self.graph, pool=self.pool, capture_error_mode="thread_local"):
                work()
        except RuntimeError:
            self._clean_up(stream, generator, numbers)
            raise

    def _clean_up(self, stream: torch.cuda.Stream, generator: torch.Generator, numbers: torch.Generator) -> None:
        # When the end of a recording fails, torch leaves all this as it is during one: capture_end raises before it comes to
        # the allocator and the generator, and torch.cuda.graph before it comes to the stream (2.11 to 2.14).
        torch.cuda.set_stream(stream)
        with suppress(RuntimeError):  # it has come to the allocator
            torch._C._cuda_endAllocateToPool(stream.device_index, self.pool)
            torch._C._cuda_releasePool(stream.device_index, self.pool)
        self.graph.reset()
        generator.graphsafe_set_state(numbers)

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
        # A synchronisation of another thread while it works would end the recording, and the first use of a library (cuDNN in
        # the first decoding) brings some.
        wait_for_workers()
        pool = torch.cuda.graph_pool_handle() if self.new_graph is CudaGraph else None
        graphs: list[Graph] = []
        try:
            for start in range(0, batch.num_tokens, _STEPS):
                steps = range(start, min(start + _STEPS, batch.num_tokens))
                graphs.append(self.new_graph(pool))
                graphs[-1].record(lambda steps=steps: self.draw(batch, steps))
        except RuntimeError as error:
            self.usable = False
            graphs.clear()  # before the next batch asks for memory
            say(f"warning: no CUDA graphs, kernels are started one by one ({str(error).splitlines()[0]})")
            return None
        return batch, graphs


def _padded(batch: Batch) -> int:
    """The first power of two that is not below the number of classes; the null class of guidance comes on top."""
    null = int(len(batch.rows) > len(batch.ids))
    return (1 << max(0, len(batch.classes) - null - 1).bit_length()) + null
