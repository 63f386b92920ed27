"""Models of one config at several widths, and their training in this process, for studies of the width."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from rear_scale.config import ExperimentConfig, InputError, Plan
from rear_scale.config.validate import validate
from rear_scale.device import prepare, use_gpu, uses_cuda
from rear_scale.model import Generator, build_model
from rear_scale.model.attention import choose_kernel, use_kernel
from rear_scale.model.recompute import prepare_blocks
from rear_scale.objective import MicroBatch, Objective
from rear_scale.optim.parametrization import scale_initial_weights
from rear_scale.parallel import open_strategy
from rear_scale.parallel.strategy import Strategy
from rear_scale.world import Ranks, World

PARAMETRIZATIONS = ("standard", "mup")


def numbers_of(text: str, option: str) -> list[int]:
    """The increasing numbers of an option such as 64,128,256. Raises InputError for fewer than two, or others."""
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise InputError(f"{option}={text} is not a list of numbers. Use {option} 64,128,256")
    numbers = [int(word) for word in words]
    if len(numbers) < 2 or numbers[0] < 1 or numbers != sorted(set(numbers)):
        raise InputError(f"{option}={text} must be two or more increasing numbers. Use {option} 64,128,256")
    return numbers


def at_width(cfg: ExperimentConfig, width: int, parametrization: str, base_width: int) -> ExperimentConfig:
    """The config at another width. The feed-forward keeps its proportion, and the heads, whose number stays, grow with the width;
    an update is one micro-batch.

    Raises InputError for a width that the number of heads does not divide.
    """
    inner = cfg.model.mlp_width
    model = replace(
        cfg.model, width=width, mlp_width=None if inner is None else max(1, round(inner * width / cfg.model.width))
    )
    optim = replace(cfg.optim, parametrization=parametrization, base_width=base_width, base_num_heads=None)
    train = replace(cfg.train, micro_batch_size=cfg.train.global_batch_size)
    changed = replace(cfg, model=model, optim=optim, train=train)
    validate(changed)
    return changed


def world_of_one() -> World:
    """A world of this process alone, on the GPU if there is one."""
    prepare()
    return World(Ranks(0, 0, 1, 1, None, None, "single"), use_gpu(0) if uses_cuda() else torch.device("cpu"))


class SmallRun:
    """A model with fresh weights under strategy=single, one call per update. cfg: of strategy=single."""

    def __init__(self, cfg: ExperimentConfig, plan: Plan, codebook: Tensor, world: World) -> None:
        self.world = world
        self.model: Generator = build_model(cfg)
        use_kernel(self.model, choose_kernel(cfg.model.kernel, world.device, cfg.train.precision))
        self.model.set_codebook(codebook)
        self.model.init_weights(cfg.run.seed)
        scale_initial_weights(self.model, cfg)
        prepare_blocks(self.model, cfg, world.device)
        self.strategy: Strategy = open_strategy(cfg, plan, world)
        self.strategy.build(self.model)
        self.objective = Objective(cfg, plan, codebook, world.device)

    def update(self, batch: MicroBatch, step: int, lr: float) -> float:
        """The loss of a global batch in one micro-batch, whose update is applied with a learning rate. step: from 1."""
        batch = batch.to(self.world.device)

        def compute(forward: nn.Module) -> tuple[Tensor, Tensor]:
            task = self.objective.task(batch, step)
            return self.objective.loss(forward(task.context, batch.classes, batch.class_index, task.order), task)

        statistics = self.strategy.forward_backward(compute, 0)
        self.strategy.grad_norm()
        self.strategy.step(lr)
        return self.objective.statistic(statistics, "loss").item()
