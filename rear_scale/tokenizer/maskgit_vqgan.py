"""MaskGIT-VQGAN: a convolutional VQGAN without attention, one token per 16 x 16 pixels in raster order.

Chang et al. 2022, arXiv:2202.04200, as ported for TiTok, RAR and reAR. Parameter names are those of the published file.
"""

# B images, C channels, S side in pixels, h side of the token grid, N tokens of an image, K codes, D width of a code

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rear_scale.config import InputError, TokenizerConfig
from rear_scale.tokenizer.base import PartwiseTokenizer, in_own_precision, nearest_code
from rear_scale.weight_file import load_published

_GROUPS = 32


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_GROUPS, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two convolutions with group norms and a shortcut."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.norm2 = _norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.nin_shortcut = nn.Conv2d(channels, channels, 1, bias=False) if channels_in != channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        # Where the number of channels changes, the published code applies the shortcut to the block's output and drops the
        # input. The weights were trained that way.
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(h))


class DownLevel(nn.Module):
    """The blocks of one resolution of the encoder, then a halving of the resolution if asked for."""

    def __init__(self, channels_in: int, channels: int, blocks: int, halve: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(channels if n else channels_in, channels) for n in range(blocks))
        self.halve = halve

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return F.avg_pool2d(x, 2) if self.halve else x


class UpLevel(nn.Module):
    """The blocks of one resolution of the decoder, then a doubling of the resolution if asked for."""

    def __init__(self, channels_in: int, channels: int, blocks: int, double: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(channels if n else channels_in, channels) for n in range(blocks))
        self.upsample_conv = nn.Conv2d(channels, channels, 3, padding=1) if double else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self.upsample_conv is None else self.upsample_conv(F.interpolate(x, scale_factor=2.0))


class Encoder(nn.Module):
    """The convolutional encoder."""

    def __init__(self, channels: int, multipliers: Sequence[int], blocks: int, codebook_dim: int) -> None:
        super().__init__()
        widths = [channels * multiplier for multiplier in multipliers]
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.down = nn.ModuleList(
            DownLevel(before, width, blocks, halve=level < len(widths) - 1)
            for level, (before, width) in enumerate(zip([channels, *widths], widths, strict=False))
        )
        self.mid = nn.ModuleList(ResBlock(widths[-1], widths[-1]) for _ in range(blocks))
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], codebook_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        """The latents, float [B, D, h, h], of images (float [B, 3, S, S] in [0, 1])."""
        x = self.conv_in(images)
        for layer in (*self.down, *self.mid):
            x = layer(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """The convolutional decoder."""

    def __init__(self, channels: int, multipliers: Sequence[int], blocks: int, codebook_dim: int) -> None:
        super().__init__()
        widths = [channels * multiplier for multiplier in multipliers]
        self.conv_in = nn.Conv2d(codebook_dim, widths[-1], 3, padding=1)
        self.mid = nn.ModuleList(ResBlock(widths[-1], widths[-1]) for _ in range(blocks))
        # Levels are numbered as in the encoder, and applied from the last to the first.
        self.up = nn.ModuleList(
            UpLevel(before, width, blocks, double=level > 0)
            for level, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, embeddings: Tensor) -> Tensor:
        """The images, float [B, 3, S, S], not clamped, of code embeddings (float [B, D, h, h])."""
        x = self.conv_in(embeddings)
        for layer in (*self.mid, *reversed(self.up)):
            x = layer(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Codebook(nn.Module):
    """The code embeddings under their published parameter name."""

    def __init__(self, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, codebook_dim)


class MaskgitVqgan(PartwiseTokenizer):
    """The MaskGIT-VQGAN tokenizer. ids [B, (S/16)^2] in raster order, for images of any side that is a multiple of 16."""

    name: ClassVar[str] = "maskgit_vqgan"
    published: ClassVar[str] = "maskgit-vqgan-imagenet-f16-256.bin, on Hugging Face in fun-research/TiTok"
    image_size = 256

    def __init__(
        self,
        codebook_size: int = 1024,
        codebook_dim: int = 256,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
    ) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        side = self.image_size >> (len(multipliers) - 1)
        self.num_tokens, self.grid = side * side, (side, side)
        self.encoder = Encoder(channels, multipliers, blocks, codebook_dim)
        self.decoder = Decoder(channels, multipliers, blocks, codebook_dim)
        self.quantize = Codebook(codebook_size, codebook_dim)

    @classmethod
    def from_file(cls, path: str) -> Self:
        with torch.device("meta"):
            tokenizer = cls()
        return load_published(tokenizer, path, "tokenizer.weights", cls.published)

    @classmethod
    def untrained(cls, cfg: TokenizerConfig) -> Self:
        check_fixed_size(cls.name, cfg, cls.image_size)
        return cls(cfg.codebook_size, cfg.codebook_dim)

    @property
    def codebook(self) -> Tensor:
        """The code embeddings, float32 [K, D], not normalized: codes are compared by Euclidean distance."""
        return self.quantize.embedding.weight

    def latents(self, images: Tensor) -> Tensor:
        """The latents before quantization, float [B, D, h, h], of images (float [B, 3, S, S] in [0, 1])."""
        return self.encoder(images)

    def encode_part(self, images: Tensor) -> Tensor:
        latents = self.latents(images).permute(0, 2, 3, 1)
        return nearest_code(latents.flatten(0, 2), self.codebook).view(len(images), -1)

    def pixels(self, ids: Tensor) -> Tensor:
        """The images, float [B, 3, S, S], not clamped, of token ids (int64 [B, N]), a square grid of side S / 16."""
        side = next(side for side in range(1, ids.shape[1] + 1) if side * side >= ids.shape[1])
        return in_own_precision(self.decoder, self.codebook[ids].unflatten(1, (side, side)).permute(0, 3, 1, 2))

    def decode_part(self, ids: Tensor) -> Tensor:
        return self.pixels(ids).clamp(0, 1)

    def largest_tensor(self, image_size: int) -> int:
        return self.encoder.conv_in.out_channels * image_size**2


def check_fixed_size(name: str, cfg: TokenizerConfig, image_size: int) -> None:
    """Raises InputError unless the config has the one image size of a published tokenizer."""
    if cfg.image_size != image_size:
        raise InputError(
            f"tokenizer.image_size={cfg.image_size}, but {name} takes {image_size} pixels. "
            f"Set tokenizer.image_size={image_size}"
        )
