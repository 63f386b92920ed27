"""How a model is spread over ranks. The training loop sees the interface of strategy.py and never an engine.

Imports nothing at first: config/ reads the rows of facts.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rear_scale.parallel import facts

if TYPE_CHECKING:
    from rear_scale.config import ExperimentConfig, Plan
    from rear_scale.parallel.strategy import Strategy
    from rear_scale.world import World


def open_strategy(cfg: ExperimentConfig, plan: Plan, world: World) -> Strategy:
    """The strategy of a config, without a model yet. An engine is imported only when it is used."""
    return facts.engine_class(facts.of(cfg.strategy))(cfg, plan, world)
