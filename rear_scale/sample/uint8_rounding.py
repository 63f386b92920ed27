"""Conversion of float images to uint8 by a named rounding rule: published scores depend on it."""

# B images, S side in pixels

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rear_scale.config.schema import UINT8_ROUNDINGS


def to_uint8(images: Tensor, rule: str) -> np.ndarray:
    """uint8 [B, S, S, 3] of images (float [B, 3, S, S] in [0, 1], clamped to it).

    truncate: x * 255 rounded towards 0, as the released samplers do; nearest: to the nearest level.
    """
    assert rule in UINT8_ROUNDINGS, rule
    levels = images.clamp(0, 1) * 255
    levels = levels.round() if rule == "nearest" else levels
    return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
