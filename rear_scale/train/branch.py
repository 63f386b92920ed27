"""The start of a branch (train.branch_from=RUN@STEP): the states of another run at a step, as the first checkpoint of this one.

A trunk is a run of optim.schedule=wsd. What it computes before its decay does not depend on its length, so a branch from there
with total_steps=N gives the learning rates of a run of N steps, for the updates after STEP alone. Weights, optimizer states,
moving averages, position in the data and random numbers (functions of seed and step) continue; steps keep their numbers.
Schedules of noise and permutation are shares of each run's own length: the trunk's of its own total_steps, the branch's of the
branch's.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rear_scale import config
from rear_scale.checkpoint.average import BRANCH as KEY
from rear_scale.checkpoint.folder import CHECKPOINTS, Checkpoint, open_checkpoint, saved_steps, step_name
from rear_scale.checkpoint.meta import META
from rear_scale.checkpoint.open import newest_intact
from rear_scale.checkpoint.restore import check_states
from rear_scale.checkpoint.writer import write_linked
from rear_scale.config import (
    OWN_OF_BRANCH,
    ExperimentConfig,
    InputError,
    Plan,
    branch_point,
    check_resumable,
    settled,
    to_dict,
)
from rear_scale.files import file_sha256
from rear_scale.model import meta_model
from rear_scale.optim.groups import rules_of
from rear_scale.progress import say
from rear_scale.run.folder import RunFolder
from rear_scale.run.versions import commit, versions
from rear_scale.shards.record import Manifest
from rear_scale.world import World


@dataclass(frozen=True)
class Start:
    """A branch that has not begun: the trunk's checkpoint, and the branch's config with open choices settled as the trunk's."""

    trunk: Checkpoint
    cfg: ExperimentConfig

    def record(self) -> dict[str, Any]:
        """The origin of the branch, for meta.json and branch.json."""
        values = json.dumps(self.trunk.meta["config"], sort_keys=True)
        return {
            "run": str(self.trunk.run.absolute()),
            "step": self.trunk.step,
            "config_sha256": hashlib.sha256(values.encode()).hexdigest(),
            # meta.json lists the checksums of all other files.
            "checkpoint_sha256": file_sha256(self.trunk.path / META),
            "commit": self.trunk.meta.get("commit"),
            "branch": self.trunk.meta.get(KEY),
        }


def check(cfg: ExperimentConfig, plan: Plan, manifest: Manifest | None) -> Start | None:
    """The start of a branch; None for a run that is no branch or has begun already.

    manifest: of the training data; None = not compared. Raises InputError when the trunk or its step is not there, when it is
    another run (model, data, batch, optimizer), has no constant rate at that step, or when the branch would not go beyond it.
    """
    if cfg.train.branch_from is None or saved_steps(cfg.run.dir):
        return None
    return _start(cfg, plan, manifest, cfg.train.branch_from)


def _start(cfg: ExperimentConfig, plan: Plan, manifest: Manifest | None, text: str) -> Start:
    trunk = _open(text)
    cfg = settled(cfg, trunk.meta["config"])
    _check_same(cfg, trunk, manifest)
    _check_constant(cfg, trunk, plan)
    return Start(trunk, cfg)


def begin(cfg: ExperimentConfig, plan: Plan, manifest: Manifest, run: RunFolder, world: World) -> Checkpoint:
    """The first checkpoint of a branch, which is that of the trunk. All ranks must call this, with the run locked.

    Raises InputError as `check` does, and for a damaged checkpoint.
    """
    path = world.on_main(lambda: _write_first(cfg, plan, manifest, run, world))
    checkpoint = newest_intact(run.checkpoints, world, report=say)
    if checkpoint is None:
        raise InputError(
            f"train.branch_from={cfg.train.branch_from}: {path} is damaged. Branch from another step, or copy it again"
        )
    return checkpoint


