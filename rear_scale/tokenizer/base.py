"""What every tokenizer offers. The generator never sees pixels; the objective sees the codebook only."""

# B images, S side in pixels, N tokens of an image, K codes, D width of a code, L latents of a batch

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from rear_scale.config import TokenizerConfig


class Tokenizer(nn.Module, ABC):
    """A frozen pair of encoder and decoder around a codebook."""

    name: ClassVar[str]
    published: ClassVar[str | None] = None  # name and place of the official weight file; null = weights of our own
    unit_codebook: ClassVar[bool] = False  # whether the rows of `codebook` have length 1
    image_size: int  # S
    num_tokens: int  # N
    codebook_size: int  # K

    @classmethod
    @abstractmethod
    def from_file(cls, path: str) -> Self:
        """The tokenizer of a weight file. Raises InputError when the file is missing or not one of this tokenizer."""

    @classmethod
    @abstractmethod
    def untrained(cls, cfg: TokenizerConfig) -> Self:
        """A tokenizer of the config's sizes with random weights, for tests. Raises InputError for sizes it cannot have."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Token ids int64 [B, N] of images (float [B, 3, S, S] in [0, 1]). Codes are assigned in float32."""

    @abstractmethod
    def decode(self, ids: Tensor) -> Tensor:
        """Images float [B, 3, S, S] in [0, 1] of token ids (int64 [B, N])."""

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """The embedding of each code as the reAR heads are taught it, float32 [K, D]."""


def nearest_code(latents: Tensor, codes: Tensor) -> Tensor:
    """int64 [L]: the code (float [K, D]) at the smallest Euclidean distance of each latent (float [L, D]).

    In float32 whatever the encoder ran in: bfloat16 distances of a large codebook are full of ties.
    """
    with torch.autocast(latents.device.type, enabled=False):
        latents, codes = latents.float(), codes.float()
        # |x|^2 is the same for every code and is left out.
        return (codes.square().sum(1) - 2 * latents @ codes.T).argmin(1)


def to_unit_range(pixels: Tensor) -> Tensor:
    """float32 [B, 3, S, S] in [0, 1] of pixels (uint8 [B, S, S, 3])."""
    return pixels.permute(0, 3, 1, 2).float().div(255)
