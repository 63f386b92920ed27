"""Noisy context regularization (reAR Eq. 4): tokens of the context replaced by uniform ones."""

# B images, N tokens of an image, K codes

from __future__ import annotations

import torch
from torch import Tensor

from rear_scale import rng


def perturbed(tokens: Tensor, ids: Tensor, epochs: Tensor, seed: int, limit: float, codebook_size: int) -> Tensor:
    """int64 [B, N]: each sequence draws a rate from U(0, limit), each of its tokens is replaced at that rate (Eq. 5).

    tokens: int64 [B, N]. Each draw is a function of (seed, ids[i], epochs[i]); ids and epochs are int64 [B].
    """
    rate, *rest = _draws(tokens, ids, epochs, seed)
    return _replace(tokens, limit * rate, *rest, codebook_size)


def replaced(tokens: Tensor, rate: float, ids: Tensor, occasion: int, seed: int, codebook_size: int) -> Tensor:
    """int64 [B, N]: each token is replaced with probability `rate` by one drawn from all K codes (Eq. 4).

    Each draw is a function of (seed, ids[i], occasion).
    """
    _, *rest = _draws(tokens, ids, occasion, seed)
    return _replace(tokens, rate, *rest, codebook_size)


def _draws(tokens: Tensor, ids: Tensor, occasions: Tensor | int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uniform draws for the rate [B, 1] and for each token's choice [B, N] in [0, 1), and 32 bits for its value [B, N]."""
    N = tokens.shape[1]
    bits = rng.random_bits(seed, rng.Purpose.NOISE, ids, occasions, 1 + 2 * N)
    uniform = rng.as_uniform(bits[:, : 1 + N])
    return uniform[:, :1], uniform[:, 1:], bits[:, 1 + N :]


def _replace(tokens: Tensor, rate: Tensor | float, choice: Tensor, value: Tensor, codebook_size: int) -> Tensor:
    # The drawn code may be the token itself, as in Eq. 4.
    return torch.where(choice < rate, rng.as_integers(value, codebook_size), tokens)
