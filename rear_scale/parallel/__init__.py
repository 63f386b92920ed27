"""Strategies: how a model is distributed over ranks. The training loop uses the interface of strategy.py, never an engine.

Imports only facts.py at the top level, because config/ reads its table and must not import torch's engines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rear_scale.parallel import facts

if TYPE_CHECKING:
    from rear_scale.config import ExperimentConfig, Plan
    from rear_scale.parallel.strategy import Strategy
    from rear_scale.world import World


def open_strategy(cfg: ExperimentConfig, plan: Plan, world: World) -> Strategy:
    """The Strategy object of a config, before `build`. Its engine (such as DeepSpeed) is imported here, not earlier."""
    return facts.engine_class(facts.of(cfg.strategy))(cfg, plan, world)
