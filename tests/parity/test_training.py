"""The first optimizer updates of the released training, through the project's own training step: in one process, and sharded
over two."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import Case, read_case
from generators import build, released_heads, start_weights
from helpers import run_alone, run_ranks
from torch import Tensor, nn

from rear_scale import config
from rear_scale.config import ExperimentConfig
from rear_scale.objective import Objective, Task
from rear_scale.optim import schedule
from rear_scale.optim.groups import decays
from rear_scale.parallel import open_strategy
from rear_scale.parallel.strategy import Strategy
from rear_scale.world import World

# Strategy and overrides of two ranks. The number of micro-steps changes on the way, which an engine that counts them itself
# does not follow: it has to defer.
SHARDED = {"fsdp2": [], "zero3": ["strategy.defer_reduction=true"]}


def experiment(case: Case, world_size: int, overrides: list[str]) -> ExperimentConfig:
    t, c = case.json["training"], case.json["config"]
    cfg = config.load(
        "rear_xl.yaml",
        [
            f"train.total_steps={t['total_steps']}",
            "train.precision=fp32",
            "optim.schedule=released",
            f"train.global_batch_size={case.json['sizes']['batch_rows']}",
            f"train.micro_batch_size={case.json['sizes']['batch_rows'] // world_size}",
            *overrides,
        ],
    )
    cfg.optim = dataclasses.replace(
        cfg.optim,
        lr=t["learning_rate"],
        end_lr=t["end_lr"],
        warmup_steps=t["warmup_steps"],
        betas=[t["beta1"], t["beta2"]],
        weight_decay=t["weight_decay"],
        grad_clip=t["max_grad_norm"],
    )
    cfg.tokenizer = dataclasses.replace(cfg.tokenizer, num_tokens=c["image_seq_len"], codebook_size=c["codebook_size"])
    if (heads := released_heads(c)) is not None:
        cfg.objective.heads = heads
    return cfg


def micro_batches(case: Case, update: int, rank: int, world_size: int) -> list[tuple[Task, Tensor]]:
    """What the model of a rank is shown at an update, and its class ids."""
    found = []
    for number in np.flatnonzero(case.arrays["micro_update"] == update):
        part = {
            name: torch.from_numpy(values[number, rank::world_size])
            for name, values in case.arrays.items()
            if name in _BATCHES
        }
        tokens, replaced = part["tokens"], part.get("perturb_mask")
        context = tokens
        if replaced is not None:
            masked = case.json["config"].get("perturb_mode") == "mask"
            drawn = torch.full_like(tokens, case.json["config"]["codebook_size"]) if masked else part["random_tokens"]
            context = torch.where(replaced, drawn, tokens)
        order = part.get("orders")
        if order is not None:
            tokens, context = tokens.gather(1, order), context.gather(1, order)
            replaced = None if replaced is None else replaced.gather(1, order)
        null = torch.tensor(case.json["config"]["condition_num_classes"])
        found.append((Task(context, tokens, order, replaced), part["class_labels"].where(~part["drop_mask"], null)))
    return found


_BATCHES = ("tokens", "class_labels", "drop_mask", "perturb_mask", "random_tokens", "orders")


def run_update(
    strategy: Strategy, objective: Objective, batches: list[tuple[Task, Tensor]]
) -> tuple[float, list[float]]:
    """Gradient norm and mean statistics of one update's micro-batches; the caller steps."""
    strategy.plan = dataclasses.replace(strategy.plan, accumulation=len(batches))
    total = torch.zeros(len(objective.names))
    for micro_step, (task, classes) in enumerate(batches):
        unique, rows = classes.unique(return_inverse=True)

        def compute(forward: nn.Module, task: Task = task, unique: Tensor = unique, rows: Tensor = rows):
            return objective.loss(forward(task.context, unique, rows, task.order), task)

        total += strategy.forward_backward(compute, micro_step) / len(batches)
    return strategy.grad_norm().item(), total.tolist()


