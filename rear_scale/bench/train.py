"""Images per second of a training step on synthetic tokens, compared with the plain reference of tests/reference.

    python launchers/bench.py train --config bench_cpu.yaml
    torchrun --nproc-per-node 8 launchers/bench.py train --config rear_l.yaml strategy=fsdp2
    srun --nodes 2 --ntasks-per-node 8 python launchers/bench.py train --config rear_l.yaml      with a table of scaling

In a world of one, both steps take turns in one process. In larger worlds only the step of the config's strategy is timed. Under
srun, worlds of 1, 2, 4, ... ranks are timed one after the other, for a table of weak and strong scaling.
"""

# B images of a micro-batch, N tokens of an image

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rear_scale import config
from rear_scale.bench import reference, scaling
from rear_scale.bench.model import random_model, synchronize, use_device
from rear_scale.config import ExperimentConfig, InputError, Plan
from rear_scale.model.flops import distinct_classes_per_image, train_flops_per_image
from rear_scale.model.fp8 import check_fp8
from rear_scale.model.recompute import prepare_blocks
from rear_scale.objective import MicroBatch, Objective, Task, shared_classes
from rear_scale.parallel import facts, open_strategy
from rear_scale.parallel.engine import check_installed
from rear_scale.parallel.strategy import Strategy
from rear_scale.progress import progress
from rear_scale.world import World, discover, joined

