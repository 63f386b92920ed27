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
    """The use of a random number; different purposes never share bits. The values determine results: never change one."""

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
    STREAM_ORDER = 21
    SUBSET = 30
    ANALYSIS = 40


def random_bits(seed: int, purpose: Purpose, ids: Tensor, steps: Tensor | int, count: int) -> Tensor:
    """Uniform 32-bit integers as int64 [I, count] on the device of `ids`.

    ids: int64 [I], 0 .. 2^32 - 1. steps: int64 [I] or one number, the draw index of the id (in training the epoch, in
    sampling the token position). Row i depends on (seed, purpose, ids[i], steps[i]) alone.
    """
    blocks = -(-count // 4)
    block = torch.arange(blocks, device=ids.device).expand(len(ids), blocks)
    counter = (
        block,
        ids[:, None].expand_as(block),
        # full_like writes the number on the device; copying it from the host would synchronize with the GPU.
        _column(steps, ids).expand_as(block) if isinstance(steps, Tensor) else torch.full_like(block, steps),
        torch.full_like(block, int(purpose)),
    )
    words = philox(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(words, dim=-1).reshape(len(ids), 4 * blocks)[:, :count]


def _column(steps: Tensor, ids: Tensor) -> Tensor:
    return steps.to(ids.device)[:, None] if steps.ndim else steps.to(ids.device)


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[int, int]) -> tuple[Word, Word, Word, Word]:
    """Four random 32-bit words, by Philox4x32-10 of a counter of four: all int64 tensors of one shape, or Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The products wrap modulo 2^64 in signed int64; shift and mask still recover both unsigned 32-bit halves.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def as_uniform(bits: Tensor) -> Tensor:
    """Uniform float32 numbers in [0, 1), from uniform 32-bit integers."""
    return (bits >> 8).float() * 2.0**-24


def as_integers(bits: Tensor, high: int) -> Tensor:
    """Integers int64, uniform in 0 .. high - 1 (to within high / 2^32), from uniform 32-bit integers."""
    return (bits * high) >> 32


def exponential(seed: int, purpose: Purpose, ids: Tensor, steps: Tensor | int, count: int) -> Tensor:
    """Exponential random numbers of rate 1, float32 [I, count], above 0. argmax(p / exponential) is a sample from p."""
    # Full 32-bit resolution near 0, where the argmax is decided; only the far tail is clipped (at about 16.6).
    bits = random_bits(seed, purpose, ids, steps, count).float()
    return -torch.log1p(-((bits + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24))


def permuted(seed: int, purpose: Purpose, occasion: int, positions: Tensor, size: int) -> Tensor:
    """The images int64 [I] of positions (int64 [I]) under a fixed pseudo-random permutation of 0 .. size - 1.

    occasion: the draw index; each has another permutation. A Feistel network on a grid of at least `size` cells, applied
    again while the result is `size` or more (cycle walking, Black & Rogaway 2002). It needs no table, so any position of any
    epoch costs the same.
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
    """The images int64 [I] of positions under one permutation per group, otherwise as `permuted`.

    groups: int64 [I], 0 .. 2^32 - 1, the group of each position. sizes: int64 [I], the size of that group.
    """
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
    """A 63-bit seed for a library's random generator, hashed from the seed, the purpose and any numbers below 2^64."""
    state = seed
    for number in (len(numbers), *numbers):
        counter = (number & _MASK, (number >> 32) & _MASK, 0, int(purpose))
        low, high, *_ = philox(counter, (state & _MASK, (state >> 32) & _MASK))
        state = low | (high & 0x7FFFFFFF) << 32
    return state
