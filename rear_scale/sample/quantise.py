"""Float images to uint8, under a named rule: published figures depend on it."""

# B images, S side in pixels

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rear_scale.config.schema import QUANTISERS


def to_uint8(images: Tensor, rule: str) -> np.ndarray:
    """uint8 [B, S, S, 3] of images (float [B, 3, S, S] in [0, 1], clamped to it).

    trunc255: x * 255 cut off, as the released samplers do; round: to the nearest level.
    """
    assert rule in QUANTISERS, rule
    levels = images.clamp(0, 1) * 255
    levels = levels.round() if rule == "round" else levels
    return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