def train(world: World, folder: Path, stem: str, overrides: list[str]) -> dict[int, dict[str, Any]]:
    """By update: statistics, gradient norm and rate; and the weights after it, where the case has them."""
    case = read_case(folder, stem)
    cfg = experiment(case, world.size, overrides)
    plan = config.derive(cfg, world.size, 100)
    model = build(case).train()
    codebook = case.arrays.get("tokenizer_codebook", np.ones((case.json["config"]["codebook_size"], 1), np.float32))
    objective = Objective(cfg, plan, torch.from_numpy(codebook), world.device)
    strategy = open_strategy(cfg, plan, world)
    strategy.build(model)
    found: dict[int, dict[str, Any]] = {}
    for expected in case.json["per_update"]:
        update = expected["update"]
        norm, statistics = run_update(strategy, objective, micro_batches(case, update, world.rank, world.size))
        lr = schedule.learning_rate(
            update,
            peak=cfg.optim.lr,
            end=cfg.optim.end_lr,
            warmup_steps=cfg.optim.warmup_steps,
            total_steps=plan.total_steps,
            form=cfg.optim.schedule,
        )
        strategy.step(lr)
        loss, ar_loss, encode, decode, accuracy = (world.sum(statistics) / world.size).tolist()
        values = {"loss": loss, "ar_loss": ar_loss, "proj_loss": encode + decode, "accuracy": accuracy}
        found[update] = {**values, "grad_norm": norm, "lr": lr}
        if str(update) in case.json["parameters_after_update"]:
            found[update]["weights"] = {name: value.cpu().numpy().copy() for name, value in strategy.tensors("param")}
    return found


def test_updates(case: Case, compare) -> None:
    model = build(case)
    groups = case.json["parameter_groups"]
    for name, weight in model.named_parameters():
        assert decays(name, weight, "released") == (name in groups["decay"]), name
        assert (name in groups["no_decay"]) != (name in groups["decay"]), name
    _check_updates(case, compare, run_alone(train, case.folder, case.stem, ["strategy=single"]), "")


def test_updates_of_two_ranks(case: Case, compare) -> None:
    for strategy, found in run_ranks(2, _train_sharded, case.folder, case.stem)[0].items():
        _check_updates(case, compare, found, f"{strategy} ")


def _train_sharded(world: World, folder: Path, stem: str) -> dict[str, dict[int, dict[str, Any]]]:
    return {name: train(world, folder, stem, [f"strategy={name}", *more]) for name, more in SHARDED.items()}


def _check_updates(case: Case, compare, found: dict[int, dict[str, Any]], label: str) -> None:
    tolerance = case.json["tolerance"]
    start = start_weights(case, build(case))
    for expected in case.json["per_update"]:
        values = found[expected["update"]]
        for name in expected.keys() & tolerance.keys() & values.keys():
            rule = tolerance[name]
            absolute = rule.get("absolute", rule.get("absolute_at_update_1", 0))
            allowed = rule.get("relative", 0) * abs(expected[name]) + absolute
            compare(f"{label}{name} {expected['update']}", values[name], expected[name], allowed)
        if "weights" in values:
            _check_parameters(case, compare, values["weights"], start, expected["update"], label)


def _check_parameters(case: Case, compare, weights: dict, start: dict, update: int, label: str) -> None:
    rules = case.json["tolerance"]["parameters_after_update"][str(update)]
    expected = case.json["parameters_after_update"][str(update)]
    skipped = case.json["not_comparable_parameters"]["names"]
    for name, weight in weights.items():
        if name in skipped:
            continue
        probe = case.weights.normal(f"{name}#probe", weight.shape, case.json["seed"]).astype(np.float64)
        now = weight.astype(np.float64)
        moved, values = now - start[name], expected[name]
        norm, moved_norm = values["norm"], values["moved_norm"]
        compare(f"{label}{update} norm {name}", np.linalg.norm(now), norm, rules["norm"] * norm)
        compare(f"{label}{update} probe {name}", (now * probe).sum(), values["dot_probe"], rules["dot_probe"] * norm)
        if update == 1:
            assert not moved.any(), name  # rate 0
        elif "moved_norm" in rules:
            compare(
                f"{label}{update} moved {name}", np.linalg.norm(moved), moved_norm, rules["moved_norm"] * moved_norm
            )
            allowed = rules["moved_dot_probe"] * moved_norm
            compare(f"{label}{update} moved-probe {name}", (moved * probe).sum(), values["moved_dot_probe"], allowed)