_LEARNING_RATE = 1e-4
# The papers' global batch on the ranks of one machine; it determines the default number of distinct classes.
_DATA_BATCH, _DATA_RANKS = 2048, 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="bench_cpu.yaml", metavar="NAME.yaml", help="default: bench_cpu.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument(
        "--rounds", type=int, default=5, help="turns of each variant; medians are reported (default: 5)"
    )
    parser.add_argument("--steps", type=int, default=1, help="updates per turn (default: 1)")
    parser.add_argument(
        "--classes",
        type=int,
        help="distinct classes of a micro-batch (default: 7 per 16 images, as in a global batch of 2,048 that is sorted by "
        "class over 8 ranks)",
    )
    parser.add_argument(
        "--global-batch",
        type=int,
        metavar="IMAGES",
        help="images per update; the plain step is then not timed (default: one micro-batch)",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Rates of our training step and, in a world of one, of the plain one, with the same weights, tokens, noise and loss.

    None on ranks other than 0.
    """
    if arguments.classes is not None and arguments.classes < 1:
        raise InputError(
            f"--classes {arguments.classes} must be at least 1. Leave it out for the default (7 classes per 16 images)"
        )
    ranks = discover()
    if ranks.launcher == "slurm":
        return scaling.measure(arguments, config.load(arguments.config, arguments.overrides), ranks)
    overrides = list(arguments.overrides)
    if ranks.world_size == 1:
        overrides.append("strategy=single")
    cfg = config.load(arguments.config, overrides)
    cfg.train.global_batch_size = arguments.global_batch or cfg.train.micro_batch_size * ranks.world_size
    if ranks.world_size > 1:
        with joined(ranks) as world:
            result = _measure(cfg, world, arguments)
            return result if world.is_main else None
    return _measure(cfg, World(ranks, use_device()), arguments)


def _measure(cfg: ExperimentConfig, world: World, arguments: argparse.Namespace) -> dict[str, Any]:
    plain_form = cfg.objective.heads.form == "paper" and cfg.objective.heads.positions == "eq6"
    compared = world.size == 1 and arguments.global_batch is None
    if compared and not (cfg.model.architecture == "rar" and cfg.model.conditioning == "adaln" and plain_form):
        raise InputError(
            f"--config {arguments.config}: the plain step supports only reAR and AR in the paper's form. Use such a config"
        )
    check_installed(facts.of(cfg.strategy))
    check_fp8(cfg, world.device)
    plan = config.derive(cfg, world.size, 1_281_167)
    codebook = torch.randn(
        cfg.tokenizer.codebook_size, cfg.tokenizer.codebook_dim, generator=torch.Generator().manual_seed(1)
    )
    objective = Objective(cfg, plan, codebook, world.device)
    batch = _batch(cfg, world, arguments.classes or _classes_of_the_data_order(cfg))
    task = objective.task(batch, 1)
    strategy = open_strategy(cfg, plan, world)
    model = random_model(cfg, torch.device("cpu"), with_heads=True)
    weights = {name: w.detach().clone().to(world.device).requires_grad_() for name, w in model.named_parameters()}
    prepare_blocks(model, cfg, world.device)
    strategy.build(model)
    variants: dict[str, Callable[[], float]] = {"ours": lambda: _our_step(strategy, objective, batch, task, plan)}
    if compared:
        variants["reference"] = _PlainStep(cfg, weights, codebook.to(world.device), batch, task)
    # The first step is a warm-up, and its losses show that both variants compute the same.
    started = time.perf_counter()
    losses = {"ours": variants["ours"]()}
    first_step_s = time.perf_counter() - started  # with the time of torch.compile, where blocks are compiled
    losses.update({name: step() for name, step in variants.items() if name != "ours"})
    rates: dict[str, list[float]] = {name: [] for name in variants}
    images = cfg.train.global_batch_size * arguments.steps
    with progress("bench train", arguments.rounds * len(variants), "turn", show=world.is_main) as bar:
        for _ in range(arguments.rounds):
            for name, step in variants.items():
                _synchronize_ranks(world)
                started = time.perf_counter()
                for _ in range(arguments.steps):
                    step()
                _synchronize_ranks(world)
                rates[name].append(images / (time.perf_counter() - started))
                bar.update()
    medians = {name: statistics.median(rounds) for name, rounds in rates.items()}
    return {
        "images_per_s": medians["ours"],
        "reference_images_per_s": medians.get("reference"),
        "ratio": medians["ours"] / medians["reference"] if compared else None,
        "variants": {name: {"images_per_s": medians[name], "rounds": rounds} for name, rounds in rates.items()},
        "losses_of_the_first_step": losses,
        "first_step_s": first_step_s,
        "distinct_classes": len(batch.classes.unique()),
        "flops_per_s": train_flops_per_image(cfg, len(batch.classes) / len(batch.ids)) * medians["ours"],
        "world_size": world.size,
        "strategy": facts.of(cfg.strategy).name,
        "global_batch_size": cfg.train.global_batch_size,
        "micro_batch_size": cfg.train.micro_batch_size,
        "precision": cfg.train.precision,
        "config": arguments.config,
        "overrides": arguments.overrides,
    }


def _classes_of_the_data_order(cfg: ExperimentConfig) -> int:
    grouped = replace(
        cfg,
        data=replace(cfg.data, group_by_class=True),
        model=replace(cfg.model, modulation="per_class"),
        train=replace(cfg.train, global_batch_size=_DATA_BATCH, micro_batch_size=_DATA_BATCH // _DATA_RANKS),
    )
    return max(1, round(distinct_classes_per_image(grouped) * cfg.train.micro_batch_size))


def _synchronize_ranks(world: World) -> None:
    """Waits until the devices of all ranks have finished their work. In a world of one there is no process group."""
    synchronize(world.device)
    if world.size > 1:
        world.barrier()


def _batch(cfg: ExperimentConfig, world: World, distinct: int) -> MicroBatch:
    B, N = cfg.train.micro_batch_size, cfg.tokenizer.num_tokens
    draws = torch.Generator().manual_seed(world.rank)
    tokens = torch.randint(cfg.tokenizer.codebook_size, (B, N), generator=draws)
    labels = torch.arange(B) % min(distinct, B, cfg.model.num_classes)
    ids = torch.arange(B) + B * world.rank
    classes, rows = shared_classes(labels, cfg.model.modulation)
    return MicroBatch(tokens, ids, torch.zeros_like(ids), classes, rows).to(world.device)


def _our_step(strategy: Strategy, objective: Objective, batch: MicroBatch, task: Task, plan: Plan) -> float:
    def compute(forward: nn.Module) -> tuple[Tensor, Tensor]:
        return objective.loss(forward(task.context, batch.classes, batch.class_index, task.order), task)

    for micro_step in range(plan.accumulation):
        statistics_of_step = strategy.forward_backward(compute, micro_step)
    strategy.grad_norm()
    strategy.step(_LEARNING_RATE)
    return objective.statistic(statistics_of_step, "loss").item()


class _PlainStep:
    """The same loss computed as in the released code: modulation per image, all positions computed, a dense mask."""

    def __init__(
        self, cfg: ExperimentConfig, weights: dict[str, Tensor], codebook: Tensor, batch: MicroBatch, task: Task
    ) -> None:
        self.generators, self.training = reference.load("generators"), reference.load("training")
        self.cfg, self.weights, self.codebook, self.task = cfg, weights, codebook, task
        classes = batch.classes if batch.class_index is None else batch.classes[batch.class_index]
        self.condition = classes + cfg.tokenizer.codebook_size + 1
        optim = cfg.optim
        groups = self.training.parameter_groups(weights, optim.weight_decay)
        fused = self.condition.device.type == "cuda"
        first, second = optim.betas
        self.optimizer = torch.optim.AdamW(groups, lr=_LEARNING_RATE, betas=(first, second), fused=fused)

    def __call__(self) -> float:
        cfg, task, weights, device = self.cfg, self.task, self.weights, self.condition.device
        low = cfg.train.precision == "bf16"
        with torch.autocast(device.type, torch.bfloat16) if low else nullcontext():
            logits, stream = self.generators.rar_forward(weights, task.context, self.condition, cfg.model.num_heads)
            loss = self.training.next_token_loss(logits.float(), task.tokens)
            heads = cfg.objective.heads
            if heads.encode_tap is not None and heads.decode_tap is not None:
                # The heads run on all positions, as in the released code; Eq. 6 uses those of tokens 0 .. N-2.
                encode, decode = (
                    self.generators.rear_head(weights, f"{name}_align_mlp", stream[tap], nn.functional.gelu)[:, 2:-1]
                    for name, tap in (("encode", heads.encode_tap), ("decode", heads.decode_tap))
                )
                codes = self.codebook[task.tokens]
                aligned = self.training.paper_alignment_loss(encode.float(), decode.float(), codes)
                loss = loss + heads.weight * aligned
        loss.backward()
        nn.utils.clip_grad_norm_(list(weights.values()), cfg.optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()
