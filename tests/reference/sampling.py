"""Sampling as the released samplers do it: everything but keys and values is computed again at every step."""

# B images, N tokens of an image, K codes

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# Weights, tokens [2B, t], condition [2B], cache or None -> logits [2B, positions, K]
Forward = Callable[[Mapping[str, Tensor], Tensor, Tensor, list | None], Tensor]


@torch.inference_mode()
def sample(
    forward: Forward,
    weights: Mapping[str, Tensor],
    condition: Tensor,
    null: int,
    scales: list[float],
    draw: Callable[[Tensor, int], Tensor],
    *,
    cached: bool,
) -> Tensor:
    """Token ids int64 [B, N] for rows of the embedding table (int64 [B]) and the row of no class.

    scales: the guidance scale of each step. draw(logits [B, K], step) gives the step's ids. cached: keep keys and values;
    else the whole prefix is run at every step.
    """
    B = len(condition)
    tokens = torch.zeros(B, 0, dtype=torch.int64, device=condition.device)
    both = torch.cat((condition, torch.full_like(condition, null)))
    cache: list | None = [] if cached else None
    for step, scale in enumerate(scales):
        logits = forward(weights, torch.cat((tokens, tokens)), both, cache)[:, -1]
        conditional, unconditional = logits[:B], logits[B:]
        ids = draw(unconditional + (conditional - unconditional) * scale, step)
        tokens = torch.cat((tokens, ids[:, None]), dim=1)
    return tokens
