"""The terms of the training loss, in float32."""

# B images, N tokens of an image, M positions that a head speaks for, K codes, D width of a code

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def next_token(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy (Eq. 5, per token) and share of correct argmax predictions, both scalar float32.

    logits: [B, N, K], logits[:, t] predicts tokens[:, t]; tokens: int64 [B, N].
    """
    flat = logits.flatten(0, 1).float()
    accuracy = (flat.detach().argmax(1) == tokens.flatten()).float().mean()
    return F.cross_entropy(flat, tokens.flatten()), accuracy


def embedding_distance(
    features: Tensor, directions: Tensor, num_tokens: int, *, counted: Tensor | None = None, offset: float = 1.0
) -> Tensor:
    """Summed cosine distance `offset` - cos of head outputs to code directions, per token of the batch (a term of Eq. 6).

    features: [B, M, D]; directions: float32 [B, M, D], of unit length; num_tokens: B N. Eq. 6 sums M = N - 1 positions
    and Eq. 5 sums N, so both are divided by N: their ratio stays as written. counted: bool [B, M], the positions that
    the sum is over; the divisor stays B N, as in the released code.
    """
    cosine = (F.normalize(features.float(), dim=-1) * directions).sum(-1)
    distance = offset - cosine
    return (distance if counted is None else distance * counted).sum() / num_tokens
