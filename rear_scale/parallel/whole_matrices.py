"""Updates of whole matrices on several ranks: one rank, the owner of a matrix, computes its transform, and the others get the
result from it.

The work goes through in rounds, in each of which every rank owns at most one matrix; matrices of a round are about equally
large. The collectives of the next round are under way while a round is computed. A matrix is computed whole on one rank, so its
sums have the same order in a world of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from rear_scale.config import ExperimentConfig
from rear_scale.model.generator import Generator
from rear_scale.optim.groups import whole_matrices
from rear_scale.optim.whole_matrix import Matrix, MatrixSize, owners
from rear_scale.parallel.communication import Traffic
from rear_scale.parallel.memory import Update

_Updated = tuple[Matrix, Tensor, Tensor]  # a matrix, this rank's part of its weight, the same part of the result
_Round = Sequence[Matrix | None]  # by owner
_Started = TypeVar("_Started")


class Replicated:
    """The Spread of ranks that all hold the whole weights and the same gradients: owners broadcast results."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks

    def __call__(self, matrices: Sequence[Matrix]) -> Iterator[_Updated]:
        return _one_ahead(_rounds(matrices, self.ranks), self._start, self._finish)

    def _start(self, matrices: _Round) -> list[tuple[Matrix, Tensor, dist.Work]]:
        started = []
        for owner, matrix in enumerate(matrices):
            if matrix is None:
                continue
            transform = matrix.whole.transform
            if owner == self.rank:
                result = transform(matrix.value[matrix.rows].to(transform.dtype)).contiguous()
            else:
                result = torch.empty(matrix.shape, dtype=transform.dtype, device=matrix.value.device)
            started.append((matrix, result, _async(dist.broadcast, result, src=owner)))
        return started

    def _finish(self, started: list[tuple[Matrix, Tensor, dist.Work]]) -> Iterator[_Updated]:
        for matrix, result, work in started:
            work.wait()
            yield matrix, matrix.weight[matrix.rows], result


@dataclass(frozen=True)
class _Piece:
    """The part of a matrix that is in the shard of one rank, possibly empty."""

    local: tuple[slice, slice]  # rows and columns in the shard
    whole: tuple[slice, slice]  # rows and columns in the matrix

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.whole
        return rows.stop - rows.start, columns.stop - columns.start

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]


class Sharded:
    """The Spread of ranks that hold shards of the weights: pieces go to the owner, and pieces of the result come back.

    With replicas, each matrix has one owner among all ranks; the other replicas get their shards from the replica of the owner.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        """mesh: one axis of ranks that shard, behind one of replicas if there are any."""
        self.shards, self.place = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
        self.replicas, self.replica = (mesh.size(0), mesh.get_local_rank(0)) if mesh.ndim == 2 else (1, 0)
        self.group = mesh.get_group(mesh.ndim - 1)
        self.across = mesh.get_group(0) if mesh.ndim == 2 else None

    def __call__(self, matrices: Sequence[Matrix]) -> Iterator[_Updated]:
        return _one_ahead(_rounds(matrices, self.replicas * self.shards), self._start, self._finish)

    def _of_replica(self, matrices: _Round, replica: int) -> _Round:
        """The matrices of a round whose owners are in a replica, by the place of the owner."""
        return matrices[replica * self.shards : (replica + 1) * self.shards]

    def _start(self, matrices: _Round) -> tuple[_Round, Tensor, dist.Work]:
        """Begins to send this rank's pieces to the owners in its replica, and to receive those of its own matrix."""
        ours = self._of_replica(matrices, self.replica)
        some = next(matrix for matrix in matrices if matrix is not None)
        empty = torch.empty(0, dtype=some.whole.transform.dtype, device=some.value.device)
        pieces = [_local(m.value)[_piece(m, self.place, self.shards).local] for m in ours if m is not None]
        sent = torch.cat([empty, *(piece.to(empty.dtype).flatten() for piece in pieces)])
        sizes, own_sizes = self._sizes(ours)
        received = empty.new_empty(sum(own_sizes))
        return matrices, received, _async(dist.all_to_all_single, received, sent, own_sizes, sizes, group=self.group)

    def _finish(self, started: tuple[_Round, Tensor, dist.Work]) -> Iterator[_Updated]:
        matrices, received, work = started
        work.wait()
        ours = self._of_replica(matrices, self.replica)
        sizes, own_sizes = self._sizes(ours)
        own = ours[self.place]
        sent = received if own is None else self._transformed(own, received, own_sizes)
        results = received.new_empty(sum(sizes))
        dist.all_to_all_single(results, sent, sizes, own_sizes, group=self.group)
        for replica in range(self.replicas):
            theirs = self._of_replica(matrices, replica)
            sizes = self._sizes(theirs)[0]
            found = results if replica == self.replica else received.new_empty(sum(sizes))
            if self.across is not None and found.numel():
                dist.broadcast(found, group=self.across, group_src=replica)
            for matrix, part in zip(theirs, found.split(sizes), strict=True):
                if matrix is not None:
                    piece = _piece(matrix, self.place, self.shards)
                    yield matrix, _local(matrix.weight)[piece.local], part.view(piece.shape)

    def _sizes(self, ours: _Round) -> tuple[list[int], list[int]]:
        """The numbers of elements of this rank's pieces of the matrices, and of all ranks' pieces of its own matrix."""
        own = ours[self.place]
        sizes = [0 if matrix is None else _piece(matrix, self.place, self.shards).size for matrix in ours]
        return sizes, [0 if own is None else _piece(own, place, self.shards).size for place in range(self.shards)]

    def _transformed(self, matrix: Matrix, received: Tensor, sizes: list[int]) -> Tensor:
        """The pieces of the transformed matrix, in the order of ranks, from the pieces of its value."""
        whole = received.new_empty(matrix.shape)
        pieces = [_piece(matrix, place, self.shards) for place in range(self.shards)]
        for piece, part in zip(pieces, received.split(sizes), strict=True):
            whole[piece.whole] = part.view(piece.shape)
        result = matrix.whole.transform(whole)
        return torch.cat([result[piece.whole].flatten() for piece in pieces])


