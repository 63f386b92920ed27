"""Updates that are functions of whole matrices: what a rule says of them, and how an optimizer asks for them.

An elementwise update (AdamW) works on any part of a weight. Muon's is a function of a whole matrix, of which a rank may hold
a part, or which other ranks compute at the same time. An optimizer of such updates therefore derives from WholeMatrixOptimizer
and computes through its `spread`, which the strategy sets (parallel/whole_matrices.py); by itself it computes everything here.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Transform(Protocol):
    """A function from a matrix to a matrix of the same shape. Transforms of equal settings are equal, as parts of rules."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of input and output, in which matrices are also sent."""
        ...

    def __call__(self, matrix: Tensor) -> Tensor:
        """The transformed matrix. Must not change its input."""
        ...

    def flops(self, rows: int, columns: int) -> int:
        """Floating-point operations for a matrix of a shape."""
        ...


@dataclass(frozen=True)
class WholeMatrix:
    """The part of a rule that needs whole matrices."""

    transform: Transform
    parts: int = 1  # the parameter is so many matrices of equal height below each other, each transformed by itself

    def part_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """(rows, columns) of each part of a parameter. Raises ValueError for a parameter that is not so many matrices."""
        if len(shape) != 2 or shape[0] % self.parts:
            raise ValueError(f"a parameter of the shape {tuple(shape)} is not {self.parts} matrices below each other")
        return shape[0] // self.parts, shape[1]


@dataclass(frozen=True, eq=False)
class Matrix:
    """One matrix of an update: a parameter or a part of it."""

    weight: Tensor  # the parameter; a DTensor where the strategy shards it
    value: Tensor  # the input of the transform for all parts, in the form of the weight
    part: int
    group: dict[str, Any]  # the parameter group, with its rule

    @property
    def whole(self) -> WholeMatrix:
        whole: WholeMatrix = self.group["rule"].whole_matrix
        return whole

    @property
    def shape(self) -> tuple[int, int]:
        return self.whole.part_shape(self.weight.shape)

    @property
    def rows(self) -> slice:
        """The rows of the parameter that are this matrix."""
        height = self.shape[0]
        return slice(self.part * height, (self.part + 1) * height)

    @property
    def flops(self) -> int:
        return self.whole.transform.flops(*self.shape)


@dataclass(frozen=True)
class MatrixSize:
    """The sizes of one matrix, for formulas."""

    elements: int
    flops: int  # of its transform
    itemsize: int  # bytes of an element where it is sent


# From matrices, whose transforms have one dtype, to (matrix, the part of its weight that this rank holds, the same part of the
# transformed matrix). All ranks must call it with the same matrices in the same order, and exhaust it.
Spread = Callable[[Sequence[Matrix]], Iterable[tuple[Matrix, Tensor, Tensor]]]


def alone(matrices: Sequence[Matrix]) -> Iterator[tuple[Matrix, Tensor, Tensor]]:
    """The Spread of one process, which holds all weights and computes everything."""
    for matrix in matrices:
        transform = matrix.whole.transform
        yield matrix, matrix.weight[matrix.rows], transform(matrix.value[matrix.rows].to(transform.dtype))


class WholeMatrixOptimizer(torch.optim.Optimizer):
    """The base class of optimizers for rules with `whole_matrix`."""

    spread: Spread = staticmethod(alone)


def owners(flops: Sequence[int], ranks: int) -> tuple[list[int], ...]:
    """For each rank, the indices of the matrices that it computes, in its order.

    The largest first, each to the rank with the least work so far: a function of the arguments alone, so that all ranks find
    the same without asking each other.
    """
    chosen: tuple[list[int], ...] = tuple([] for _ in range(ranks))
    least = [(0, rank) for rank in range(ranks)]  # a heap of (work so far, rank)
    for index in sorted(range(len(flops)), key=lambda index: (-flops[index], index)):
        work, owner = least[0]
        heapq.heapreplace(least, (work + flops[index], owner))
        chosen[owner].append(index)
    return chosen
