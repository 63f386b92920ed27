"""Noisy context regularization (reAR Eq. 4): tokens of the context replaced by uniform ones."""

# B images, N tokens of an image, K codes

from __future__ import annotations

import torch
from torch import Tensor

from rear_scale import rng
from rear_scale.config import NoiseConfig


def perturbed(
    tokens: Tensor, ids: Tensor, epochs: Tensor, seed: int, limit: float, codebook_size: int, cfg: NoiseConfig
) -> tuple[Tensor, Tensor]:
    """The context int64 [B, N], and which of its tokens were replaced, bool [B, N].

    Each sequence draws a rate from U(0, limit), or takes the limit itself (cfg.rate), and each of its tokens is replaced
    at that rate (Eq. 5). tokens: int64 [B, N]. Each draw is a function of (seed, ids[i], epochs[i]); ids and epochs are
    int64 [B].
    """
    rate, choice, value = _draws(tokens, ids, epochs, seed)
    chosen = choice < (limit if cfg.rate == "fixed" else limit * rate)
    if cfg.replacement == "mask":
        return tokens.masked_fill(chosen, codebook_size), chosen
    return _replace(tokens, chosen, value, codebook_size), chosen


def replaced(tokens: Tensor, rate: float, ids: Tensor, occasion: int, seed: int, codebook_size: int) -> Tensor:
    """int64 [B, N]: each token is replaced with probability `rate` by one drawn from all K codes (Eq. 4).

    Each draw is a function of (seed, ids[i], occasion).
    """
    _, choice, value = _draws(tokens, ids, occasion, seed)
    return _replace(tokens, choice < rate, value, codebook_size)


def _draws(tokens: Tensor, ids: Tensor, occasions: Tensor | int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uniform draws for the rate [B, 1] and for each token's choice [B, N] in [0, 1), and 32 bits for its value [B, N]."""
    N = tokens.shape[1]
    bits = rng.random_bits(seed, rng.Purpose.NOISE, ids, occasions, 1 + 2 * N)
    uniform = rng.as_uniform(bits[:, : 1 + N])
    return uniform[:, :1], uniform[:, 1:], bits[:, 1 + N :]


def _replace(tokens: Tensor, chosen: Tensor, value: Tensor, codebook_size: int) -> Tensor:
    # The drawn code may be the token itself, as in Eq. 4.
    return torch.where(chosen, rng.as_integers(value, codebook_size), tokens)
