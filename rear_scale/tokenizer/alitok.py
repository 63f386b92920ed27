"""AliTok: 17 prefix tokens and a raster grid of 256 tokens, trained so that a token is predictable from those before it.

Wu et al. 2025, arXiv:2506.05289; the released second-stage model with its bidirectional decoder. Parameter names are those
of the published file.
"""

# B images, S side in pixels, N tokens of an image, K codes, D width of a code, h side of the patch grid, p side of a patch

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from rear_scale.config import TokenizerConfig
from rear_scale.tokenizer import vit
from rear_scale.tokenizer.base import PartwiseTokenizer, in_own_precision, nearest_code
from rear_scale.tokenizer.maskgit_vqgan import Codebook, check_fixed_size
from rear_scale.weight_file import load_published

_IMAGE_SIZE, _PATCH = 256, 16
_GRID = _IMAGE_SIZE // _PATCH
_REGISTERS = 32  # learned tokens at the start of the decoder's sequence
_ENCODER_DEPTH, _ENCODER_WIDTH, _ENCODER_HEADS = 12, 768, 12  # ViT-B
_DECODER_DEPTH, _DECODER_WIDTH, _DECODER_HEADS = 24, 1024, 16  # ViT-L


class Encoder(nn.Module):
    """A vision transformer from image patches and learned queries to latents."""

    def __init__(self, num_tokens: int, codebook_dim: int) -> None:
        super().__init__()
        width = _ENCODER_WIDTH
        self.positional_embedding = nn.Parameter(torch.zeros(_GRID**2, width))
        self.latent_token_positional_embedding = nn.Parameter(torch.zeros(num_tokens, width))
        self.patch_embed = nn.Conv2d(3, width, _PATCH, stride=_PATCH)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = vit.blocks(_ENCODER_DEPTH, width, _ENCODER_HEADS)
        self.ln_post = nn.LayerNorm(width)
        self.conv_out = nn.Conv2d(width, codebook_dim, 1)

    def forward(self, images: Tensor, queries: Tensor) -> Tensor:
        """The latents, float [B, D, 1, N], of images (float [B, 3, S, S] in [0, 1]); queries: float [N, width]."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2) + self.positional_embedding
        latents = (queries + self.latent_token_positional_embedding).expand(len(images), -1, -1)
        x = self.ln_pre(torch.cat([patches, latents], 1))
        for block in self.transformer:
            x = block(x)
        return self.conv_out(self.ln_post(x[:, -len(queries) :]).transpose(1, 2)[:, :, None])


class Decoder(nn.Module):
    """A vision transformer from code embeddings to image patches."""

    def __init__(self, num_tokens: int, codebook_dim: int) -> None:
        super().__init__()
        width = _DECODER_WIDTH
        self.class_embedding = nn.Parameter(torch.zeros(_REGISTERS, width))
        self.latent_token_positional_embedding = nn.Parameter(torch.zeros(_REGISTERS + num_tokens, width))
        self.decoder_embed = nn.Linear(codebook_dim, width)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = vit.blocks(_DECODER_DEPTH, width, _DECODER_HEADS)
        self.ln_post = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Conv2d(width, _PATCH**2 * 3, 1))
        self.conv_out = nn.Conv2d(3, 3, 1)

    def forward(self, embeddings: Tensor) -> Tensor:
        """The images, float [B, 3, S, S] in (0, 1), of code embeddings (float [B, N, D])."""
        registers = self.class_embedding.expand(len(embeddings), -1, -1)
        x = torch.cat([registers, self.decoder_embed(embeddings)], 1) + self.latent_token_positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer:
            x = block(x)
        # The grid's tokens come last and give one patch each; the prefix is context.
        x = self.ln_post(x[:, -(_GRID**2) :])
        x = self.ffn(x.transpose(1, 2).unflatten(2, (_GRID, _GRID)))
        x = x.unflatten(1, (_PATCH, _PATCH, 3)).permute(0, 3, 4, 1, 5, 2)  # [B, 3, h, p, h, p]
        return self.conv_out(x.flatten(4, 5).flatten(2, 3)).sigmoid()


class AliTok(PartwiseTokenizer):
    """The AliTok tokenizer. ids [B, 273]: the 17 prefix tokens first, then the grid in raster order."""

    name: ClassVar[str] = "alitok"
    published: ClassVar[str] = "AliTok.pth, linked from the README of ali-vilab/alitok on GitHub"
    image_size = _IMAGE_SIZE

    def __init__(self, codebook_size: int = 4096, codebook_dim: int = 32, num_tokens: int = 273) -> None:
        super().__init__()
        self.codebook_size, self.num_tokens = codebook_size, num_tokens
        self.grid, self.prefix_tokens = (_GRID, _GRID), num_tokens - _GRID**2
        self.latent_tokens = nn.Parameter(torch.zeros(num_tokens, _ENCODER_WIDTH))
        self.encoder = Encoder(num_tokens, codebook_dim)
        self.decoder = Decoder(num_tokens, codebook_dim)
        self.quantize = Codebook(codebook_size, codebook_dim)

    @classmethod
    def from_file(cls, path: str) -> Self:
        with torch.device("meta"):
            tokenizer = cls()
        return load_published(tokenizer, path, "tokenizer.weights", cls.published)

    @classmethod
    def untrained(cls, cfg: TokenizerConfig) -> Self:
        check_fixed_size(cls.name, cfg, cls.image_size)
        tokenizer = cls(cfg.codebook_size, cfg.codebook_dim, cfg.num_tokens)
        nn.init.normal_(tokenizer.latent_tokens)
        return tokenizer

    @property
    def codebook(self) -> Tensor:
        """The code embeddings, float32 [K, D], not normalized: codes are compared by Euclidean distance."""
        return self.quantize.embedding.weight

    def latents(self, images: Tensor) -> Tensor:
        """The latents before quantization, float [B, D, 1, N], of images (float [B, 3, S, S] in [0, 1])."""
        return self.encoder(images, self.latent_tokens)

    def encode_part(self, images: Tensor) -> Tensor:
        latents = self.latents(images).flatten(2).transpose(1, 2)
        return nearest_code(latents.flatten(0, 1), self.codebook).view(len(images), -1)

    def decode_part(self, ids: Tensor) -> Tensor:
        return in_own_precision(self.decoder, self.codebook[ids])

    def largest_tensor(self, image_size: int) -> int:
        return 4 * _DECODER_WIDTH * (_REGISTERS + self.num_tokens)  # inside a feed-forward
