"""Orders of prediction: RAR's random permutations and the six scan orders of RAR Table 3 (after Esser et al. 2021).

An order lists places: order[t] is the place in the image of the token that is predicted at step t.
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
    """The places of an image's tokens, as tokenizer configs and the shapes of generators say them."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def grid(self) -> Sequence[int] | None:
        """Rows and columns of the tokens behind the prefix; None = a sequence without a grid."""

    @property
    def prefix_tokens(self) -> int: ...


def row_major(rows: int, columns: int) -> list[int]:
    """Row by row, as tokens are stored."""
    return list(range(rows * columns))


def alternate(rows: int, columns: int) -> list[int]:
    """Row by row, every second row backwards."""
    lines = [list(range(row * columns, (row + 1) * columns)) for row in range(rows)]
    return [place for number, line in enumerate(lines) for place in (line[::-1] if number % 2 else line)]


def spiral_out(rows: int, columns: int) -> list[int]:
    """From the centre outwards: one step up, one right, two down, two left, three up ... Steps outside are left out."""
    row, column = rows // 2, (columns - 1) // 2
    places = [row * columns + column]
    directions = ((-1, 0), (0, 1), (1, 0), (0, -1))
    turn = 0
    while len(places) < rows * columns:
        down, right = directions[turn % 4]
        for _ in range(turn // 2 + 1):
            row, column = row + down, column + right
            if 0 <= row < rows and 0 <= column < columns:
                places.append(row * columns + column)
        turn += 1
    return places


def spiral_in(rows: int, columns: int) -> list[int]:
    """The reverse of `spiral_out`."""
    return spiral_out(rows, columns)[::-1]


def z_curve(rows: int, columns: int) -> list[int]:
    """By the interleaved bits of row and column (Morton)."""

    def key(place: int) -> int:
        row, column = divmod(place, columns)
        bits = range(max(rows, columns).bit_length())
        return sum((column >> bit & 1) << 2 * bit | (row >> bit & 1) << 2 * bit + 1 for bit in bits)

    return sorted(range(rows * columns), key=key)


def subsample(side: int, columns: int) -> list[int]:
    """Coarse to fine: every second row and column first, each of the four parts again in the same way. For square grids."""
    assert side == columns, (side, columns)
    if side == 1:
        return [0]
    half = subsample(side // 2, side // 2)
    inner = [divmod(place, side // 2) for place in half]
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
    """int64 [N] of a scan order over the grid; tokens before the grid keep their places in front. A sequence without a grid
    has its own order alone, row_major."""
    if name == "row_major":
        return torch.arange(layout.num_tokens)
    assert layout.grid is not None, name
    return _scan_order(name, *layout.grid, layout.prefix_tokens)


@cache
def _scan_order(name: str, rows: int, columns: int, prefix: int) -> Tensor:
    return torch.cat((torch.arange(prefix), prefix + torch.tensor(SCANS[name](rows, columns))))


def fixed_order(name: str, layout: Layout, device: torch.device) -> Tensor | None:
    """int64 [1, N], or None for the order in which tokens are stored."""
    return None if name == "row_major" else scan_order(name, layout).to(device)[None]


def fixed_prefix(prefix: str, layout: Layout) -> int:
    """How many tokens stay in front when a row is permuted: those before the grid with objective.permutation.prefix=fixed."""
    return layout.prefix_tokens if prefix == "fixed" else 0


def random_orders(bits: Tensor, first: int) -> Tensor:
    """int64 [B, N]: a uniform permutation per row of 32-bit draws [B, N]; the first `first` places stay in front."""
    keys = bits.clone()
    keys[:, :first] = torch.arange(first, device=bits.device) - first
    return keys.argsort(dim=1, stable=True)


def training_orders(
    ids: Tensor, epochs: Tensor, seed: int, probability: float, fixed: Tensor | None, num_tokens: int, first: int
) -> Tensor | None:
    """int64 [B, N], or `fixed` where no row is permuted: each row is permuted with `probability` (RAR Eq. 3 to 5).

    Each draw is a function of (seed, ids[i], epochs[i]); ids and epochs are int64 [B].
    """
    if probability == 0:
        return fixed
    bits = rng.random_bits(seed, rng.Purpose.PERMUTATION, ids, epochs, 1 + num_tokens)
    permuted = rng.as_uniform(bits[:, :1]) < probability
    scan = torch.arange(num_tokens, device=ids.device)[None] if fixed is None else fixed
    return torch.where(permuted, random_orders(bits[:, 1:], first), scan)


def sampling_orders(ids: Tensor, seed: int, num_tokens: int, first: int) -> Tensor:
    """int64 [B, N]: a random order for each image id (int64 [B]), for models that were never annealed to a fixed one."""
    return random_orders(rng.random_bits(seed, rng.Purpose.SAMPLE_ORDER, ids, 0, num_tokens), first)


def orders_of_model(cfg: PermutationConfig, layout: Layout, ids: Tensor) -> Tensor | None:
    """int64 [B or 1, N]: the order that a trained model predicts in: its fixed one, or a random one for each id where
    training never settled on one (permutation.end = 1)."""
    if cfg.never_settles:
        return sampling_orders(ids, 0, layout.num_tokens, fixed_prefix(cfg.prefix, layout))
    return fixed_order(cfg.order, layout, ids.device)


def in_order(tokens: Tensor, order: Tensor | None) -> Tensor:
    """int64 [B, N]: tokens (stored order) in the order of prediction."""
    return tokens if order is None else tokens.gather(1, order.expand_as(tokens))


def in_place(tokens: Tensor, order: Tensor | None) -> Tensor:
    """int64 [B, N]: the inverse of `in_order`."""
    return tokens if order is None else torch.empty_like(tokens).scatter_(1, order.expand_as(tokens), tokens)
