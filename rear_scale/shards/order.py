"""The order of training samples: a pure function of (seed, epoch, position), for any ranks, micro-steps and strategy."""

# B images of a global batch, b of one rank, I positions

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rear_scale import rng

_WINDOW = 16_384  # positions computed at once, because each call has an overhead


@dataclass
class BatchOrder:
    """The global shuffle: step s takes positions (s - 1) B .. s B - 1 of endless epochs, each a permutation of all samples."""

    num_samples: int
    global_batch_size: int  # B
    seed: int
    chosen: Tensor | None = None  # int64 [num_samples]: the ids of the samples; None = 0 .. num_samples - 1
    _window: tuple[tuple[int, int], range, Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    def ids_at(self, epoch: int, positions: Tensor) -> Tensor:
        """The sample ids, int64 [I], at positions (int64 [I], 0 .. num_samples - 1) of an epoch."""
        order = rng.permuted(self.seed, rng.Purpose.DATA_ORDER, epoch, positions, self.num_samples)
        return order if self.chosen is None else self.chosen[order]

    def global_batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The sample ids and epochs (both int64 [B], epochs from 0) of a step (from 1). Each sample occurs once per epoch."""
        return self._batch(step, 0, self.global_batch_size)

    def rank_batches(self, step: int, rank: int, world_size: int, micro_steps: int) -> list[tuple[Tensor, Tensor]]:
        """The (ids, epochs) of each micro-step of one rank. All ranks together have the global batch."""
        size = self.global_batch_size
        ids, epochs = self._batch(step, rank * size // world_size, (rank + 1) * size // world_size)
        return list(zip(ids.chunk(micro_steps), epochs.chunk(micro_steps), strict=True))

    def _batch(self, step: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        """The ids and epochs of images first .. end - 1 of a step's global batch. Computes a window of steps and caches it."""
        count = end - first
        if self._window is None or self._window[0] != (first, end) or step not in self._window[1]:
            size = max(1, min(_WINDOW // count, self.num_samples // self.global_batch_size))
            starts = torch.arange(step - 1, step - 1 + size)[:, None] * self.global_batch_size
            ids, epochs = self._samples((starts + torch.arange(first, end)).flatten())
            self._window = (first, end), range(step, step + size), ids, epochs
        _, steps, ids, epochs = self._window
        own = slice((step - steps.start) * count, (step - steps.start + 1) * count)
        return ids[own], epochs[own]

    def _samples(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        epochs = positions // self.num_samples
        ids = torch.empty_like(positions)
        for epoch in epochs.unique().tolist():
            inside = epochs == epoch
            ids[inside] = self.ids_at(epoch, positions[inside] % self.num_samples)
        return ids, epochs


@dataclass
class StreamOrder(BatchOrder):
    """The order for data.mode=stream: interleaved streams of shuffled shards, each with a shuffle buffer.

    Every epoch concatenates all shards in another random order and cuts them into `streams` parts of nearly equal length.
    Each index of the global batch belongs to one stream, whichever rank trains on it. A stream is read in buffers of
    neighbouring samples that are shuffled within the buffer, so that a rank reads few shards at a time.
    """

    shard_samples: tuple[int, ...] = ()
    streams: int = 1
    buffer_samples: int = 1
    _concatenated: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.streams = min(self.streams, self.global_batch_size)
        # Stream s has the indices edges[s] .. edges[s + 1] - 1 of a batch.
        edges = [-(-stream * self.global_batch_size // self.streams) for stream in range(self.streams + 1)]
        self._edges = torch.tensor(edges)
        self._firsts = torch.tensor((0, *self.shard_samples)).cumsum(0)

    def ids_at(self, epoch: int, positions: Tensor) -> Tensor:
        begin = epoch * self.num_samples
        where = begin + positions
        stream = where % self.global_batch_size * self.streams // self.global_batch_size
        low, high = self._edges[stream], self._edges[stream + 1]
        # How many samples of this epoch go to the streams before, to this one, and to this one before this position.
        end = begin + self.num_samples
        stream_first = self._count(end, low) - self._count(begin, low)
        stream_size = self._count(end, high) - self._count(begin, high) - stream_first
        turn = self._count(where, high) - self._count(where, low) - (self._count(begin, high) - self._count(begin, low))
        offset = turn // self.buffer_samples * self.buffer_samples
        size = (stream_size - offset).clamp(max=self.buffer_samples)
        buffer_first = stream_first + offset
        purpose = rng.Purpose.STREAM_ORDER
        inside = rng.permuted_within(self.seed, purpose, epoch, buffer_first, turn - offset, size)
        return self._at(epoch, buffer_first + inside)

    def _count(self, end: Tensor | int, indices: Tensor) -> Tensor:
        """The number of positions 0 .. end - 1 of the run that are among the first `indices` of their batch."""
        size = self.global_batch_size
        rest = end % size
        return end // size * indices + (
            indices.clamp(max=rest) if isinstance(rest, int) else torch.minimum(indices, rest)
        )

    def _at(self, epoch: int, offsets: Tensor) -> Tensor:
        """The sample ids, int64 [I], at offsets (int64 [I]) into an epoch's concatenated shards."""
        if epoch not in self._concatenated:
            shards = torch.arange(len(self.shard_samples))
            order = rng.permuted(self.seed, rng.Purpose.SHARD_ORDER, epoch, shards, len(shards))
            starts = torch.tensor(self.shard_samples)[order].cumsum(0)
            self._concatenated = {key: kept for key, kept in self._concatenated.items() if key >= epoch - 1}
            self._concatenated[epoch] = order, torch.cat([torch.zeros(1, dtype=torch.int64), starts])
        order, starts = self._concatenated[epoch]
        shard = torch.searchsorted(starts, offsets, right=True) - 1
        return self._firsts[order[shard]] + offsets - starts[shard]


def group_by_class(classes: Tensor, null_class: int) -> Tensor:
    """The indices, int64 [B], that sort a global batch by class (classes: int64 [B]), stable within a class.

    Images of null_class are spread evenly over the batch. Side by side they would be a single class of one rank, which
    would then have less AdaLN work than the ranks that it waits for.
    """
    is_null = classes == null_class
    null_indices = is_null.nonzero()[:, 0]
    indices = torch.empty_like(classes)
    spread = torch.zeros_like(is_null)
    # Each in the middle of one of as many equal parts as there are such images.
    spread[(2 * torch.arange(len(null_indices)) + 1) * len(classes) // max(1, 2 * len(null_indices))] = True
    indices[spread] = null_indices
    others = (~is_null).nonzero()[:, 0]
    indices[~spread] = others[classes[others].argsort(stable=True)]
    return indices


@dataclass
class GroupedOrder:
    """An order whose global batches are sorted by class, so that a micro-batch has few distinct classes.

    The sorting depends on the samples of the batch alone, not on ranks and micro-steps.
    """

    order: BatchOrder
    classes_of: Callable[[Tensor, Tensor], Tensor]  # sample ids and epochs (int64 [B]) to class ids, int64 [B]
    null_class: int

    def global_batch(self, step: int) -> tuple[Tensor, Tensor]:
        """As BatchOrder.global_batch, sorted by class."""
        ids, epochs = self.order.global_batch(step)
        indices = group_by_class(self.classes_of(ids, epochs), self.null_class)
        return ids[indices], epochs[indices]

    def rank_batches(self, step: int, rank: int, world_size: int, micro_steps: int) -> list[tuple[Tensor, Tensor]]:
        """As BatchOrder.rank_batches, sorted by class."""
        size = self.order.global_batch_size
        own = slice(rank * size // world_size, (rank + 1) * size // world_size)
        ids, epochs = (values[own] for values in self.global_batch(step))
        return list(zip(ids.chunk(micro_steps), epochs.chunk(micro_steps), strict=True))
