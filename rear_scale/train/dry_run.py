"""The dry run of training: the numbers derived from the config, and with --full the resolved config. Allocates no weights, runs
no command and opens nothing remote."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from rear_scale.config import ExperimentConfig, InputError, Plan, UnknownLength, branch_point, derive, to_yaml
from rear_scale.config.devices import devices
from rear_scale.model import meta_model
from rear_scale.model.flops import parameters_by_part, train_flops_per_image
from rear_scale.parallel import facts
from rear_scale.parallel.engine import missing_package
from rear_scale.parallel.memory import checkpoint_bytes, memory_per_rank
from rear_scale.scaling.cluster import cluster_of
from rear_scale.scaling.cost import step_time
from rear_scale.shards.codebook import class_note, is_packed, read_checked
from rear_scale.shards.plain import plain_tars
from rear_scale.shards.reader import check_agree
from rear_scale.shards.record import Manifest
from rear_scale.shards.storage import is_remote, not_checked
from rear_scale.shards.subset import images_of_share
from rear_scale.text_table import aligned
from rear_scale.train import branch, fit, setup
from rear_scale.world import Ranks


def show(cfg: ExperimentConfig, ranks: Ranks, given: Collection[str] = (), *, full: bool = False) -> None:
    """Prints the dry run to stdout, on rank 0. Raises InputError as a real start would, but not for data that does not exist yet.

    given: dotted keys that the user has set. full: print the resolved config too.
    """
    notes: list[str] = []
    if is_packed(cfg.data.train):
        cfg, note = setup.with_classes(cfg, given)
        notes = [note] if note else []
    lines = [*_data_lines(cfg), *notes]
    try:
        lines += _run_lines(cfg, derive(cfg, _world_size(cfg, ranks), _images_per_epoch(cfg)))
    except UnknownLength as unknown:
        lines.append(f"run length: {unknown}")
    lines += _model_lines(cfg)
    lines += ["", to_yaml(cfg).rstrip()] if full else ["every field with its value: --dry-run --full"]
    if ranks.rank == 0:
        print("\n".join(lines), flush=True)


def _world_size(cfg: ExperimentConfig, ranks: Ranks) -> int:
    """The number of ranks to plan for: cluster.gpus, if set, for a dry run in a single process; else the real number."""
    return cfg.cluster.gpus or 1 if ranks.launcher == "single" else ranks.world_size


def _data_lines(cfg: ExperimentConfig) -> list[str]:
    lines: list[str] = []
    notes: list[str] = []
    found: list[Manifest] = []
    for name, folder in (("data.train", cfg.data.train), ("data.val", cfg.data.val)):
        if folder is None:
            continue
        if is_remote(folder):
            lines.append(not_checked(name, folder))
            continue
        if not is_packed(folder):
            tars = len(plain_tars(folder))
            lines.append(
                f"{name}: {tars} plain WebDataset shards, indexed when training starts"
                if tars
                else f"not found: {name}={folder}"
            )
            continue
        manifest = read_checked(cfg, folder)
        found.append(manifest)
        if name == "data.train" and (note := class_note(cfg, manifest)):
            notes.append(note)
        crops = manifest.crops_per_image
        passes = f" ({crops} crops each: one pass over them is {crops} epochs)" if crops > 1 else ""
        lines.append(
            f"{name}: {len(manifest.shards)} tar shards, {manifest.num_samples:,} sequences of {manifest.num_images:,} images"
            f"{passes} of {len(manifest.label_counts)} classes, tokenizer {manifest.tokenizer}"
        )
        if name == "data.train" and cfg.data.use_share < 1:
            used = images_of_share(manifest, cfg.data.use_share)
            lines.append(f"data.use_share={cfg.data.use_share}: {used:,} different images are trained on")
    if len(found) == 2 and (note := check_agree(found[0], found[1], cfg.data)):
        notes.append(note)
    lines += notes
    if cfg.train.init_from is not None and not Path(cfg.train.init_from).exists():
        lines.append(f"not found: train.init_from={cfg.train.init_from}")
    return lines


def _images_per_epoch(cfg: ExperimentConfig) -> int | None:
    folder = cfg.data.train
    if not is_packed(folder):
        return None
    try:
        return images_of_share(read_checked(cfg, folder), cfg.data.use_share)
    except InputError:
        return None


def _run_lines(cfg: ExperimentConfig, plan: Plan) -> list[str]:
    train = cfg.train
    begun = _first_steps(cfg, plan)
    images = plan.last_step * train.global_batch_size
    # device="cuda" also without a GPU: configs are sized for GPUs, and dry runs are often made on a login node.
    model = meta_model(cfg)
    memory = memory_per_rank(cfg, plan.world_size, plan.accumulation, model, device="cuda")
    lines = [
        f"ranks: {plan.world_size}, strategy {facts.of(cfg.strategy).name}, {train.precision}",
        f"global batch: {train.global_batch_size:,} images = {train.micro_batch_size} per micro-step "
        f"x {plan.accumulation} micro-steps x {plan.world_size} ranks",
        f"memory per rank, by formula: {memory.peak / fit.GIB:.1f} GiB ({fit.in_words(memory)})",
        f"a checkpoint, by formula: {checkpoint_bytes(model, cfg) / fit.GIB:.3g} GiB",
        f"epoch: {plan.images_per_epoch:,} images"
        if plan.images_per_epoch
        else "epoch: unknown until data.train is there",
        f"images seen: {images:,}; tokens seen: {images * cfg.tokenizer.num_tokens:,}",
    ]
    marks = [
        ("run length", plan.total_steps),
        ("warm-up end", cfg.optim.warmup_steps),
    ]
    if cfg.objective.noise.max > 0 and cfg.objective.noise.schedule == "linear":
        marks += [("noise start", plan.noise_start_step), ("noise end", plan.noise_end_step)]
    if cfg.objective.permutation.active:
        marks += [("permutation start", plan.permutation_start_step), ("permutation end", plan.permutation_end_step)]
    if plan.decay_steps:
        marks.append(("decay start", plan.total_steps - plan.decay_steps))
    if begun:
        marks.append(("branches off at", begun))
    if plan.last_step < plan.total_steps:
        marks.append(("stops early at", plan.last_step))
    lines += [f"{name}: {_both_units(steps, cfg, plan)}" for name, steps in marks]
    lines += _time_lines(cfg, plan, begun)
    if (missing := missing_package(facts.of(cfg.strategy))) is not None:
        lines.append(f"note: {missing}")
    if note := setup.warmup_note(cfg, plan):
        lines.append(note)
    return lines


def _first_steps(cfg: ExperimentConfig, plan: Plan) -> int:
    """The steps of a branch that its trunk has trained; 0 for other runs. Raises InputError where the branch cannot begin."""
    branch.check(cfg, plan, None)
    return 0 if cfg.train.branch_from is None else branch_point(cfg.train.branch_from)[1]


def _time_lines(cfg: ExperimentConfig, plan: Plan, begun: int) -> list[str]:
    """Length and cost of the steps after `begun` by the planner's formula; nothing for a GPU that it does not know, and for half
    machines."""
    device = devices().get(cfg.cluster.gpu)
    if device is None or not device.fills_machines(plan.world_size):
        return []
    cluster = cluster_of(plan.world_size, cfg.cluster.gpu, device)
    step_s = step_time(cfg, cluster, plan.accumulation, meta_model(cfg)).total_s
    hours = step_s * (plan.last_step - begun) / 3600
    return [
        f"time, by formula, on {cluster.gpus} x {cluster.gpu}: {step_s:.3f} s a step, {hours / 24:.2f} days, "
        f"{hours * cluster.gpus:,.0f} GPU-hours (launchers/plan.py compares strategies and clusters)"
    ]


def _both_units(steps: int, cfg: ExperimentConfig, plan: Plan) -> str:
    epochs = plan.epochs(steps, cfg.train.global_batch_size)
    return f"{steps:,} steps" if epochs is None else f"{steps:,} steps = {epochs:,.1f} epochs"


def _model_lines(cfg: ExperimentConfig) -> list[str]:
    parts = parameters_by_part(cfg)
    table = aligned([[f"  {name}", f"{count:,}"] for name, count in parts.items()])
    return ["parameters:", table, f"training FLOPs per image: {train_flops_per_image(cfg):.4g}"]
