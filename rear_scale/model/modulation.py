"""Rows of a table of modulation for the images of a batch."""

# B images, U distinct classes of a batch

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rows_of(table: Tensor, rows: Tensor) -> Tensor:
    """table[rows], [B, ...], of table [U, ...] and rows int64 [B].

    The usual backward pass of a gather adds with atomics on GPUs: in an order that changes from run to run and, in bf16, with a
    rounding after every addition. This one has the same bits every time.
    """
    return _Rows.apply(table, rows)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.distinct = table.shape[0]
        return table.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        # A CPU adds image by image, in order, which is faster there than a product with so few rows.
        summed = sums_by_product if gradient.is_cuda else sums_in_order
        return summed(gradient, rows, ctx.distinct), None


def sums_by_product(values: Tensor, rows: Tensor, distinct: int) -> Tensor:
    """[U, ...], the sums of values [B, ...] with the same row (int64 [B]): a product with zeros and ones, which a GPU runs at
    the speed of its memory and adds up in float32."""
    belongs = torch.arange(distinct, device=rows.device)[:, None] == rows
    return (belongs.to(values.dtype) @ values.flatten(1)).unflatten(1, values.shape[1:])


def sums_in_order(values: Tensor, rows: Tensor, distinct: int) -> Tensor:
    """As `sums_by_product`, one image after the other."""
    return values.new_zeros(distinct, *values.shape[1:]).index_add_(0, rows, values)
