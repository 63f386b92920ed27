"""What every tokenizer offers. The generator never sees pixels; the objective sees the codebook only."""

# B images, S side in pixels, N tokens of an image, K codes, D width of a code, L latents of a batch

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from rear_scale.config import TokenizerConfig

# Elements of one tensor: on a GPU far below the 2^31 at which kernels of convolutions, norms and interpolation change to
# 64-bit indices or fail; on a CPU just below, so that batches which fit are rounded as one.
_MOST_ELEMENTS = {"cuda": 2**29, "cpu": 2**31 - 1}
# Of a GPU's memory, for the tensors of one part: beside it, the next batch is drawn and features are extracted.
_MEMORY_SHARE = 0.1
_LARGEST_AT_ONCE = 6  # tensors of the largest size that are there at one time in a block of convolutions


class Tokenizer(nn.Module, ABC):
    """A frozen pair of encoder and decoder around a codebook."""

    name: ClassVar[str]
    published: ClassVar[str | None] = None  # name and place of the official weight file; null = weights of our own
    unit_codebook: ClassVar[bool] = False  # whether the rows of `codebook` have length 1
    decoding: ClassVar[tuple[str, ...]] = ("decoder",)  # the modules that decode, which may run in bfloat16
    image_size: int  # S
    num_tokens: int  # N
    grid: tuple[int, int] | None = (
        None  # rows and columns of the tokens behind the prefix, in raster order; None = a sequence
    )
    prefix_tokens: int = 0  # tokens before the grid
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
        """Images float32 [B, 3, S, S] in [0, 1] of token ids (int64 [B, N])."""

    def decode_in_bfloat16(self) -> None:
        """Rounds the weights of the decoder to bfloat16, in which it then computes. The codebook stays in float32."""
        for name in self.decoding:
            getattr(self, name).bfloat16()

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """The embedding of each code as the reAR heads are taught it, float32 [K, D]."""


class PartwiseTokenizer(Tokenizer):
    """A tokenizer that encodes and decodes a batch in parts that fit the memory of its device.

    The size of a part depends on the kind of device and its whole memory alone, so that the same batch is always rounded
    alike.
    """

    def encode(self, images: Tensor) -> Tensor:
        return self._in_parts(self.encode_part, images, images.shape[-1])

    def decode(self, ids: Tensor) -> Tensor:
        return self._in_parts(self.decode_part, ids, self.image_size)

    @abstractmethod
    def encode_part(self, images: Tensor) -> Tensor:
        """As `encode`, at once."""

    @abstractmethod
    def decode_part(self, ids: Tensor) -> Tensor:
        """As `decode`, at once."""

    @abstractmethod
    def largest_tensor(self, image_size: int) -> int:
        """Elements of the largest tensor that encoding or decoding an image of that side makes."""

    def _in_parts(self, function: Callable[[Tensor], Tensor], batch: Tensor, image_size: int) -> Tensor:
        count = -(-len(batch) // images_at_once(self.largest_tensor(image_size), batch.device))
        if count <= 1:
            return function(batch)
        return torch.cat([function(part) for part in batch.split(-(-len(batch) // count))])


def images_at_once(largest_tensor: int, device: torch.device) -> int:
    """Images of one part of a batch, of which each makes a tensor of so many elements; on a GPU a power of two."""
    most = max(1, _MOST_ELEMENTS.get(device.type, _MOST_ELEMENTS["cpu"]) // largest_tensor)
    if device.type != "cuda":
        return most
    memory = torch.cuda.get_device_properties(device).total_memory
    most = min(most, int(_MEMORY_SHARE * memory) // (4 * _LARGEST_AT_ONCE * largest_tensor))
    return 1 << max(0, most.bit_length() - 1)


def in_own_precision(module: nn.Module, x: Tensor) -> Tensor:
    """float32 output of a module for x, computed in the precision of its weights."""
    return module(x.to(next(module.parameters()).dtype)).float()


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
