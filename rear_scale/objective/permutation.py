"""Orders of prediction: RAR's random permutations and the six scan orders of RAR Table 3 (after Esser et al. 2021).

order[t] is the position in the image (the index in stored order) of the token that is predicted at step t.
"""

# B images, N tokens of an image

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from rear_scale import rng
from rear_scale.config import PermutationConfig


class Layout(Protocol):
    """The layout of an image's tokens; tokenizer configs and the shapes of generators have these attributes."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def grid(self) -> Sequence[int] | None:
        """Rows and columns of the tokens after the prefix; None = a sequence without a grid."""

    @property
    def prefix_tokens(self) -> int: ...


def row_major(rows: int, columns: int) -> list[int]:
    """Positions row by row, the order in which tokens are stored."""
    return list(range(rows * columns))


def alternate(rows: int, columns: int) -> list[int]:
    """Positions row by row, every second row backwards."""
    lines = [list(range(row * columns, (row + 1) * columns)) for row in range(rows)]
    return [position for number, line in enumerate(lines) for position in (line[::-1] if number % 2 else line)]


def spiral_out(rows: int, columns: int) -> list[int]:
    """Positions from the centre outwards: one step up, one right, two down, two left, three up ... Skips those outside."""
    row, column = rows // 2, (columns - 1) // 2
    positions = [row * columns + column]
    directions = ((-1, 0), (0, 1), (1, 0), (0, -1))
    turn = 0
    while len(positions) < rows * columns:
        down, right = directions[turn % 4]
        for _ in range(turn // 2 + 1):
            row, column = row + down, column + right
            if 0 <= row < rows and 0 <= column < columns:
                positions.append(row * columns + column)
        turn += 1
    return positions


def spiral_in(rows: int, columns: int) -> list[int]:
    """The reverse of `spiral_out`."""
    return spiral_out(rows, columns)[::-1]


def z_curve(rows: int, columns: int) -> list[int]:
    """Positions sorted by the interleaved bits of row and column (Morton order)."""

    def key(position: int) -> int:
        row, column = divmod(position, columns)
        bits = range(max(rows, columns).bit_length())
        return sum((column >> bit & 1) << 2 * bit | (row >> bit & 1) << 2 * bit + 1 for bit in bits)

    return sorted(range(rows * columns), key=key)


def subsample(side: int, columns: int) -> list[int]:
    """Positions from coarse to fine: the four subgrids of every second row and column one after another, each in this order
    itself. For square grids."""
    assert side == columns, (side, columns)
    if side == 1:
        return [0]
    half = subsample(side // 2, side // 2)
    inner = [divmod(position, side // 2) for position in half]
    return [
        (2 * row + down) * side + 2 * column + right for down in (0, 1) for right in (0, 1) for row, column in inner
    ]


SCANS: dict[str, Callable[[int, int], list[int]]] = {
    "row_major": row_major,
    "spiral_in": spiral_in,
    "spiral_out": spiral_out,
    "z_curve": z_curve,
    "subsample": subsample,
    "alternate": alternate,
}


def scan_order(name: str, layout: Layout) -> Tensor:
    """The positions, int64 [N], of a scan order over the grid, after the tokens of the prefix in stored order.

    For a sequence without a grid only row_major, its stored order.
    """
    if name == "row_major":
        return torch.arange(layout.num_tokens)
    assert layout.grid is not None, name
    return _scan_order(name, *layout.grid, layout.prefix_tokens)


@cache
def _scan_order(name: str, rows: int, columns: int, prefix: int) -> Tensor:
    return torch.cat((torch.arange(prefix), prefix + torch.tensor(SCANS[name](rows, columns))))


def fixed_order(name: str, layout: Layout, device: torch.device) -> Tensor | None:
    """The positions, int64 [1, N], of a scan order; None for row_major, the order in which tokens are stored."""
    return None if name == "row_major" else scan_order(name, layout).to(device)[None]


def fixed_prefix(prefix: str, layout: Layout) -> int:
    """The number of tokens at the front that permutations keep: the prefix with objective.permutation.prefix=fixed, else 0."""
    return layout.prefix_tokens if prefix == "fixed" else 0


def random_orders(bits: Tensor, first: int) -> Tensor:
    """A random permutation per row, int64 [B, N], from 32-bit random numbers [B, N]; the first `first` stay in place."""
    keys = bits.clone()
    keys[:, :first] = torch.arange(first, device=bits.device) - first
    return keys.argsort(dim=1, stable=True)


def training_orders(
    ids: Tensor, epochs: Tensor, seed: int, probability: float, fixed: Tensor | None, num_tokens: int, first: int
) -> Tensor | None:
    """The orders of a micro-batch, int64 [B, N]: random with `probability`, else `fixed` (RAR Eq. 3 to 5).

    Returns `fixed` itself for probability 0. The random numbers of a sequence are a function of (seed, ids[i], epochs[i]);
    ids and epochs are int64 [B].
    """
    if probability == 0:
        return fixed
    bits = rng.random_bits(seed, rng.Purpose.PERMUTATION, ids, epochs, 1 + num_tokens)
    permuted = rng.as_uniform(bits[:, :1]) < probability
    scan = torch.arange(num_tokens, device=ids.device)[None] if fixed is None else fixed
    return torch.where(permuted, random_orders(bits[:, 1:], first), scan)


def sampling_orders(ids: Tensor, seed: int, num_tokens: int, first: int) -> Tensor:
    """A random order for each image id (int64 [B]), int64 [B, N], for models that were not annealed to a fixed order."""
    return random_orders(rng.random_bits(seed, rng.Purpose.SAMPLE_ORDER, ids, 0, num_tokens), first)


def orders_of_model(cfg: PermutationConfig, layout: Layout, ids: Tensor) -> Tensor | None:
    """The order in which a trained model predicts, int64 [B or 1, N]: its fixed one, or a random one for each id where
    training permuted to the end (permutation.end = 1)."""
    if cfg.never_settles:
        return sampling_orders(ids, 0, layout.num_tokens, fixed_prefix(cfg.prefix, layout))
    return fixed_order(cfg.order, layout, ids.device)


def in_order(tokens: Tensor, order: Tensor | None) -> Tensor:
    """The tokens (in stored order) in the order of prediction, int64 [B, N]."""
    return tokens if order is None else tokens.gather(1, order.expand_as(tokens))


def in_place(tokens: Tensor, order: Tensor | None) -> Tensor:
    """The tokens (in the order of prediction) in stored order, int64 [B, N]: the inverse of `in_order`."""
    return tokens if order is None else torch.empty_like(tokens).scatter_(1, order.expand_as(tokens), tokens)
