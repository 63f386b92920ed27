"""Schedules as pure functions of the step. Steps count from 1; step 1 is the first update."""

from __future__ import annotations

import math


def learning_rate(step: int, *, peak: float, end: float, warmup_steps: int, total_steps: int) -> float:
    """Linear to `peak` at step `warmup_steps`, then a cosine that reaches `end` at the last step and stays there."""
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * progress))


def linear_noise(step: int, maximum: float, start_step: int, end_step: int) -> float:
    """The largest noise rate f(t): `maximum` until `start_step` updates are done, then linearly to 0 at `end_step`.

    With start 0 and end 3/4 of the run it is reAR's max(0, 1 - 4t/3) (section 4.3). Before update `step`, t counts the
    step - 1 updates that are done.
    """
    done = step - 1
    if done <= start_step and done < end_step:
        return maximum
    if done >= end_step:
        return 0.0
    return maximum * (end_step - done) / (end_step - start_step)
