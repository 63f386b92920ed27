"""Learning rates as pure functions of the step. Steps count from 1; step 1 is the first update."""

from __future__ import annotations

import math


def learning_rate(
    step: int, *, peak: float, end: float, warmup_steps: int, total_steps: int, form: str = "paper"
) -> float:
    """The learning rate at a step: linear warm-up to `peak`, then a cosine to `end`.

    paper: `peak` at step `warmup_steps`, `end` at the last step and after it. released: one step behind, so that the first
    update has rate 0; after the last step the cosine rises again.
    """
    done = step - 1 if form == "released" else step
    if done <= warmup_steps and warmup_steps > 0:
        return peak * done / warmup_steps
    progress = (done - warmup_steps) / max(1, total_steps - warmup_steps)
    if form == "paper":
        progress = min(1.0, progress)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * progress))
