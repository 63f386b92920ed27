"""How a model is spread over ranks. The training loop sees the interface of strategy.py and never an engine."""

from __future__ import annotations

from rear_scale.config import ExperimentConfig, Plan
from rear_scale.parallel.strategy import Strategy
from rear_scale.world import World


def open_strategy(cfg: ExperimentConfig, plan: Plan, world: World) -> Strategy:
    """The strategy of a config, without a model yet. An engine is imported only when it is used."""
    if cfg.strategy.name in ("single", "ddp"):
        from rear_scale.parallel.ddp import DDPStrategy

        return DDPStrategy(cfg, plan, world)
    if cfg.strategy.name in ("fsdp2", "hsdp"):
        from rear_scale.parallel.fsdp import FSDPStrategy

        return FSDPStrategy(cfg, plan, world)
    from rear_scale.parallel.deepspeed import DeepSpeedStrategy

    return DeepSpeedStrategy(cfg, plan, world)
