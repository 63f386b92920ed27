"""The interface of tokenizers. The generator gets token ids alone, and the objective token ids and the codebook."""

# B images, S side in pixels, N tokens of an image, K codes, D width of a code, L latents of a batch

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from rear_scale.config import TokenizerConfig

# The most elements of one tensor: on a GPU far below 2^31, where kernels of convolutions, norms and interpolation switch to
# 64-bit indices or fail; on a CPU just below it, so that whole batches are computed in one call and round alike.
_MOST_ELEMENTS = {"cuda": 2**29, "cpu": 2**31 - 1}
# The fraction of a GPU's memory for the tensors of one part. The rest is for sampling the next batch and extracting features.
_MEMORY_FRACTION = 0.1
_LARGEST_AT_ONCE = 6  # tensors of the largest size that a block of convolutions holds at one time


class Tokenizer(nn.Module, ABC):
    """A frozen encoder and decoder with a codebook between them."""

    name: ClassVar[str]
    published: ClassVar[str | None] = (
        None  # name and source of the official weight file; None = trained by this project
    )
    unit_codebook: ClassVar[bool] = False  # whether the rows of `codebook` have length 1
    decoding: ClassVar[tuple[str, ...]] = ("decoder",)  # the modules of the decoder, which may run in bfloat16
    image_size: int  # S
    num_tokens: int  # N
    grid: tuple[int, int] | None = (
        None  # rows and columns of the tokens after the prefix, in raster order; None = a sequence
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
        """The token ids, int64 [B, N], of images (float [B, 3, S, S] in [0, 1]). Codes are assigned in float32."""

    @abstractmethod
    def decode(self, ids: Tensor) -> Tensor:
        """The images, float32 [B, 3, S, S] in [0, 1], of token ids (int64 [B, N])."""

    def use_channels_last(self) -> None:
        """Stores the weights of convolutions with their channels last in memory."""
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks this argument

    def decode_in_bfloat16(self) -> None:
        """Converts the weights of the decoder to bfloat16, so that it computes in bfloat16. The codebook stays in float32."""
        for name in self.decoding:
            getattr(self, name).bfloat16()

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """The embedding of each code, float32 [K, D], in the form that the reAR heads are trained to predict."""


class PartwiseTokenizer(Tokenizer):
    """A tokenizer that encodes and decodes a batch in parts that fit the memory of its device.

    The size of a part depends only on the type of the device and its total memory, so that the same batch always rounds
    alike.
    """

    def encode(self, images: Tensor) -> Tensor:
        return self._in_parts(self.encode_part, images, images.shape[-1])

    def decode(self, ids: Tensor) -> Tensor:
        return self._in_parts(self.decode_part, ids, self.image_size)

    @abstractmethod
    def encode_part(self, images: Tensor) -> Tensor:
        """As `encode`, for a part of a batch."""

    @abstractmethod
    def decode_part(self, ids: Tensor) -> Tensor:
        """As `decode`, for a part of a batch."""

    @abstractmethod
    def largest_tensor(self, image_size: int) -> int:
        """The number of elements of the largest tensor in encoding or decoding one image of that side."""

    def _in_parts(self, function: Callable[[Tensor], Tensor], batch: Tensor, image_size: int) -> Tensor:
        count = -(-len(batch) // images_at_once(self.largest_tensor(image_size), batch.device))
        if count <= 1:
            return function(batch)
        return torch.cat([function(part) for part in batch.split(-(-len(batch) // count))])


def images_at_once(largest_tensor: int, device: torch.device) -> int:
    """The number of images in one part of a batch; on a GPU a power of two.

    largest_tensor: elements of the largest tensor per image.
    """
    most = max(1, _MOST_ELEMENTS.get(device.type, _MOST_ELEMENTS["cpu"]) // largest_tensor)
    if device.type != "cuda":
        return most
    memory = torch.cuda.get_device_properties(device).total_memory
    most = min(most, int(_MEMORY_FRACTION * memory) // (4 * _LARGEST_AT_ONCE * largest_tensor))
    return 1 << max(0, most.bit_length() - 1)


def in_own_precision(module: nn.Module, x: Tensor) -> Tensor:
    """The output of a module for x, as float32, computed in the precision of the module's weights."""
    return module(x.to(next(module.parameters()).dtype)).float()


def nearest_code(latents: Tensor, codes: Tensor) -> Tensor:
    """The index of the nearest code (codes: float [K, D]) by Euclidean distance of each latent (float [L, D]), int64 [L].

    Computed in float32 whatever the precision of the encoder, because distances in bfloat16 have many ties.
    """
    with torch.autocast(latents.device.type, enabled=False):
        latents, codes = latents.float(), codes.float()
        # |x|^2 is the same for every code and is left out.
        return (codes.square().sum(1) - 2 * latents @ codes.T).argmin(1)


def to_unit_range(pixels: Tensor) -> Tensor:
    """The images, float32 [B, 3, S, S] in [0, 1], of pixels (uint8 [B, S, S, 3])."""
    return pixels.permute(0, 3, 1, 2).float().div(255)
