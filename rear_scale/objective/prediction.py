"""Prediction of held-out tokens under teacher forcing: correct token ratio and perplexity (reAR Eq. 8 and 9), clean and under
noise, in one computation for validation and evaluation.

Sequences are scored in batches that the ranks do not change, and sums are exact: every number of ranks gives the same bits.
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

_ROWS = 8192  # whose probabilities are there at one time


@dataclass(frozen=True)
class Replacement:
    """Which tokens of a context are replaced (reAR Eq. 4): each with probability `rate`, by one of all `codebook_size` codes.

    Each draw is a function of (seed, sample id, draw).
    """

    rate: float
    seed: int
    draw: int
    codebook_size: int


def held_out_task(tokens: Tensor, ids: Tensor, order: Tensor | None, replacement: Replacement | None) -> Task:
    """What a model is shown and asked of tokens int64 [B, N] of the samples ids (int64 [B]), in an order of prediction.

    order: int64 [B or 1, N]; None = as stored. replacement: None = a clean context.
    """
    context = tokens
    if replacement is not None:
        r = replacement
        context = noise.replaced(tokens, r.rate, ids, r.draw, r.seed, r.codebook_size)
    return Task(permutation.in_order(context, order), permutation.in_order(tokens, order), order, None)


def batches_of_rank(sequences: int, batch_size: int, rank: int, ranks: int) -> Iterator[tuple[Tensor, bool]]:
    """Sample ids (int64 [B]) of the batches that a rank scores, and whether they count.

    Each batch counts on one rank; on the others, it fills up what they lack for as many passes as all, which engines that
    gather weights need.
    """
    batches = torch.arange(sequences).split(batch_size)
    for first in range(0, len(batches), ranks):
        mine = first + rank
        yield batches[min(mine, len(batches) - 1)], mine < len(batches)


def sequence_scores(logits: Tensor, tokens: Tensor) -> Tensor:
    """float64 [B, 2]: of each sequence, the negative log-likelihood and the number of correct argmax predictions.

    logits: [B, N, K], logits[:, t] predicts tokens[:, t]; tokens: int64 [B, N].
    """
    losses, correct = [], []
    for part, targets in zip(logits.flatten(0, 1).split(_ROWS), tokens.flatten().split(_ROWS), strict=True):
        losses.append(F.cross_entropy(part.float(), targets, reduction="none"))
        correct.append(part.argmax(1) == targets)
    scores = torch.stack((torch.cat(losses).double(), torch.cat(correct).double()), dim=1)
    return scores.unflatten(0, tokens.shape).sum(1)


def exact_sums(rows: list[Tensor]) -> list[float]:
    """The sum of each column of float64 [M, n] tables, rounded once: the same in any order of the rows."""
    return [math.fsum(column) for column in torch.cat(rows).T.tolist()]


def ratio_and_loss(loss: float, correct: float, tokens: int) -> tuple[float, float]:
    """Correct token ratio and mean negative log-likelihood, of sums over so many tokens; perplexity is the exp of the latter."""
    return correct / tokens, loss / tokens
