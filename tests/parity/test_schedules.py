"""Schedules against the released ones, sampled at their steps. A released step counts the updates that are done."""

from __future__ import annotations

import numpy as np
import pytest

from rear_scale.config import GuidanceConfig
from rear_scale.objective import schedules
from rear_scale.optim import schedule
from rear_scale.sample.guidance import guidance_scale


def check(case, compare, name: str, found: list[float], tolerance: float) -> None:
    expected = case.arrays[name]
    scale = np.maximum(np.abs(expected), 1e-12)
    compare(name, np.asarray(found) / scale, expected / scale, tolerance)


def test_learning_rates(case, compare) -> None:
    for name, values in case.json.get("lr", {}).items():
        steps = case.arrays[f"lr/{name}/steps"].tolist()
        settings = {
            "peak": values["base_lr"],
            "end": values["end_lr"],
            "warmup_steps": values["warmup_steps"],
            "total_steps": values["total_steps"],
        }
        released = [schedule.learning_rate(done + 1, form="released", **settings) for done in steps]
        check(case, compare, f"lr/{name}/value_f64", released, 1e-9)
        # The paper's form is the same curve one step earlier, up to its end.
        for done in steps:
            if 0 < done <= values["total_steps"]:
                ours = schedule.learning_rate(done, **settings)
                assert ours == pytest.approx(schedule.learning_rate(done + 1, form="released", **settings), rel=1e-12)


@pytest.mark.parametrize("family", ["rear_noise_ratio", "rar_permutation_ratio"])
def test_linear_decay_bounds(case, compare, family: str) -> None:
    for name, values in case.json.get(family, {}).items():
        steps = case.arrays[f"{family}/{name}/steps"].tolist()
        found = [schedules.linear_decay(done + 1, 1.0, values["anneal_start"], values["anneal_end"]) for done in steps]
        compare(f"{family}/{name}", found, case.arrays[f"{family}/{name}/value_f64"], 1e-9)


def test_power_cosine_guidance(case, compare) -> None:
    for name, values in case.json.get("cfg_power_cosine", {}).items():
        guidance = GuidanceConfig("power_cosine", values["guidance_scale"], values["guidance_scale_pow"])
        steps = case.arrays[f"cfg_power_cosine/{name}/steps"].tolist()
        found = [guidance_scale(step, values["steps_total"], guidance) for step in steps]
        check(case, compare, f"cfg_power_cosine/{name}/value_f64", found, 2e-6)


def test_linear_guidance(case, compare) -> None:
    for values in filter(None, [case.json.get("cfg_linear")]):
        guidance = GuidanceConfig("linear", values["guidance_scale"])
        found = [guidance_scale(step, values["steps_total"], guidance) for step in range(values["steps_total"])]
        check(case, compare, "cfg_linear/w_f64", [scale - 1 for scale in found], 2e-6)
