"""CUDA graphs of the decoding steps, so that a batch takes a few launches instead of one per kernel.

A step has hundreds of small kernels. Launched one by one, they take longer on the CPU than on the GPU, unless a batch has many
hundreds of images.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn import functional as F

from rear_scale.progress import say
from rear_scale.sample.batch import Batch
from rear_scale.sample.decode_worker import wait_for_workers

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

_STEPS = 32  # steps per graph, as many as AdaLN's tables hold: long graphs take long to instantiate
_SHAPES = 4  # the number of batch shapes whose graphs are kept; each has its own memory pool


class Graph(Protocol):
    """Work on a device that is recorded once and replayed."""

    def record(self, work: Callable[[], None]) -> None:
        """Records the device work of a function without executing it."""
        ...

    def replay(self) -> None:
        """Executes the recorded work."""
        ...


class CudaGraph:
    """A CUDA graph. Graphs of one pool share memory for intermediate results, so they must be replayed in the order recorded."""

    def __init__(self, pool: _POOL_HANDLE) -> None:
        self.graph, self.pool = torch.cuda.CUDAGraph(), pool

    def record(self, work: Callable[[], None]) -> None:
        """Records the device work. Raises RuntimeError for work that cannot be recorded, after restoring stream, allocator and
        random generator."""
        stream = torch.cuda.current_stream()
        generator = torch.cuda.default_generators[stream.device_index]
        numbers = generator.clone_state()
        try:
            # thread_local: other threads may make uncapturable calls while this one captures; NCCL's watchdog queries events
            # at any time, which would invalidate a capture of all threads.
            with torch.cuda.graph(self.graph, pool=self.pool, capture_error_mode="thread_local"):
                work()
        except RuntimeError:
            self._clean_up(stream, generator, numbers)
            raise

    def _clean_up(self, stream: torch.cuda.Stream, generator: torch.Generator, numbers: torch.Generator) -> None:
        # When the end of a capture fails, torch (2.11 to 2.14) leaves stream, allocator and generator in the state of a capture:
        # capture_end raises before it resets the allocator and the generator, torch.cuda.graph before it resets the stream.
        torch.cuda.set_stream(stream)
        with suppress(RuntimeError):  # the allocator has been reset already
            torch._C._cuda_endAllocateToPool(stream.device_index, self.pool)
            torch._C._cuda_releasePool(stream.device_index, self.pool)
        self.graph.reset()
        generator.graphsafe_set_state(numbers)

    def replay(self) -> None:
        self.graph.replay()


class GraphedSteps:
    """Samples batches with CUDA graphs from the second batch of each shape on; the first batch runs without a graph.

    draw(batch, steps) samples some steps of a batch without synchronizing with the GPU. new_graph(pool) makes an empty graph;
    pool: the memory pool of a batch (torch.cuda.graph_pool_handle), or None for graphs that are no CudaGraph.
    """

    def __init__(self, draw: Callable[[Batch, range], None], new_graph: Callable[[Any], Graph]) -> None:
        self.draw, self.new_graph = draw, new_graph
        # by shape: the batch whose memory the graphs use, and the graphs; None after a first batch without a graph
        self.recorded: dict[tuple[object, ...], tuple[Batch, list[Graph]] | None] = {}
        self.usable = True

    def __call__(self, batch: Batch) -> Batch:
        """The batch with its sampled tokens, which the next call overwrites."""
        # The number of classes is padded, so that there are few shapes to record. The tables' extra rows are not read.
        batch.classes = F.pad(batch.classes, (0, _padded(batch) - len(batch.classes)))
        shape = batch.shape
        if shape in self.recorded and self.recorded[shape] is None and self.usable:
            self.recorded[shape] = self._record(batch)
        recording = self.recorded.setdefault(shape, None)
        if recording is None:
            while len(self.recorded) > _SHAPES:
                del self.recorded[next(iter(self.recorded))]  # frees its memory too
            self.draw(batch, range(batch.num_tokens))
            return batch
        static, graphs = recording
        static.fill(batch)
        for graph in graphs:
            graph.replay()
        return static

    def _record(self, batch: Batch) -> tuple[Batch, list[Graph]] | None:
        # Wait for the decode worker: a synchronization in its thread would invalidate the capture, and the first use of a
        # library (cuDNN in the first decoding) synchronizes.
        wait_for_workers()
        pool = torch.cuda.graph_pool_handle() if self.new_graph is CudaGraph else None
        graphs: list[Graph] = []
        try:
            for start in range(0, batch.num_tokens, _STEPS):
                steps = range(start, min(start + _STEPS, batch.num_tokens))
                graphs.append(self.new_graph(pool))
                graphs[-1].record(partial(self.draw, batch, steps))
        except RuntimeError as error:
            self.usable = False
            graphs.clear()  # frees their memory for the next batch
            say(
                f"warning: CUDA graphs do not work here, sampling continues without them ({str(error).splitlines()[0]})"
            )
            return None
        return batch, graphs


def _padded(batch: Batch) -> int:
    """The number of classes rounded up to a power of two, plus one for the null class under guidance."""
    null_classes = int(len(batch.class_index) > len(batch.ids))
    return (1 << max(0, len(batch.classes) - null_classes - 1).bit_length()) + null_classes
