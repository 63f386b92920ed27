"""Prediction of held-out tokens under teacher forcing: correct token ratio and perplexity (reAR Eq. 8 and 9), with clean and
with noisy context, for validation and evaluation.

The batches do not depend on the number of ranks, and sums are exact, so that results are bitwise the same for any number.
"""

# B sequences of a batch, N tokens of an image, K codes

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rear_scale.objective import noise, permutation
from rear_scale.objective.terms import Task

_LARGEST_LOSS = 709.0  # exp of more overflows
_ROWS = 8192  # positions whose probabilities are in memory at one time


@dataclass(frozen=True)
class Replacement:
    """Settings of the noise (reAR Eq. 4): a token is replaced with probability `rate` by one of all `codebook_size` codes.

    The random numbers of a sequence are a function of (seed, sample id, draw).
    """

    rate: float
    seed: int
    draw: int
    codebook_size: int


def held_out_task(tokens: Tensor, ids: Tensor, order: Tensor | None, replacement: Replacement | None) -> Task:
    """The context and targets of tokens (int64 [B, N]) of the samples `ids` (int64 [B]), in an order of prediction.

    order: int64 [B or 1, N]; None = as stored. replacement: None = a clean context.
    """
    context = tokens
    if replacement is not None:
        r = replacement
        context = noise.replace_at_rate(tokens, r.rate, ids, r.draw, r.seed, r.codebook_size)
    return Task(permutation.in_order(context, order), permutation.in_order(tokens, order), order, None)


def batches_of_rank(sequences: int, batch_size: int, rank: int, ranks: int) -> Iterator[tuple[Tensor, bool]]:
    """Yields the sample ids (int64 [B]) of the batches that a rank scores, and whether they count.

    Each batch counts on one rank. Ranks with fewer batches repeat some that do not count, because engines that gather weights
    need the same number of forward passes on all ranks.
    """
    batches = torch.arange(sequences).split(batch_size)
    for first in range(0, len(batches), ranks):
        mine = first + rank
        yield batches[min(mine, len(batches) - 1)], mine < len(batches)


def sequence_scores(logits: Tensor, tokens: Tensor) -> Tensor:
    """The negative log-likelihood and the number of correct argmax predictions of each sequence, float64 [B, 2].

    logits: [B, N, K], logits[:, t] predicts tokens[:, t]; tokens: int64 [B, N].
    """
    losses, correct = [], []
    for part, targets in zip(logits.flatten(0, 1).split(_ROWS), tokens.flatten().split(_ROWS), strict=True):
        losses.append(F.cross_entropy(part.float(), targets, reduction="none"))
        correct.append(part.argmax(1) == targets)
    scores = torch.stack((torch.cat(losses).double(), torch.cat(correct).double()), dim=1)
    return scores.unflatten(0, tokens.shape).sum(1)


def exact_sums(rows: list[Tensor]) -> list[float]:
    """The sum of each column of float64 [M, n] tables, rounded once, so that it does not depend on the order of the rows."""
    return [math.fsum(column) for column in torch.cat(rows).T.tolist()]


def perplexity_of(loss: float) -> float:
    """exp of a mean negative log-likelihood (reAR Eq. 9); infinite where that is beyond all floats, as for a diverged model."""
    return math.exp(loss) if not loss > _LARGEST_LOSS else math.inf


def ratio_and_loss(loss: float, correct: float, tokens: int) -> tuple[float, float]:
    """Correct token ratio and mean negative log-likelihood, from sums over `tokens` tokens; perplexity is exp of the latter."""
    return correct / tokens, loss / tokens
