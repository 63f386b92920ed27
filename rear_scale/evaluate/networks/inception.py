"""The Inception network of 2015-12-05 that defines FID, with the parameter names of the published weight file.

Differences to later Inception V3 networks: average pooling excludes the padding, the last block uses max pooling, there are
1,008 outputs, and images are resized as by TensorFlow 1. The blocks are named as in Szegedy et al. 2015, arXiv:1512.00567.
"""

# B images, H and W their size in pixels

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rear_scale.evaluate.networks.weights import PublishedFile

INCEPTION = PublishedFile(
    "pt_inception-2015-12-05-6726825d.pth",
    "https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights",
    "6726825d",
)

INPUT_SIZE = 299  # pixels
POOL_FEATURES = 2048
NUM_LOGITS = 1008
_SPATIAL_CHANNELS = 7
SPATIAL_FEATURES = _SPATIAL_CHANNELS * 17 * 17


def resize_tf1(images: Tensor, size: int = INPUT_SIZE) -> Tensor:
    """Images float [B, C, size, size], resized from float [B, C, H, W] as by TensorFlow 1's ResizeBilinear.

    No half-pixel centres and no antialiasing: output pixel i is read at input position i * float32(in / out), computed in the
    precision of the images.
    """
    rows, row_weight = _source(images.shape[2], size, images)
    columns, column_weight = _source(images.shape[3], size, images)
    next_rows, next_columns = (rows + 1).clamp(max=images.shape[2] - 1), (columns + 1).clamp(max=images.shape[3] - 1)
    top, bottom = images[:, :, rows], images[:, :, next_rows]
    top = torch.lerp(top[..., columns], top[..., next_columns], column_weight)
    bottom = torch.lerp(bottom[..., columns], bottom[..., next_columns], column_weight)
    return torch.lerp(top, bottom, row_weight[:, None])


def _source(length: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The input position of each of `size` outputs among `length` inputs: the index of the input before it, and the fraction
    beyond that."""
    scale = (torch.tensor(length, dtype=torch.float32) / size).to(like.dtype)
    # Computed on the CPU: a GPU may fuse the product with later operations, which rounds positions differently.
    position = torch.arange(size, dtype=like.dtype) * scale
    before = position.floor()
    return before.long().to(like.device), (position - before).to(like.device)


_Size = int | tuple[int, int]  # (rows, columns), or one number for both


class _Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: _Size, stride: int = 1, padding: _Size = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _BlockA(nn.Module):
    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(inputs, 64, 1)
        self.branch5x5_1 = _Conv(inputs, 48, 1)
        self.branch5x5_2 = _Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, padding=1)
        self.branch_pool = _Conv(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        wide = self.branch5x5_2(self.branch5x5_1(x))
        return torch.cat([self.branch1x1(x), wide, double, self.branch_pool(_average(x))], 1)


class _BlockB(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class _BlockC(nn.Module):
    def __init__(self, inputs: int, middle: int) -> None:
        super().__init__()
        row, column = partial(_Conv, kernel=(1, 7), padding=(0, 3)), partial(_Conv, kernel=(7, 1), padding=(3, 0))
        self.branch1x1 = _Conv(inputs, 192, 1)
        self.branch7x7_1 = _Conv(inputs, middle, 1)
        self.branch7x7_2 = row(middle, middle)
        self.branch7x7_3 = column(middle, 192)
        self.branch7x7dbl_1 = _Conv(inputs, middle, 1)
        self.branch7x7dbl_2 = column(middle, middle)
        self.branch7x7dbl_3 = row(middle, middle)
        self.branch7x7dbl_4 = column(middle, middle)
        self.branch7x7dbl_5 = row(middle, 192)
        self.branch_pool = _Conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average(x))], 1)


class _BlockD(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(inputs, 192, 1)
        self.branch3x3_2 = _Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Conv(inputs, 192, 1)
        self.branch7x7x3_2 = _Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = _Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = _Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        long = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(long), F.max_pool2d(x, 3, 2)], 1)


class _BlockE(nn.Module):
    def __init__(self, inputs: int, pool_by_maximum: bool) -> None:
        super().__init__()
        self.pool_by_maximum = pool_by_maximum
        row, column = partial(_Conv, kernel=(1, 3), padding=(0, 1)), partial(_Conv, kernel=(3, 1), padding=(1, 0))
        self.branch1x1 = _Conv(inputs, 320, 1)
        self.branch3x3_1 = _Conv(inputs, 384, 1)
        self.branch3x3_2a = row(384, 384)
        self.branch3x3_2b = column(384, 384)
        self.branch3x3dbl_1 = _Conv(inputs, 448, 1)
        self.branch3x3dbl_2 = _Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = row(384, 384)
        self.branch3x3dbl_3b = column(384, 384)
        self.branch_pool = _Conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        split = [self.branch3x3_2a(single), self.branch3x3_2b(single)]
        split += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.pool_by_maximum else _average(x)
        return torch.cat([self.branch1x1(x), *split, self.branch_pool(pooled)], 1)


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b = _BlockA(192, pooled=32)
        self.Mixed_5c = _BlockA(256, pooled=64)
        self.Mixed_5d = _BlockA(288, pooled=64)
        self.Mixed_6a = _BlockB(288)
        self.Mixed_6b = _BlockC(768, middle=128)
        self.Mixed_6c = _BlockC(768, middle=160)
        self.Mixed_6d = _BlockC(768, middle=160)
        self.Mixed_6e = _BlockC(768, middle=192)
        self.Mixed_7a = _BlockD(768)
        self.Mixed_7b = _BlockE(1280, pool_by_maximum=False)
        self.Mixed_7c = _BlockE(2048, pool_by_maximum=True)
        self.fc = nn.Linear(POOL_FEATURES, NUM_LOGITS)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features [B, 2048] and spatial features [B, 2023] of images (uint8 [B, 3, H, W], RGB, 0..255).

        These are pool_3, used for FID, and the first seven channels of mixed_6/conv (after its ReLU), flattened with the
        channels last, used for sFID (Nash et al. 2021, arXiv:2103.03841), as in the ADM evaluation.
        """
        assert images.dtype == torch.uint8, images.dtype
        x = (resize_tf1(images.to(self.fc.weight.dtype)) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        spatial = self.Mixed_6d.branch1x1(x)[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))))
        return x.mean((2, 3)), spatial
