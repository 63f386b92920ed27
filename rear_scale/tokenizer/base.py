"""What every tokenizer offers. The generator never sees pixels; the objective sees the codebook only."""

# B images, S side in pixels, N tokens of an image, K codes, D width of a code

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Self

from torch import Tensor, nn


class Tokenizer(nn.Module, ABC):
    """A frozen pair of encoder and decoder around a codebook."""

    name: ClassVar[str]
    image_size: int  # S
    num_tokens: int  # N
    codebook_size: int  # K

    @classmethod
    @abstractmethod
    def from_file(cls, path: str) -> Self:
        """The tokenizer of a weight file. Raises InputError when the file is missing or not one of this tokenizer."""

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
