"""Schedules of noise and permutation as pure functions of the step. Steps count from 1; step 1 is the first update."""

from __future__ import annotations


def linear_decay(step: int, maximum: float, start_step: int, end_step: int) -> float:
    """The value at a step: `maximum` until `start_step` updates are done, then decreasing linearly to 0 at `end_step`.

    For the largest noise rate f(t) with start 0 and end 3/4 of the run this is reAR's max(0, 1 - 4t/3) (section 4.3); for the
    probability of a permutation it is RAR Eq. 5. At update `step`, t is the step - 1 updates before it.
    """
    done = step - 1
    if done <= start_step and done < end_step:
        return maximum
    if done >= end_step:
        return 0.0
    return maximum * (end_step - done) / (end_step - start_step)
