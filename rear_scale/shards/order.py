"""Which samples a step trains on: a pure function of (seed, epoch, position), for any ranks, micro-steps and strategy."""

# B images of a global batch, b of one rank, I positions

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rear_scale import rng

_WINDOW = 16_384  # positions computed at once: one by one, the calls cost more than the arithmetic


@dataclass
class BatchOrder:
    """Step s takes positions (s - 1) B .. s B - 1 of an endless run of epochs, each a permutation of all samples."""

    num_samples: int
    global_batch_size: int  # B
    seed: int
    _window: tuple[tuple[int, int], range, Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    def ids_at(self, epoch: int, positions: Tensor) -> Tensor:
        """int64 [I]: the samples at positions (int64 [I], 0 .. num_samples - 1) of an epoch."""
        return rng.permuted(self.seed, rng.Purpose.DATA_ORDER, epoch, positions, self.num_samples)

    def global_batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Sample ids and epochs (both int64 [B], epochs from 0) of a step (from 1): every sample once per epoch."""
        return self._batch(step, 0, self.global_batch_size)

    def rank_batches(self, step: int, rank: int, world_size: int, micro_steps: int) -> list[tuple[Tensor, Tensor]]:
        """The (ids, epochs) of each micro-step of one rank: together, the ranks' shares are the global batch."""
        size = self.global_batch_size
        ids, epochs = self._batch(step, rank * size // world_size, (rank + 1) * size // world_size)
        return list(zip(ids.chunk(micro_steps), epochs.chunk(micro_steps), strict=True))

    def _batch(self, step: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Places first .. end - 1 of a step's global batch. Neighbouring steps are computed with it and kept."""
        share = end - first
        if self._window is None or self._window[0] != (first, end) or step not in self._window[1]:
            steps = max(1, min(_WINDOW // share, self.num_samples // self.global_batch_size))
            starts = torch.arange(step - 1, step - 1 + steps)[:, None] * self.global_batch_size
            ids, epochs = self._samples((starts + torch.arange(first, end)).flatten())
            self._window = (first, end), range(step, step + steps), ids, epochs
        _, steps, ids, epochs = self._window
        place = slice((step - steps.start) * share, (step - steps.start + 1) * share)
        return ids[place], epochs[place]

    def _samples(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        epochs = positions // self.num_samples
        ids = torch.empty_like(positions)
        for epoch in epochs.unique().tolist():
            inside = epochs == epoch
            ids[inside] = self.ids_at(epoch, positions[inside] % self.num_samples)
        return ids, epochs


@dataclass
class LaneOrder(BatchOrder):
    """The order of a stream: neighbours in a lane lie close together in the shards, so that a rank reads little.

    Every epoch lines up all shards in another random order and cuts the line into lanes of nearly equal length. Each
    place of the global batch belongs to one lane, whoever trains on it; a lane's samples come in buffers of neighbours,
    shuffled within.
    """

    shard_samples: tuple[int, ...] = ()
    lanes: int = 1
    buffer_samples: int = 1
    _lines: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.lanes = min(self.lanes, self.global_batch_size)
        # Lane l has the places edges[l] .. edges[l + 1] - 1 of a batch.
        self._edges = torch.tensor([-(-lane * self.global_batch_size // self.lanes) for lane in range(self.lanes + 1)])
        self._firsts = torch.tensor((0, *self.shard_samples)).cumsum(0)

    def ids_at(self, epoch: int, positions: Tensor) -> Tensor:
        begin = epoch * self.num_samples
        where = begin + positions
        lane = where % self.global_batch_size * self.lanes // self.global_batch_size
        low, high = self._edges[lane], self._edges[lane + 1]
        # How many samples of this epoch go to the lanes before, to this lane, and to this lane before this position.
        end = begin + self.num_samples
        lane_first = self._count(end, low) - self._count(begin, low)
        lane_size = self._count(end, high) - self._count(begin, high) - lane_first
        turn = self._count(where, high) - self._count(where, low) - (self._count(begin, high) - self._count(begin, low))
        offset = turn // self.buffer_samples * self.buffer_samples
        size = (lane_size - offset).clamp(max=self.buffer_samples)
        buffer_first = lane_first + offset
        purpose = rng.Purpose.LANE_ORDER
        inside = rng.permuted_within(self.seed, purpose, epoch, buffer_first, turn - offset, size)
        return self._in_line(epoch, buffer_first + inside)

    def _count(self, end: Tensor | int, places: Tensor) -> Tensor:
        """How many of the positions 0 .. end - 1 of the whole run fall on the first `places` places of a batch."""
        size = self.global_batch_size
        rest = end % size
        return end // size * places + (places.clamp(max=rest) if isinstance(rest, int) else torch.minimum(places, rest))

    def _in_line(self, epoch: int, places: Tensor) -> Tensor:
        """int64 [I]: the samples at places (int64 [I]) of an epoch's line of shards."""
        if epoch not in self._lines:
            shards = torch.arange(len(self.shard_samples))
            order = rng.permuted(self.seed, rng.Purpose.SHARD_ORDER, epoch, shards, len(shards))
            starts = torch.tensor(self.shard_samples)[order].cumsum(0)
            self._lines = {key: line for key, line in self._lines.items() if key >= epoch - 1}
            self._lines[epoch] = order, torch.cat([torch.zeros(1, dtype=torch.int64), starts])
        order, starts = self._lines[epoch]
        shard = torch.searchsorted(starts, places, right=True) - 1
        return self._firsts[order[shard]] + places - starts[shard]


def group_by_class(classes: Tensor, null_class: int) -> Tensor:
    """int64 [B]: the places of a global batch in the order of their classes (int64 [B]), equal ones in their old order.

    Images of null_class are spread evenly, so that every part of the batch has its share of them: together they would be
    one class to the rank that holds them, and their modulation cost nothing where that of the others is waited for.
    """
    is_null = classes == null_class
    null_places = is_null.nonzero()[:, 0]
    places = torch.empty_like(classes)
    spread = torch.zeros_like(is_null)
    # In the middle of as many equal parts as there are such images.
    spread[(2 * torch.arange(len(null_places)) + 1) * len(classes) // max(1, 2 * len(null_places))] = True
    places[spread] = null_places
    others = (~is_null).nonzero()[:, 0]
    places[~spread] = others[classes[others].argsort(stable=True)]
    return places


@dataclass
class GroupedOrder:
    """Another order within each global batch of an order: images of one class stand together over ranks and micro-steps.

    A function of the batch's own samples alone, whatever the ranks and micro-steps.
    """

    order: BatchOrder
    classes_of: Callable[[Tensor, Tensor], Tensor]  # sample ids and epochs (int64 [B]) to class ids, int64 [B]
    null_class: int

    def global_batch(self, step: int) -> tuple[Tensor, Tensor]:
        """As every order's."""
        ids, epochs = self.order.global_batch(step)
        places = group_by_class(self.classes_of(ids, epochs), self.null_class)
        return ids[places], epochs[places]

    def rank_batches(self, step: int, rank: int, world_size: int, micro_steps: int) -> list[tuple[Tensor, Tensor]]:
        """As every order's."""
        size = self.order.global_batch_size
        own = slice(rank * size // world_size, (rank + 1) * size // world_size)
        ids, epochs = (part[own] for part in self.global_batch(step))
        return list(zip(ids.chunk(micro_steps), epochs.chunk(micro_steps), strict=True))
