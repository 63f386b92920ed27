"""Gathering of modulation rows for the images of a batch, with a deterministic backward pass."""

# B images, U distinct classes of a batch

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rows_of(table: Tensor, class_index: Tensor) -> Tensor:
    """table[class_index], [B, ...], for table [U, ...] and class_index int64 [B].

    The backward pass of an ordinary gather adds with atomics on GPUs, in an order that changes from run to run and, in bf16,
    with rounding after every addition. This one is bitwise reproducible.
    """
    return _Rows.apply(table, class_index)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, class_index: Tensor) -> Tensor:
        ctx.save_for_backward(class_index)
        ctx.distinct = table.shape[0]
        return table.index_select(0, class_index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (class_index,) = ctx.saved_tensors
        # A CPU adds image by image, which is faster there than a product with so few rows.
        summed = sums_by_product if gradient.is_cuda else sums_in_order
        return summed(gradient, class_index, ctx.distinct), None


def sums_by_product(values: Tensor, class_index: Tensor, distinct: int) -> Tensor:
    """The sums, [U, ...], of values [B, ...] with the same class_index (int64 [B]), as a product with a 0/1 matrix.

    A GPU runs it at memory speed and accumulates in float32.
    """
    belongs = torch.arange(distinct, device=class_index.device)[:, None] == class_index
    return (belongs.to(values.dtype) @ values.flatten(1)).unflatten(1, values.shape[1:])


def sums_in_order(values: Tensor, class_index: Tensor, distinct: int) -> Tensor:
    """The sums as in `sums_by_product`, adding one image after the other."""
    return values.new_zeros(distinct, *values.shape[1:]).index_add_(0, class_index, values)
