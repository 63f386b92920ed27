"""The first optimizer updates of the released training, through the project's own training step."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from generators import build, released_heads, start_weights
from torch import Tensor, nn

from rear_scale import config
from rear_scale.config import ExperimentConfig, Plan
from rear_scale.objective import Objective, Task, schedules
from rear_scale.parallel import open_strategy
from rear_scale.parallel.strategy import Strategy, decays
from rear_scale.world import World, discover


def experiment(case) -> ExperimentConfig:
    t, c = case.json["training"], case.json["config"]
    cfg = config.load(
        "rear_xl.yaml",
        ["strategy=single", f"train.total_steps={t['total_steps']}", "train.precision=fp32", "optim.schedule=released"],
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


def micro_batches(case, update: int) -> list[tuple[Task, Tensor]]:
    """What the model is shown at an update, and its class ids."""
    found = []
    for number in np.flatnonzero(case.arrays["micro_update"] == update):
        part = {name: torch.from_numpy(values[number]) for name, values in case.arrays.items() if name in _BATCHES}
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
    total = torch.zeros(5)
    for micro_step, (task, classes) in enumerate(batches):
        unique, rows = classes.unique(return_inverse=True)

        def compute(forward: nn.Module, task: Task = task, unique: Tensor = unique, rows: Tensor = rows):
            return objective.loss(forward(task.context, unique, rows, task.order), task)

        total += strategy.forward_backward(compute, micro_step) / len(batches)
    return strategy.grad_norm().item(), total.tolist()


def test_updates(case, compare) -> None:
    cfg, tolerance = experiment(case), case.json["tolerance"]
    plan: Plan = config.derive(cfg, 1, 100)
    world = World(discover(), torch.device("cpu"))
    model = build(case).train()
    start = start_weights(case, model)
    codebook = case.arrays.get("tokenizer_codebook", np.ones((case.json["config"]["codebook_size"], 1), np.float32))
    objective = Objective(cfg, plan, torch.from_numpy(codebook), world.device)
    strategy = open_strategy(cfg, plan, world)
    strategy.build(model)
    groups = case.json["parameter_groups"]
    for name, weight in model.named_parameters():
        assert decays(name, weight, "released") == (name in groups["decay"]), name
        assert (name in groups["no_decay"]) != (name in groups["decay"]), name
    for expected in case.json["per_update"]:
        update = expected["update"]
        norm, statistics = run_update(strategy, objective, micro_batches(case, update))
        lr = schedules.learning_rate(
            update,
            peak=cfg.optim.lr,
            end=cfg.optim.end_lr,
            warmup_steps=cfg.optim.warmup_steps,
            total_steps=plan.total_steps,
            form=cfg.optim.schedule,
        )
        strategy.step(lr)
        loss, ar_loss, encode, decode, accuracy = statistics
        found = {"loss": loss, "ar_loss": ar_loss, "proj_loss": encode + decode, "accuracy": accuracy}
        for name, value in {**found, "grad_norm": norm, "lr": lr}.items():
            if name in expected and name in tolerance:
                rule = tolerance[name]
                absolute = rule.get("absolute", rule.get("absolute_at_update_1", 0))
                allowed = rule.get("relative", 0) * abs(expected[name]) + absolute
                compare(f"{name} {update}", value, expected[name], allowed)
        if str(update) in case.json["parameters_after_update"]:
            _check_parameters(case, compare, model, start, update)


def _check_parameters(case, compare, model: nn.Module, start: dict, update: int) -> None:
    rules = case.json["tolerance"]["parameters_after_update"][str(update)]
    expected = case.json["parameters_after_update"][str(update)]
    skipped = case.json["not_comparable_parameters"]["names"]
    for name, weight in model.named_parameters():
        if name in skipped:
            continue
        probe = case.weights.normal(f"{name}#probe", weight.shape, case.json["seed"]).astype(np.float64)
        now = weight.detach().numpy().astype(np.float64)
        moved, values = now - start[name], expected[name]
        norm, moved_norm = values["norm"], values["moved_norm"]
        compare(f"{update} norm {name}", np.linalg.norm(now), norm, rules["norm"] * norm)
        compare(f"{update} probe {name}", (now * probe).sum(), values["dot_probe"], rules["dot_probe"] * norm)
        if update == 1:
            assert not moved.any(), name  # rate 0
        elif "moved_norm" in rules:
            compare(f"{update} moved {name}", np.linalg.norm(moved), moved_norm, rules["moved_norm"] * moved_norm)
            allowed = rules["moved_dot_probe"] * moved_norm
            compare(f"{update} moved-probe {name}", (moved * probe).sum(), values["moved_dot_probe"], allowed)
