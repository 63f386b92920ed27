"""TiTok-B64: an image as 64 tokens without a grid, from a vision transformer with learned queries.

Yu et al. 2024, arXiv:2406.07550; the released two-stage model, whose decoder predicts probabilities of MaskGIT-VQGAN codes,
from which the decoder of that VQGAN makes the pixels. Parameter names are those of the published file.
"""

# B images, S side in pixels, N tokens of an image, K codes, D width of a code, V codes of the pixel decoder,
# h side of the patch grid

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rear_scale.config import TokenizerConfig
from rear_scale.tokenizer import vit
from rear_scale.tokenizer.base import PartwiseTokenizer, in_own_precision, nearest_code
from rear_scale.tokenizer.maskgit_vqgan import Codebook, Decoder, check_fixed_size
from rear_scale.weight_file import load_published

_IMAGE_SIZE, _PATCH = 256, 16
_GRID = _IMAGE_SIZE // _PATCH
_DEPTH, _WIDTH, _HEADS = 12, 768, 12  # ViT-B on both sides
_PIXEL_CODES, _PIXEL_DIM = 1024, 256  # of the MaskGIT-VQGAN that decodes to pixels


class Encoder(nn.Module):
    """A vision transformer from image patches and learned queries to latents."""

    def __init__(self, num_tokens: int, codebook_dim: int) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(1, _WIDTH))
        self.positional_embedding = nn.Parameter(torch.zeros(_GRID**2 + 1, _WIDTH))
        self.latent_token_positional_embedding = nn.Parameter(torch.zeros(num_tokens, _WIDTH))
        self.patch_embed = nn.Conv2d(3, _WIDTH, _PATCH, stride=_PATCH)
        self.ln_pre = nn.LayerNorm(_WIDTH)
        self.transformer = vit.blocks(_DEPTH, _WIDTH, _HEADS)
        self.ln_post = nn.LayerNorm(_WIDTH)
        self.conv_out = nn.Conv2d(_WIDTH, codebook_dim, 1)

    def forward(self, images: Tensor, queries: Tensor) -> Tensor:
        """The latents, float [B, D, 1, N], of images (float [B, 3, S, S] in [0, 1]); queries: float [N, width]."""
        count = len(images)
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(count, 1, -1), patches], 1) + self.positional_embedding
        latents = (queries + self.latent_token_positional_embedding).expand(count, -1, -1)
        x = self.ln_pre(torch.cat([x, latents], 1))
        for block in self.transformer:
            x = block(x)
        latents = self.ln_post(x[:, -len(queries) :])
        # Reshaped, not transposed, which mixes channels and tokens: the published code does so, and the weights were trained
        # that way.
        return self.conv_out(latents.reshape(count, _WIDTH, len(queries), 1)).reshape(count, -1, 1, len(queries))


class Decoder1d(nn.Module):
    """A vision transformer from code embeddings to probabilities of the pixel decoder's codes."""

    def __init__(self, num_tokens: int, codebook_dim: int) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(1, _WIDTH))
        self.positional_embedding = nn.Parameter(torch.zeros(_GRID**2 + 1, _WIDTH))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, _WIDTH))
        self.latent_token_positional_embedding = nn.Parameter(torch.zeros(num_tokens, _WIDTH))
        self.decoder_embed = nn.Linear(codebook_dim, _WIDTH)
        self.ln_pre = nn.LayerNorm(_WIDTH)
        self.transformer = vit.blocks(_DEPTH, _WIDTH, _HEADS)
        self.ln_post = nn.LayerNorm(_WIDTH)
        self.ffn = nn.Sequential(
            nn.Conv2d(_WIDTH, 2 * _WIDTH, 1), nn.Tanh(), nn.Conv2d(2 * _WIDTH, _PIXEL_CODES, 1)
        )  # fmt: skip

    def forward(self, embeddings: Tensor) -> Tensor:
        """The logits, float [B, V, h, h], over the pixel decoder's codes, of code embeddings (float [B, N, D])."""
        count = len(embeddings)
        masks = self.mask_token.expand(count, _GRID**2, -1)
        x = torch.cat([self.class_embedding.expand(count, 1, -1), masks], 1) + self.positional_embedding
        latents = self.decoder_embed(embeddings) + self.latent_token_positional_embedding
        x = self.ln_pre(torch.cat([x, latents], 1))
        for block in self.transformer:
            x = block(x)
        x = self.ln_post(x[:, 1 : 1 + _GRID**2])
        return self.ffn(x.transpose(1, 2).unflatten(2, (_GRID, _GRID)))


