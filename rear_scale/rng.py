"""Counter-based random numbers: a draw belongs to (seed, purpose, id, step), never to a rank or to the order of calls.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in integer tensor operations, so that
one GPU, many GPUs and a CPU draw the same bits, in batches and without host syncs.
"""

# I ids, C numbers drawn per id

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

Word = TypeVar("Word", Tensor, int)

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_FEISTEL_ROUNDS = 8


class Purpose(enum.IntEnum):
    """What a draw is for. Two purposes never share bits. The numbers are part of the format: never change one."""

    LABEL_DROP = 1
    NOISE = 2
    DATA_ORDER = 3
    SAMPLE_TOKEN = 4
    TOKENIZER_BATCH = 5
    CLASSIFIER_BATCH = 6
    DEVICE_SEED = 7
    WEIGHT_INIT = 8
    PERMUTATION = 9
    SAMPLE_ORDER = 10
    SHARD_ORDER = 20
    LANE_ORDER = 21


def random_bits(seed: int, purpose: Purpose, ids: Tensor, steps: Tensor | int, count: int) -> Tensor:
    """Uniform 32-bit integers as int64 [I, count] on the device of `ids`.

    ids: int64 [I], 0 .. 2^32 - 1. steps: int64 [I] or one number, the occasion on which the id draws (training: the
    epoch; sampling: the token position). Row i depends on (seed, purpose, ids[i], steps[i]) alone.
    """
    blocks = -(-count // 4)
    block = torch.arange(blocks, device=ids.device).expand(len(ids), blocks)
    counter = (
        block,
        ids[:, None].expand_as(block),
        # A number is written on the device: one that came from the host would be waited for.
        _column(steps, ids).expand_as(block) if isinstance(steps, Tensor) else torch.full_like(block, steps),
        torch.full_like(block, int(purpose)),
    )
    words = philox(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(words, dim=-1).reshape(len(ids), 4 * blocks)[:, :count]


def _column(steps: Tensor, ids: Tensor) -> Tensor:
    return steps.to(ids.device)[:, None] if steps.ndim else steps.to(ids.device)


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[int, int]) -> tuple[Word, Word, Word, Word]:
    """Philox4x32-10 of four 32-bit words: all int64 tensors of one shape, or all Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The products wrap modulo 2^64 in int64; shift and mask recover both unsigned halves all the same.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def as_uniform(bits: Tensor) -> Tensor:
    """float32 in [0, 1), of 32-bit integers."""
    return (bits >> 8).float() * 2.0**-24


def as_integers(bits: Tensor, high: int) -> Tensor:
    """int64, uniform in 0 .. high - 1 (to within high / 2^32), of 32-bit integers."""
    return (bits * high) >> 32


def exponential(seed: int, purpose: Purpose, ids: Tensor, steps: Tensor | int, count: int) -> Tensor:
    """float32 [I, count], unit exponential and above 0: argmax(p / exponential) draws from p."""
    # All 32 bits count near 0, where the winners of that race are; only the far tail is clipped (at about 16.6).
    bits = random_bits(seed, purpose, ids, steps, count).float()
    return -torch.log1p(-((bits + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24))


def permuted(seed: int, purpose: Purpose, occasion: int, positions: Tensor, size: int) -> Tensor:
    """int64 [I]: where a fixed pseudo-random permutation of 0 .. size - 1 sends the positions (int64 [I]).

    A Feistel network on a grid of at least `size` cells, walked until it falls inside (Black & Rogaway 2002): no table
    is kept, so any position of any epoch costs the same.
    """
    rows = max(1, int(size**0.5))
    columns = -(-size // rows)
    keys = random_bits(seed, purpose, torch.arange(_FEISTEL_ROUNDS), occasion, 1)[:, 0].tolist()
    result = _feistel(positions, rows, columns, keys)
    while (outside := (result >= size).nonzero()[:, 0]).numel():
        result[outside] = _feistel(result[outside], rows, columns, keys)
    return result


def permuted_within(
    seed: int, purpose: Purpose, occasion: int, groups: Tensor, positions: Tensor, sizes: Tensor
) -> Tensor:
    """int64 [I]: as `permuted`, where every position (int64 [I]) has a group (int64 [I], 0 .. 2^32 - 1) with a permutation
    and a size (int64 [I], above the position) of its own."""
    rows = sizes.double().sqrt().long().clamp(min=1)
    columns = (sizes + rows - 1) // rows
    unique, group = groups.unique(return_inverse=True)
    keys = random_bits(seed, purpose, unique, occasion, _FEISTEL_ROUNDS)[group]
    result = _feistel(positions, rows, columns, keys.unbind(1))
    while (outside := (result >= sizes).nonzero()[:, 0]).numel():
        result[outside] = _feistel(result[outside], rows[outside], columns[outside], keys[outside].unbind(1))
    return result


def _feistel(cells: Tensor, rows: Word, columns: Word, keys: Sequence[Word]) -> Tensor:
    left, right = cells // columns, cells % columns
    for key_left, key_right in zip(keys[::2], keys[1::2], strict=True):
        left = (left + _mix(right ^ key_left)) % rows
        right = (right + _mix(left ^ key_right)) % columns
    return left * columns + right


def _mix(words: Tensor) -> Tensor:
    """The 32-bit finalizer of MurmurHash3: each input bit reaches every output bit."""
    words = ((words ^ (words >> 16)) * 0x85EBCA6B) & _MASK
    words = ((words ^ (words >> 13)) * 0xC2B2AE35) & _MASK
    return words ^ (words >> 16)


def fold(seed: int, purpose: Purpose, *numbers: int) -> int:
    """One 63-bit seed for a library's generator, from the seed and any numbers below 2^64."""
    state = seed
    for number in (len(numbers), *numbers):
        counter = (number & _MASK, (number >> 32) & _MASK, 0, int(purpose))
        low, high, *_ = philox(counter, (state & _MASK, (state >> 32) & _MASK))
        state = low | (high & 0x7FFFFFFF) << 32
    return state
