"""A compact convolutional VQ tokenizer for small images: two stride-2 levels, trained in seconds on a CPU.

Codes are initialized by k-means on continuous latents, trained by moving averages, and reset when they are no longer used
(van den Oord et al. 2017, arXiv:1711.00937, appendix A.1; Zeghidour et al. 2021, arXiv:2107.03312, section 3.3).
"""

# B images, C channels, S side in pixels, N tokens of an image, K codes, D width of a code, L latents of a batch

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rear_scale.config import InputError, TokenizerConfig
from rear_scale.tokenizer.base import PartwiseTokenizer, in_own_precision, nearest_code
from rear_scale.weight_file import fill, read_weights, write_weights

_FORMAT = "compact tokenizer"
_STRIDE = 4  # pixels of one token's side


class ResidualBlock(nn.Module):
    """Two convolutions with a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class CompactTokenizer(PartwiseTokenizer):
    """The compact tokenizer. ids [B, (S/4)^2] in raster order."""

    name: ClassVar[str] = "compact"

    def __init__(self, image_size: int, codebook_size: int, codebook_dim: int, channels: int) -> None:
        super().__init__()
        if image_size % _STRIDE:
            raise InputError(
                f"tokenizer.image_size={image_size} is not a multiple of {_STRIDE}. Use {image_size // _STRIDE * _STRIDE}"
            )
        if channels % 16:
            raise InputError(
                f"tokenizer.training.channels={channels} is not a multiple of 16. Use {max(16, channels // 16 * 16)}"
            )
        self.image_size, self.codebook_size, self.channels = image_size, codebook_size, channels
        self.side = image_size // _STRIDE
        self.num_tokens, self.grid = self.side**2, (self.side, self.side)
        half = channels // 2
        # Shallow and without normalization over the image, so that a token depends on its own pixels and few around them:
        # equal patches get equal tokens, which the generator can predict. (With residual blocks and GroupNorm here, the
        # reconstruction was the same, but the generator's accuracy on held-out digits fell from .41 to .32.)
        self.encoder = nn.Sequential(
            nn.Conv2d(3, half, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(half, channels, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels, codebook_dim, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(codebook_dim, channels, 1),
            ResidualBlock(channels),
            nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1),
            ResidualBlock(channels),
            nn.ConvTranspose2d(channels, half, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(half, 3, 3, padding=1),
        )
        self.codes: Tensor
        self.register_buffer("codes", torch.zeros(codebook_size, codebook_dim))

    @property
    def codebook(self) -> Tensor:
        return self.codes

    def encode_part(self, images: Tensor) -> Tensor:
        return self.nearest(self.latents(images)).view(len(images), self.num_tokens)

    def decode_part(self, ids: Tensor) -> Tensor:
        return self.pixels(self.codes[ids.flatten()], len(ids)).clamp(0, 1)

    def largest_tensor(self, image_size: int) -> int:
        return self.channels // 2 * image_size**2

    def latents(self, images: Tensor) -> Tensor:
        """The continuous latents, float [B * N, D], in raster order."""
        return self.encoder(images * 2 - 1).permute(0, 2, 3, 1).flatten(0, 2)

    def pixels(self, latents: Tensor, batch: int) -> Tensor:
        """The images, float [B, 3, S, S], not clamped, of latents [B * N, D]."""
        grid = latents.view(batch, self.side, self.side, -1).permute(0, 3, 1, 2)
        return (in_own_precision(self.decoder, grid) + 1) / 2

    def nearest(self, latents: Tensor) -> Tensor:
        """The index of the nearest code by Euclidean distance of each latent (float [L, D]), int64 [L]."""
        return nearest_code(latents, self.codes)

    def save(self, path: Path, training: dict[str, Any] | None = None) -> None:
        """Writes the weight file. training: the settings of its training, stored in the header."""
        codebook_size, codebook_dim = self.codes.shape
        architecture = {"codebook_size": codebook_size, "codebook_dim": codebook_dim, "channels": self.channels}
        write_weights(path, self, _FORMAT, {"image_size": self.image_size, **architecture}, training)

    @classmethod
    def from_file(cls, path: str) -> Self:
        sizes = ("image_size", "codebook_size", "codebook_dim", "channels")
        architecture, state = read_weights(path, _FORMAT, sizes, "tokenizer.weights")
        with torch.device("meta"):
            tokenizer = cls(**architecture)
        return fill(tokenizer, state, path, "tokenizer.weights")

    @classmethod
    @torch.no_grad()
    def untrained(cls, cfg: TokenizerConfig) -> Self:
        channels = cfg.training.channels if cfg.training else 64
        tokenizer = cls(cfg.image_size, cfg.codebook_size, cfg.codebook_dim, channels)
        # Codes near the latents of noise images: with random codes, all images would be assigned the same few.
        latents = tokenizer.latents(torch.rand(-(-cfg.codebook_size // tokenizer.num_tokens), 3, *[cfg.image_size] * 2))
        tokenizer.codes.copy_(latents[: cfg.codebook_size])
        return tokenizer


class CodeTracker:
    """Trains the codes by moving averages of the latents that are assigned to them."""

    def __init__(self, tokenizer: CompactTokenizer, decay: float, restart_below: float) -> None:
        self.codes, self.decay, self.restart_below = tokenizer.codes, decay, restart_below
        self.counts = torch.ones(len(self.codes), device=self.codes.device)
        self.sums = self.codes.clone()

    def initialize(self, latents: Tensor, generator: torch.Generator, iterations: int = 20) -> None:
        """Initializes the codes by k-means, starting at random latents (float [L, D], at least one per code)."""
        if len(latents) < len(self.codes):
            raise InputError(
                f"tokenizer.codebook_size={len(self.codes)}, but the training images give only {len(latents)} latents to "
                "initialize them. Use fewer codes or more images"
            )
        self.codes.copy_(
            latents[torch.randperm(len(latents), generator=generator)[: len(self.codes)].to(latents.device)]
        )
        for _ in range(iterations):
            assignment = torch.cdist(latents, self.codes).argmin(1)
            counts, sums = self._totals(latents, assignment)
            # A code without latents keeps its value.
            self.codes.copy_(torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), self.codes))
        self.counts.fill_(1.0)
        self.sums.copy_(self.codes)

    def update(self, latents: Tensor, assignment: Tensor, generator: torch.Generator) -> None:
        """One moving-average step with a batch's latents (float [L, D]) and their codes (int64 [L])."""
        counts, sums = self._totals(latents, assignment)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        dead = self.counts < self.restart_below
        chosen = torch.randint(len(latents), (len(self.codes),), generator=generator).to(latents.device)
        self.sums[dead] = latents[chosen][dead]
        self.counts[dead] = 1.0
        self.codes.copy_(self.sums / self.counts[:, None])

    def _totals(self, latents: Tensor, assignment: Tensor) -> tuple[Tensor, Tensor]:
        chosen = F.one_hot(assignment, len(self.codes)).to(latents.dtype)
        return chosen.sum(0), chosen.T @ latents

    def state_dict(self) -> dict[str, Tensor]:
        return {"counts": self.counts, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.counts.copy_(state["counts"])
        self.sums.copy_(state["sums"])


def build(cfg: TokenizerConfig) -> CompactTokenizer:
    """An untrained tokenizer with the config's sizes. Raises InputError when these are inconsistent."""
    assert cfg.training is not None
    tokenizer = CompactTokenizer(cfg.image_size, cfg.codebook_size, cfg.codebook_dim, cfg.training.channels)
    if tokenizer.num_tokens != cfg.num_tokens:
        raise InputError(
            f"tokenizer.num_tokens={cfg.num_tokens}, but an image of {cfg.image_size} pixels gives {tokenizer.num_tokens} "
            f"tokens. Set tokenizer.num_tokens={tokenizer.num_tokens}"
        )
    if cfg.grid is not None and (cfg.grid != [tokenizer.side, tokenizer.side] or cfg.prefix_tokens != 0):
        raise InputError(
            f"tokenizer.grid={cfg.grid} with tokenizer.prefix_tokens={cfg.prefix_tokens}, but the tokens of an image of "
            f"{cfg.image_size} pixels are a grid. Set tokenizer.grid=[{tokenizer.side},{tokenizer.side}] and "
            "tokenizer.prefix_tokens=0"
        )
    return tokenizer
