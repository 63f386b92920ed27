"""Rounding of float images to uint8, by a named rule, because published scores depend on it."""

# B images, S side in pixels

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rear_scale.config.schema import UINT8_ROUNDINGS


def to_uint8(images: Tensor, rule: str) -> np.ndarray:
    """Images uint8 [B, S, S, 3] from float images [B, 3, S, S], which are clamped to [0, 1].

    truncate: x * 255 rounded towards 0, as in the released samplers; nearest: to the nearest level.
    """
    assert rule in UINT8_ROUNDINGS, rule
    levels = images.clamp(0, 1) * 255
    levels = levels.round() if rule == "nearest" else levels
    return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