def begins_at(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is the first one of a branch, so that its step is one of the trunk."""
    record = checkpoint.meta.get(KEY)
    return isinstance(record, dict) and record.get("step") == checkpoint.step


def _open(text: str) -> Checkpoint:
    folder, step = branch_point(text)
    run = Path(folder).expanduser()
    path = run / CHECKPOINTS / step_name(step)
    if path.is_dir():
        return open_checkpoint(path)
    if not (run / CHECKPOINTS).is_dir():
        raise InputError(f"not found: {run / CHECKPOINTS}, which train.branch_from={text} names. Name a run folder")
    kept = [str(one) for one in reversed(saved_steps(run))]
    has = f"the steps {', '.join(kept)}" if kept else "none yet"
    raise InputError(
        f"train.branch_from={text}: {run} has no checkpoint of step {step}, but {has}. Branch from one of them, or train the "
        f"trunk so that it keeps that step (checkpoint.keep_every)"
    )


def _check_same(cfg: ExperimentConfig, trunk: Checkpoint, manifest: Manifest | None) -> None:
    check_resumable(cfg, trunk.meta["config"], str(trunk.path), OWN_OF_BRANCH)
    before = trunk.meta.get("data_fingerprint")
    if manifest is not None and before != manifest.fingerprint and "data.train" not in cfg.resume.allow:
        raise InputError(
            f"data.train={cfg.data.train} holds other samples (fingerprint {manifest.fingerprint[:12]}) than {trunk.path} was "
            f"trained on ({str(before)[:12]}). Use those shards, or allow it with resume.allow=[data.train]"
        )
    check_states(trunk, rules_of(meta_model(cfg), cfg), cfg)


def _check_constant(cfg: ExperimentConfig, trunk: Checkpoint, plan: Plan) -> None:
    """Raises InputError where the step lies in a decay, of the trunk or of the branch, or at the branch's end."""
    text, step = cfg.train.branch_from, trunk.step
    of_trunk = config.from_file(trunk.meta["config"], source=str(trunk.path))
    length = config.length_of_run(of_trunk, plan.images_per_epoch)
    constant = length - config.decay_steps_of(of_trunk.optim, length)
    if step > constant:
        raise InputError(
            f"train.branch_from={text}: the trunk's rate decays after step {constant:,} (optim.decay_share="
            f"{of_trunk.optim.decay_share} of {length:,} steps). Branch from a step up to {constant:,}"
        )
    if plan.last_step <= step:
        end = "train.total_steps" if plan.last_step == plan.total_steps else "train.stop_at_step"
        raise InputError(
            f"{end}={plan.last_step} ends the branch before or at its beginning, train.branch_from={text}. Use more than {step} "
            "steps: those of the trunk count"
        )
    own = plan.total_steps - plan.decay_steps
    if step > own:
        raise InputError(
            f"train.branch_from={text}: optim.decay_share={cfg.optim.decay_share} of train.total_steps={plan.total_steps} lets "
            f"the rate decay from step {own} on, which the trunk has passed. Branch from a step up to {own}, or set "
            f"optim.decay_share={(plan.total_steps - step) / plan.total_steps:.6g} to decay from step {step} on"
        )


def _write_first(cfg: ExperimentConfig, plan: Plan, manifest: Manifest, run: RunFolder, world: World) -> Path:
    assert cfg.train.branch_from is not None
    start = _start(cfg, plan, manifest, cfg.train.branch_from)
    trunk, record = start.trunk, start.record()
    meta = {name: value for name, value in trunk.meta.items() if name not in ("format", "step", "files", "index")}
    meta |= {"config": to_dict(start.cfg), "world_size": world.size, "versions": versions(), "commit": commit()}
    write_linked(run.checkpoints / step_name(trunk.step), trunk, {**meta, KEY: record})
    run.record_branch(record)
    say(f"branching from {trunk.path}: {trunk.step} of {plan.total_steps} updates are done")
    return trunk.path
