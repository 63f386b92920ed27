"""Learning rates as pure functions of the step. Steps count from 1; step 1 is the first update."""

from __future__ import annotations

import math


def learning_rate(
    step: int,
    *,
    peak: float,
    end: float,
    warmup_steps: int,
    total_steps: int,
    form: str = "paper",
    decay_steps: int = 0,
    decay_form: str = "linear",
) -> float:
    """The learning rate at a step: linear warm-up to `peak`, then a cosine to `end`, or a constant rate and a decay to `end`.

    paper: `peak` at step `warmup_steps`, a cosine to `end` at the last step and after it. released: one step behind, so that the
    first update has rate 0; after the last step the cosine rises again. wsd: `peak` from step `warmup_steps` on, then over the
    last `decay_steps` steps to `end` by decay_form (`decayed`).
    """
    done = step - 1 if form == "released" else step
    if done <= warmup_steps and warmup_steps > 0:
        return peak * done / warmup_steps
    if form == "wsd":
        past = done - (total_steps - decay_steps)
        return peak if past <= 0 else end + (peak - end) * decayed(min(1.0, past / max(1, decay_steps)), decay_form)
    progress = (done - warmup_steps) / max(1, total_steps - warmup_steps)
    if form == "paper":
        progress = min(1.0, progress)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * progress))


def decayed(progress: float, form: str) -> float:
    """The fraction of the way from the last rate to the peak that is left at a fraction `progress` of the decay: 1 at 0, 0 at 1.

    one_minus_sqrt: 1 - sqrt(progress) of Hägele et al. 2024, arXiv:2405.18392, section 4.1; linear: 1 - progress.
    """
    return 1 - math.sqrt(progress) if form == "one_minus_sqrt" else 1 - progress
