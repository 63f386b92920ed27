"""The inputs and results of one sampling batch, in tensors that later batches can reuse (CUDA graphs need fixed addresses)."""

# B images, R = 2B rows under guidance (with class, then without) or B, N tokens of an image, U distinct classes of the rows

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from rear_scale.model import Generator


class NextLogits(Protocol):
    def next_logits(self, drawn: Tensor) -> Tensor:
        """[R, K] of the token after those drawn, int64 [B, n]."""
        ...


class Batch:
    """Inputs and results of one batch.

    classes: int64 [U], the distinct classes. class_index: int64 [R], the index into `classes` of each row. ids: int64 [B], image
    ids. order: int64 [R or 1, N], the order of prediction; None = as tokens are stored. tokens: int64 [B, N], in the order of
    prediction. near_ties and within_rounding: int64 [B], see Decoder.generate.
    """

    def __init__(self, model: Generator, labels: Tensor, ids: Tensor, order: Tensor | None, guided: bool) -> None:
        # Under guidance, the second half of the rows has the null class ("no class").
        row_classes = torch.cat([labels, torch.full_like(labels, model.null_class)]) if guided else labels
        if guided and order is not None and len(order) > 1:
            order = order.repeat(2, 1)
        self.classes, self.class_index = row_classes.unique(return_inverse=True)
        self.ids, self.order, self.num_tokens = ids, order, model.num_tokens
        self.tokens = torch.empty(len(labels), model.num_tokens, dtype=torch.int64, device=labels.device)
        self.near_ties, self.within_rounding = torch.zeros_like(ids), torch.zeros_like(ids)
        self.state: NextLogits | None = None  # the CachedDecoding of this batch: tables and caches

    @property
    def shape(self) -> tuple[object, ...]:
        """The shapes of the tensors. Batches of equal shape can be computed in the same memory."""
        return len(self.classes), len(self.class_index), None if self.order is None else tuple(self.order.shape)

    def fill(self, other: Batch) -> None:
        """Copies the inputs of another batch of this shape into this one."""
        assert self.shape == other.shape, (self.shape, other.shape)
        if other is self:
            return
        for mine, theirs in (
            (self.classes, other.classes),
            (self.class_index, other.class_index),
            (self.ids, other.ids),
        ):
            mine.copy_(theirs)
        if self.order is not None and other.order is not None:  # both or neither, in one shape
            self.order.copy_(other.order)
