"""The state of cached decoding: keys and values of all positions so far, in memory that is allocated once."""

# R rows of a decoding batch, H heads, S positions, K codes

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from rear_scale.model import Generator
from rear_scale.sample.batch import Batch

if TYPE_CHECKING:
    from rear_scale.sample.compiled import CompiledBlocks


class CachedDecoding:
    """The decoding state of one batch: tables, KV caches and the number of positions in them.

    caches: of an earlier batch with the same number of rows, to be overwritten; None = allocate new ones. compiled: computes
    the blocks of all steps but the first; None = they run uncompiled.
    """

    def __init__(
        self,
        model: Generator,
        batch: Batch,
        caches: list[Cache] | None = None,
        compiled: CompiledBlocks | None = None,
    ) -> None:
        self.model, self.rows, self.compiled = model, len(batch.class_index), compiled
        self.tables = model.decoding(batch.classes, batch.class_index, batch.order)
        self.caches = caches or new_caches(model, self.rows, compiled=compiled is not None)
        for cache in self.caches:
            cache.length = 0
        self.length = 0

    def next_logits(self, tokens: Tensor) -> Tensor:
        """Logits [R, K] of the next token after tokens (int64 [B, t]), which must grow by one token per call."""
        start = self.length
        if start == 0:
            x = self.tables.prefix()
        else:
            x = self.tables.token(tokens[:, -1].repeat(self.rows // len(tokens)), tokens.shape[1] - 1)
        for number, cache in enumerate(self.caches):
            # Only the first step has several positions, and another form of attention.
            if self.compiled is None or start == 0:
                x = self.tables.block(number, x, start, cache.attend)
            else:
                x = self.compiled(self.tables, number, x, start, cache)
        self.length = start + x.shape[1]
        return self.tables.logits(x[:, -1:], self.length - 1)


def new_caches(model: Generator, rows: int, *, compiled: bool = False) -> list[Cache]:
    """New, uninitialized KV caches, one per block, for decoding batches of so many rows. compiled: for CompiledBlocks."""
    shape, weight = model.shape, next(model.parameters())
    transposed = weight.device.type == "cpu" and weight.dtype == torch.float32 and not compiled
    cache_class = TransposedCache if transposed else Cache
    size = (rows, shape.num_heads, model.prefix + model.num_tokens - 1, shape.width // shape.num_heads)
    return [cache_class(*size, weight) for _ in model.blocks]


class Cache:
    """Keys and values of one block, float [R, H, S, width of a head], allocated once."""

    def __init__(self, rows: int, heads: int, positions: int, width: int, like: Tensor) -> None:
        # Two allocations: torch.compile treats parts of one as aliases, and copies what it writes into aliases.
        self.keys, self.values = (like.new_empty(rows, heads, positions, width) for _ in range(2))
        self.length = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The attention output of the new positions [R, H, s, ...], which are appended and attend causally to all so far."""
        query, key = query.to(value.dtype), key.to(value.dtype)
        start, self.length = self.length, self.length + key.shape[2]
        return self._attend(query, key, value, start, self.length)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, start: int, end: int) -> Tensor:
        self.keys[:, :, start:end], self.values[:, :, start:end] = key, value
        # Causal masking only in the first call, which has several positions; later calls have one, which attends to all.
        return F.scaled_dot_product_attention(
            query, self.keys[:, :, :end], self.values[:, :, :end], is_causal=start == 0 and end > 1
        )


class TransposedCache(Cache):
    """Keys stored as [R, H, width of a head, S]: on a CPU, the product of one query with many keys is fastest in this layout."""

    def __init__(self, rows: int, heads: int, positions: int, width: int, like: Tensor) -> None:
        super().__init__(rows, heads, positions, width, like)
        self.keys = self.keys.view(rows, heads, width, positions)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, start: int, end: int) -> Tensor:
        self.keys[..., start:end], self.values[:, :, start:end] = key.transpose(2, 3), value
        if start == 0:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)
        scores = torch.bmm(query.flatten(0, 1) * query.shape[3] ** -0.5, self.keys.flatten(0, 1)[..., :end])
        attended = torch.bmm(scores.softmax(-1), self.values.flatten(0, 1)[:, :end])
        return attended.view(query.shape)
