"""Schedules of the guidance scale. Guided logits = uncond + (cond - uncond) * scale."""

from __future__ import annotations

import math

from rear_scale.config import GuidanceConfig


def guidance_scale(step: int, num_tokens: int, guidance: GuidanceConfig) -> float:
    """The guidance scale at a token (step 0 .. num_tokens - 1); 1 = no guidance.

    power_cosine: from 1 to almost `scale` (Zheng et al. 2023, arXiv:2306.09305, as in the released samplers); linear: from 1
    to almost 1 + `scale`, as in MaskGIT's sampler, so that a scale of 0 means no guidance; constant: `scale`.
    """
    progress = step / num_tokens
    if guidance.schedule == "constant":
        return guidance.scale
    if guidance.schedule == "linear":
        return 1 + guidance.scale * progress
    return 1 + (guidance.scale - 1) * 0.5 * (1 - math.cos(math.pi * progress**guidance.power))
