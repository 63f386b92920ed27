"""Inputs of training: checked on every rank before the process group exists, opened after that."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rear_scale.checkpoint.folder import CHECKPOINTS, open_checkpoint, saved_steps, step_name
from rear_scale.config import ExperimentConfig, Plan, all_checks, derive
from rear_scale.device import uses_cuda
from rear_scale.model.attention import choose_kernel
from rear_scale.model.fp8 import check_fp8
from rear_scale.objective import Objective
from rear_scale.objective.terms import terms_of
from rear_scale.parallel import facts
from rear_scale.parallel.engine import check_installed
from rear_scale.progress import Say, say, say_once
from rear_scale.shards.codebook import (
    CLASSES_KEY,
    class_note,
    classes_of_shards,
    codebook_of,
    read_both,
    read_checked,
    with_num_classes,
)
from rear_scale.shards.reader import (
    BatchOrder,
    GroupedOrder,
    TokenSet,
    open_set,
    open_tokens,
)
from rear_scale.shards.record import Manifest
from rear_scale.shards.subset import images_of_share
from rear_scale.train import branch, fit, start
from rear_scale.untrusted import is_count
from rear_scale.world import Ranks, World


@dataclass(frozen=True)
class Data:
    """The data of a run after all checks: config, plan, training manifest and codebook."""

    cfg: ExperimentConfig
    plan: Plan
    manifest: Manifest
    codebook: Tensor  # float32 [K, D]

    def open(self, world: World) -> tuple[TokenSet, Tensor]:
        """The training set and the codebook. Shards are unpacked on this node unless they already are, or opened for streaming
        (data.mode)."""
        return open_set(self.cfg.data, self.manifest, world.size, self._report(world)), self.codebook

    def open_val(self, world: World) -> TokenSet:
        """The validation set of data.val, which is unpacked in either data.mode."""
        folder = self.cfg.data.val
        assert folder is not None
        manifest = read_checked(self.cfg, folder)
        return open_tokens(folder, self.cfg.data.cache_dir, self._report(world), manifest)

    def _report(self, world: World) -> Say:
        # One report per node; but damaged records of a stream are reported by the rank that reads them.
        return say if world.ranks.local_rank == 0 or self.cfg.data.mode == "stream" else _silent


def check_data(cfg: ExperimentConfig, ranks: Ranks) -> Data:
    """The checked inputs of a run.

    Raises InputError when the strategy's engine is not installed, shards or initial weights are missing or do not fit, the
    batch does not divide, a rank has too little memory, the attention kernel or fp8 cannot run here, a loss term does not
    fit, or a branch cannot begin where it is to.
    """
    check_installed(facts.of(cfg.strategy))
    terms_of(cfg)
    device = torch.device("cuda" if uses_cuda() else "cpu")
    choose_kernel(cfg.model.kernel, device, cfg.train.precision)
    check_fp8(cfg, device)
    manifests: list[Manifest] = []
    all_checks(lambda: start.check(cfg), lambda: manifests.append(read_both(cfg, ranks.rank == 0)[0]))
    (manifest,) = manifests
    plan = derive(cfg, ranks.world_size, images_of_share(manifest, cfg.data.use_share))
    branch.check(cfg, plan, manifest)
    if ranks.rank == 0:
        for note in (class_note(cfg, manifest), warmup_note(cfg, plan)):
            if note is not None:
                say_once(note)
    fit.check(cfg, plan, ranks)
    return Data(cfg, plan, manifest, codebook_of(cfg, manifest))


def warmup_note(cfg: ExperimentConfig, plan: Plan) -> str | None:
    """A line for the user where the learning rate never reaches its peak, else None."""
    optim = cfg.optim
    if optim.warmup_steps < plan.total_steps:
        return None
    return (
        f"note: the warm-up of {optim.warmup_steps:,} steps is as long as the run: the learning rate ends at "
        f"{optim.lr * plan.total_steps / optim.warmup_steps:.2e} and never reaches optim.lr={optim.lr}"
    )


def with_classes(cfg: ExperimentConfig, given: Collection[str]) -> tuple[ExperimentConfig, str | None]:
    """As `classes_of_shards`, but a run that is resumed keeps the number of classes that it began with."""
    begun = _classes_of_run(cfg.run.dir)
    if begun is None or CLASSES_KEY in given:
        return classes_of_shards(cfg, given)
    return with_num_classes(cfg, begun, f"that of the checkpoints in {cfg.run.dir}")


def _classes_of_run(folder: str) -> int | None:
    """model.num_classes of a run's newest checkpoint; None where there is none that says it."""
    steps = saved_steps(folder)
    if not steps:
        return None
    saved = open_checkpoint(Path(folder) / CHECKPOINTS / step_name(steps[0])).meta["config"]
    model = saved.get("model") if isinstance(saved, dict) else None
    found = model.get("num_classes") if isinstance(model, dict) else None
    return found if is_count(found) else None


def data_order(cfg: ExperimentConfig, tokens: TokenSet, objective: Objective) -> BatchOrder | GroupedOrder:
    """The order of data: the samples of each step, rank and micro-step. cfg: as `settled` returns it."""
    order = tokens.order(cfg.train.global_batch_size, cfg.run.seed)
    if not cfg.data.group_by_class:
        return order
    return GroupedOrder(
        order,
        lambda ids, epochs: objective.classes(tokens.labels_of(ids), ids, epochs),
        cfg.model.num_classes,
    )


def _silent(line: str) -> None:
    return