class TiTok(PartwiseTokenizer):
    """The TiTok-B64 tokenizer. ids [B, 64], which have no position in the image."""

    name: ClassVar[str] = "titok_b64"
    published: ClassVar[str] = (
        "tokenizer_titok_b64.bin, on Hugging Face in fun-research/TiTok "
        "(or model.safetensors of yucornetto/tokenizer_titok_b64_imagenet)"
    )
    unit_codebook: ClassVar[bool] = True
    decoding: ClassVar[tuple[str, ...]] = ("decoder", "pixel_decoder")
    image_size = _IMAGE_SIZE
    grid = None

    def __init__(self, codebook_size: int = 4096, codebook_dim: int = 12, num_tokens: int = 64) -> None:
        super().__init__()
        self.codebook_size, self.num_tokens = codebook_size, num_tokens
        self.latent_tokens = nn.Parameter(torch.zeros(num_tokens, _WIDTH))
        self.encoder = Encoder(num_tokens, codebook_dim)
        self.decoder = Decoder1d(num_tokens, codebook_dim)
        self.quantize = Codebook(codebook_size, codebook_dim)
        self.pixel_quantize = Codebook(_PIXEL_CODES, _PIXEL_DIM)
        self.pixel_decoder = Decoder(channels=128, multipliers=(1, 1, 2, 2, 4), blocks=2, codebook_dim=_PIXEL_DIM)

    @classmethod
    def from_file(cls, path: str) -> Self:
        with torch.device("meta"):
            tokenizer = cls()
        return load_published(tokenizer, path, "tokenizer.weights", cls.published, rename=own_name)

    @classmethod
    def untrained(cls, cfg: TokenizerConfig) -> Self:
        check_fixed_size(cls.name, cfg, cls.image_size)
        tokenizer = cls(cfg.codebook_size, cfg.codebook_dim, cfg.num_tokens)
        nn.init.normal_(tokenizer.latent_tokens)
        return tokenizer

    @property
    def codebook(self) -> Tensor:
        """The code embeddings, float32 [K, D], each of length 1: latents and codes are compared on the unit sphere."""
        return F.normalize(self.quantize.embedding.weight, dim=1)

    def latents(self, images: Tensor) -> Tensor:
        """The latents before normalization and quantization, float [B, D, 1, N], of images (float [B, 3, S, S] in [0, 1])."""
        return self.encoder(images, self.latent_tokens)

    def encode_part(self, images: Tensor) -> Tensor:
        latents = self.latents(images).float().flatten(2).transpose(1, 2)
        return nearest_code(F.normalize(latents, dim=2).flatten(0, 1), self.codebook).view(len(images), -1)

    def logits(self, ids: Tensor) -> Tensor:
        """The logits, float [B, V, h, h], over the pixel decoder's codes, of token ids (int64 [B, N])."""
        return in_own_precision(self.decoder, self.codebook[ids])

    def soft_embeddings(self, logits: Tensor) -> Tensor:
        """The mean code embeddings, float [B, 256, h, h], of the pixel decoder, weighted by probability."""
        return torch.einsum("bvhw,vd->bdhw", logits.softmax(1), self.pixel_quantize.embedding.weight)

    def pixels(self, ids: Tensor) -> Tensor:
        """The images, float [B, 3, S, S], not clamped, of token ids (int64 [B, N])."""
        return in_own_precision(self.pixel_decoder, self.soft_embeddings(self.logits(ids)))

    def decode_part(self, ids: Tensor) -> Tensor:
        return self.pixels(ids).clamp(0, 1)

    def largest_tensor(self, image_size: int) -> int:
        return self.pixel_decoder.conv_out.in_channels * image_size**2


def own_name(published: str) -> str:
    """The parameter name in this code of a published name, which uses torch.nn.MultiheadAttention's names."""
    return published.replace("attn.in_proj_", "attn.in_proj.")
