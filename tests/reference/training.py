"""Losses and updates as the released trainers compute them."""

# B images, N tokens of an image, K codes, Z width of a code

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_NO_DECAY = ("ln", "bias", "latent_tokens", "mask_token", "embedding", "norm", "gamma", "embed")


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, at least N, K] against tokens [B, N]."""
    return F.cross_entropy(logits[:, : tokens.shape[1]].transpose(1, 2), tokens)


def released_alignment_loss(encode: Tensor, decode: Tensor, codes: Tensor, replaced: Tensor) -> Tensor:
    """Minus the cosines of both heads [B, N, Z] to the codes [B, N, Z]; encode leaves replaced tokens out."""
    encode_cosine = F.cosine_similarity(encode, codes, dim=2, eps=1e-12)
    decode_cosine = F.cosine_similarity(decode, codes, dim=2, eps=1e-12)
    return -(encode_cosine * ~replaced).mean() - decode_cosine.mean()


def paper_alignment_loss(encode: Tensor, decode: Tensor, codes: Tensor) -> Tensor:
    """Eq. 6, per token of the batch: cosine distances of both heads [B, N - 1, Z] to current and next codes [B, N, Z]."""
    encode_distance = 1 - F.cosine_similarity(encode, codes[:, :-1], dim=2, eps=1e-12)
    decode_distance = 1 - F.cosine_similarity(decode, codes[:, 1:], dim=2, eps=1e-12)
    return (encode_distance.sum() + decode_distance.sum()) / codes[..., 0].numel()


def parameter_groups(weights: dict[str, Tensor], weight_decay: float) -> list[dict]:
    """For torch's AdamW: without weight decay first."""
    decaying = {name for name, w in weights.items() if w.ndim >= 2 and not any(part in name for part in _NO_DECAY)}
    return [
        {"params": [w for name, w in weights.items() if name not in decaying], "weight_decay": 0.0},
        {"params": [w for name, w in weights.items() if name in decaying], "weight_decay": weight_decay},
    ]


def released_rate(update: int, peak: float, end: float, warmup: int, total: int) -> float:
    done = update - 1
    if done < warmup:
        return peak * done / warmup
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (total - warmup)))


class AdamW:
    """Clipping at a global norm and AdamW, one tensor at a time."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights, self.betas, self.weight_decay, self.max_norm = weights, (0.9, 0.96), 0.03, 1.0
        self.update = 0
        self.moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in self.weights.items()}

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """One update from the gradients, which are cleared. Returns their norm."""
        self.update += 1
        norm = math.sqrt(sum(w.grad.double().square().sum().item() for w in self.weights.values()))
        factor = min(1.0, self.max_norm / (norm + 1e-6))
        beta1, beta2 = self.betas
        for name, weight in self.weights.items():
            gradient, (first, second) = weight.grad * factor, self.moments[name]
            if weight.ndim >= 2 and not any(part in name for part in _NO_DECAY):
                weight.mul_(1 - lr * self.weight_decay)
            first.mul_(beta1).add_(gradient, alpha=1 - beta1)
            second.mul_(beta2).add_(gradient**2, alpha=1 - beta2)
            corrected = (second / (1 - beta2**self.update)).sqrt() + 1e-8
            weight.sub_(lr / (1 - beta1**self.update) * first / corrected)
            weight.grad = None
        return norm
