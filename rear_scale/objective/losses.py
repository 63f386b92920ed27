"""The terms of the training loss, in float32."""

# B images, N tokens of an image, M positions of a head's output, K codes, D width of a code

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_ROWS = 8192  # positions whose probabilities are in memory at one time


def next_token(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy (Eq. 5, per token) and fraction of correct argmax predictions, both scalar float32.

    logits: [B, N, K], logits[:, t] predicts tokens[:, t]; tokens: int64 [B, N].
    """
    flat, targets = logits.flatten(0, 1), tokens.flatten()
    if flat.is_cuda:
        return _CrossEntropy.apply(flat, targets), _accuracy(flat, targets)
    flat = flat.float()
    return F.cross_entropy(flat, targets), _accuracy(flat, targets)


def _accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.detach().argmax(1) == targets).float().mean()


class _CrossEntropy(torch.autograd.Function):
    """F.cross_entropy in float32 of logits [M, K] and targets int64 [M], with less memory.

    Saves the logits in their own precision and one number per row for the backward pass, but no float32 copy and no
    probabilities, each 268 MB for 256 images of 256 tokens and 1,024 codes.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        normalizers = torch.cat([rows.float().logsumexp(1) for rows in logits.split(_ROWS)])
        ctx.save_for_backward(logits, targets, normalizers)
        return (normalizers - logits.gather(1, targets[:, None])[:, 0]).mean()

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets, normalizers = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        scale = output_gradient / len(logits)
        chunks = (tensor.split(_ROWS) for tensor in (gradient, logits, targets[:, None], normalizers[:, None]))
        for out, rows, target, normalizer in zip(*chunks, strict=True):
            probabilities = (rows.float() - normalizer).exp_()
            probabilities.scatter_(1, target, probabilities.gather(1, target) - 1)
            out.copy_(probabilities.mul_(scale))
        return gradient, None


def embedding_distance(
    features: Tensor, directions: Tensor, num_tokens: int, *, counted: Tensor | None = None, offset: float = 1.0
) -> Tensor:
    """Summed cosine distance `offset` - cos of head outputs to code directions, per token of the batch (a term of Eq. 6).

    features: [B, M, D]; directions: float32 [B, M, D], of unit length; num_tokens: B N. Eq. 6 sums over
    M = N - 1 positions and Eq. 5 over N; both are divided by N, which keeps their ratio. counted: bool [B, M], the positions
    that the sum includes; the divisor stays B N, as in the released code.
    """
    cosine = (F.normalize(features.float(), dim=-1) * directions).sum(-1)
    distance = offset - cosine
    return (distance if counted is None else distance * counted).sum() / num_tokens