def _piece(matrix: Matrix, place: int, places: int) -> _Piece:
    """The piece of a matrix on one of the ranks that shard it. DTensors are sharded as torch.chunk splits."""
    weight, rows = matrix.weight, matrix.rows
    assert isinstance(weight, DTensor)
    dimension = next(placement.dim for placement in weight.placements if isinstance(placement, Shard))
    length = weight.shape[dimension]
    size = -(-length // places)
    start, stop = min(place * size, length), min((place + 1) * size, length)
    if dimension == 1:
        return _Piece((rows, slice(0, stop - start)), (slice(0, rows.stop - rows.start), slice(start, stop)))
    first = max(start, rows.start)
    last = max(first, min(stop, rows.stop))
    columns = slice(0, weight.shape[1])
    return _Piece(
        (slice(first - start, last - start), columns), (slice(first - rows.start, last - rows.start), columns)
    )


def _rounds(matrices: Sequence[Matrix], ranks: int) -> Iterator[_Round]:
    """The matrices by round and owner."""
    by_owner = owners([matrix.flops for matrix in matrices], ranks)
    for indices in zip_longest(*by_owner):
        yield [None if index is None else matrices[index] for index in indices]


def _one_ahead(
    rounds: Iterable[_Round], start: Callable[[_Round], _Started], finish: Callable[[_Started], Iterator[_Updated]]
) -> Iterator[_Updated]:
    """Starts each round before the one before it is finished."""
    waiting: list[_Started] = []
    for matrices in rounds:
        waiting.append(start(matrices))
        if len(waiting) > 1:
            yield from finish(waiting.pop(0))
    for started in waiting:
        yield from finish(started)


def _async(collective: Callable[..., dist.Work | None], *arguments: Any, **named: Any) -> dist.Work:
    work = collective(*arguments, **named, async_op=True)
    assert work is not None, "this rank is in the group"
    return work


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def add_broadcasts(sent: Traffic, update: Update) -> None:
    """Adds the collectives of Replicated in one update."""
    for size in whole_matrices(update.model, update.cfg):
        sent.add("broadcast", size.elements, size.itemsize)


def add_exchanges(sent: Traffic, update: Update, shards: int) -> None:
    """Adds the collectives of Sharded in one update, with so many ranks to a replica."""
    sizes = whole_matrices(update.model, update.cfg)
    if not sizes:
        return
    by_owner = _owned(sizes, update.world_size)
    payload = sum(size.elements * size.itemsize for size in sizes)
    for indices in zip_longest(*by_owner):
        # There and back: the owner of the largest matrix of a round receives most.
        largest = max((sizes[index] for index in indices if index is not None), key=lambda size: size.elements)
        sent.add("all_to_all", largest.elements, largest.itemsize, 2)
    if shards < update.world_size:
        rounds_by_replica = [
            max(map(len, by_owner[first : first + shards])) for first in range(0, update.world_size, shards)
        ]
        sent.calls["broadcast"] += sum(rounds_by_replica)
        sent.payload["broadcast"] += payload // shards


def update_flops(cfg: ExperimentConfig, model: Generator, ranks: int) -> int:
    """Floating-point operations of the transforms in one update, on the rank that has most to do."""
    sizes = whole_matrices(model, cfg)
    return max(sum(sizes[index].flops for index in own) for own in _owned(sizes, ranks)) if sizes else 0


@lru_cache(maxsize=64)
def _owned(sizes: tuple[MatrixSize, ...], ranks: int) -> tuple[list[int], ...]:
    # Cached, because the planner asks thousands of times.
    return owners([size.flops for size in sizes], ranks)
