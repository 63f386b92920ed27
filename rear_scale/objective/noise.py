"""Noisy context regularization (reAR Eq. 4): random replacement of tokens of the context."""

# B images, N tokens of an image, K codes

from __future__ import annotations

import torch
from torch import Tensor

from rear_scale import rng
from rear_scale.config import NoiseConfig


def replace_tokens(
    tokens: Tensor, ids: Tensor, epochs: Tensor, seed: int, limit: float, codebook_size: int, cfg: NoiseConfig
) -> tuple[Tensor, Tensor]:
    """The noisy context, int64 [B, N], and a mask of its replaced tokens, bool [B, N].

    The rate of a sequence is drawn from U(0, limit), or is the limit itself (cfg.rate), and each of its tokens is replaced
    with that probability (Eq. 5). tokens: int64 [B, N]. The random numbers of a sequence are a function of (seed, ids[i],
    epochs[i]); ids and epochs are int64 [B].
    """
    rate, choice, value = _draws(tokens, ids, epochs, seed)
    chosen = choice < (limit if cfg.rate == "fixed" else limit * rate)
    if cfg.replacement == "mask":
        return tokens.masked_fill(chosen, codebook_size), chosen
    return _replace(tokens, chosen, value, codebook_size), chosen


def replace_at_rate(tokens: Tensor, rate: float, ids: Tensor, draw: int, seed: int, codebook_size: int) -> Tensor:
    """The tokens, int64 [B, N], each replaced with probability `rate` by one drawn uniformly from all K codes (Eq. 4).

    The random numbers of a sequence are a function of (seed, ids[i], draw).
    """
    _, choice, value = _draws(tokens, ids, draw, seed)
    return _replace(tokens, choice < rate, value, codebook_size)


def _draws(tokens: Tensor, ids: Tensor, draws: Tensor | int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uniform numbers in [0, 1) for the rate [B, 1] and for the choice of tokens [B, N], and 32 bits for new tokens [B, N]."""
    N = tokens.shape[1]
    bits = rng.random_bits(seed, rng.Purpose.NOISE, ids, draws, 1 + 2 * N)
    uniform = rng.as_uniform(bits[:, : 1 + N])
    return uniform[:, :1], uniform[:, 1:], bits[:, 1 + N :]


def _replace(tokens: Tensor, chosen: Tensor, value: Tensor, codebook_size: int) -> Tensor:
    # The new code may equal the old one, as in Eq. 4.
    return torch.where(chosen, rng.as_integers(value, codebook_size), tokens)
