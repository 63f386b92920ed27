"""DINOv2's ViT-L/14, whose class token gives the features of FD-DINOv2.

Oquab et al. 2023, arXiv:2304.07193; the distance: Stein et al. 2023, arXiv:2306.04675, with the preprocessing of EDM2
(Karras et al. 2024, arXiv:2312.02696): antialiased bicubic to 224 pixels without a second rounding to uint8.
"""

# B images, H and W their size in pixels, T patches and the class token, D width

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rear_scale.evaluate.networks.base import as_batch, checked, exact_arithmetic, for_inference
from rear_scale.evaluate.networks.weights import PublishedFile, fill, read_weight_file

DINOV2_VITL14 = PublishedFile(
    "dinov2_vitl14_pretrain.pth",
    "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    None,
)

INPUT_SIZE = 224  # pixels
_TRAINED_GRID = 37  # patches per side of the position table
# The published code adds this offset to the grid size when it resizes the table; without it all positions shift slightly.
_GRID_OFFSET = 0.1
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width, num_heads)
        self.ls1 = _Scale(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.ls2 = _Scale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))


class DinoV2(nn.Module):
    """DINOv2's vision transformer, with the parameter names of the published weight file."""

    def __init__(self, width: int = 1024, depth: int = 24, num_heads: int = 16, patch: int = 14) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + _TRAINED_GRID**2, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, stride=patch)})
        self.blocks = nn.ModuleList(_Block(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """The class token [B, D] of images (uint8 [B, 3, H, W], RGB)."""
        assert images.dtype == torch.uint8, images.dtype
        pixels = F.interpolate(images.to(self.norm.weight.dtype), (INPUT_SIZE,) * 2, mode="bicubic", antialias=True)
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (_MEAN, _STD))
        grid = self.patch_embed["proj"]((pixels / 255 - mean) / std)
        x = torch.cat([self.cls_token.expand(len(grid), -1, -1), grid.flatten(2).transpose(1, 2)], 1)
        x = x + self.positions(grid.shape[2])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]

    def positions(self, side: int) -> Tensor:
        """The position table [1, 1 + side * side, D], resized to a grid of `side` x `side` patches."""
        table = self.pos_embed[:, 1:].unflatten(1, (_TRAINED_GRID, _TRAINED_GRID)).permute(0, 3, 1, 2)
        scale = (side + _GRID_OFFSET) / _TRAINED_GRID
        table = F.interpolate(table, scale_factor=(scale, scale), mode="bicubic", antialias=False)
        assert table.shape[2:] == (side, side), table.shape
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).transpose(1, 2)], 1)


class DinoV2Features:
    """The extractor of FD-DINOv2. Raises InputError for a missing or damaged weight file, or one of another network."""

    name = "dinov2"
    sizes: ClassVar = {"cls": 1024}

    def __init__(self, path: str | None, device: torch.device) -> None:
        weights = read_weight_file(path, "evaluate.dinov2_weights", DINOV2_VITL14)
        network = DinoV2()
        fill(network, weights.state, f"evaluate.dinov2_weights={path}")
        self.network = for_inference(network, device)
        self.device = device
        self.weights_sha256, self.is_published = weights.sha256, weights.is_published
        self.identity = f"dinov2-vitl14 {weights.sha256} antialiased bicubic to 224 pixels, float32"

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """The feature `cls` (float32 [n, 1024]) of images (uint8 [n, H, W, 3])."""
        with exact_arithmetic(), torch.inference_mode():
            features = self.network(as_batch(images, self.device))
        return {"cls": checked("cls", features)}
