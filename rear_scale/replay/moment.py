"""What a run folder records about one of its steps: config, ranks, order of data, the checkpoint before it, logged numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rear_scale import config
from rear_scale.checkpoint.folder import CHECKPOINTS, Checkpoint, fault, open_checkpoint, saved_steps, step_name
from rear_scale.checkpoint.open import check_overrides
from rear_scale.config import ExperimentConfig, InputError
from rear_scale.progress import say
from rear_scale.run.folder import RunFolder, read_fingerprints, read_lines
from rear_scale.world import World, discover


@dataclass(frozen=True)
class Moment:
    """One step of a run, and how the run did it. cfg: its config at that step; run.dir is the folder as the user names it."""

    run: Path
    step: int
    cfg: ExperimentConfig
    start: dict[str, Any]  # the line of starts.jsonl of the start that came to the step; empty = not recorded
    ranks: int | None  # number of ranks; None = not recorded
    data_offset: int | None  # steps whose data rewinds have skipped; None = what the checkpoint before the step says
    logged: dict[int, dict[str, Any]]  # lines of metrics.jsonl by step

    @property
    def accumulation(self) -> int:
        """Micro-steps of a rank of the run, to which its dropout masks belong; of one process where ranks are not recorded."""
        train = self.cfg.train
        return max(1, train.global_batch_size // (train.micro_batch_size * (self.ranks or 1)))

    @property
    def threads(self) -> int | None:
        """The number of CPU threads of a rank; None = not recorded, or on a GPU."""
        found = self.start.get("threads")
        return found if isinstance(found, int) and found > 0 else None


def moment(run: Path, step: int, overrides: Sequence[str] = ()) -> Moment:
    """A step of a run. Raises InputError for a folder that is no run, a step outside of it, and overrides of the model."""
    if not (run / "config.yaml").is_file():
        raise InputError(
            f"not found: {run / 'config.yaml'}. Name a run folder, which training has written, such as runs/demo"
        )
    # The latest start that began before the step. Older runs have not recorded where a start began.
    starts = [line for line in read_lines(run / "starts.jsonl") if not _is_later(line.get("step"), step)]
    start = starts[-1] if starts else {}
    after = _checkpoint_after(run, step)
    if after is None:
        cfg = config.load(str(run / "config.yaml"), overrides)
        ranks, data_offset = start.get("world_size"), None
    else:
        cfg = config.from_file(after.meta["config"], source=str(after.path), overrides=overrides)
        if cfg.data.train is None:  # remote shards, which a checkpoint's config does not name
            cfg = replace(cfg, data=config.load(str(run / "config.yaml"), overrides).data)
        check_overrides(after, cfg)
        ranks, data_offset = after.meta.get("world_size"), after.meta.get("data_offset", 0)
    lines = config.found_from(config.with_home(cfg), run, config.override_keys(overrides))
    if discover().rank == 0:
        for line in lines:
            say(line)
    # Validation computes nothing that training depends on, and its shards may be gone.
    cfg = replace(cfg, run=replace(cfg.run, dir=str(run)), data=replace(cfg.data, val=None))
    cfg = replace(cfg, train=replace(cfg.train, val_every=None))
    logged = {line["step"]: line for line in read_lines(run / "metrics.jsonl") if isinstance(line.get("step"), int)}
    return Moment(run, step, cfg, start, ranks, data_offset, logged)


def _is_later(began: Any, step: int) -> bool:
    return isinstance(began, int) and began >= step


def _checkpoint_after(run: Path, step: int) -> Checkpoint | None:
    """The first kept checkpoint at a step or later: its meta.json says how the run came there."""
    later = [saved for saved in saved_steps(run) if saved >= step]
    return open_checkpoint(run / CHECKPOINTS / step_name(later[-1])) if later else None


def check_step(moment: Moment, total_steps: int) -> None:
    """Raises InputError for a step that the run does not have."""
    if not 1 <= moment.step <= total_steps:
        raise InputError(f"--step {moment.step} is not a step of {moment.run}. Use a number from 1 to {total_steps:,}")


def checkpoint_before(moment: Moment, world: World, *, at_most: int | None = None) -> Checkpoint | None:
    """The newest intact checkpoint before the step; None = the run's beginning. at_most: the newest step to take.

    All ranks must call this. Damaged checkpoints are passed over and stay as they are. Raises InputError where the run continues
    another training and none of its own checkpoints is left before the step.
    """
    newest = moment.step - 1 if at_most is None else at_most
    for saved in world.on_main(lambda: saved_steps(moment.run)):
        if saved > newest:
            continue
        path = moment.run / CHECKPOINTS / step_name(saved)
        # Each rank checks some of the files.
        faults = [one for one in world.gather(fault(path, part=slice(world.rank, None, world.size))) if one]
        if not faults:
            return open_checkpoint(path)
        if world.is_main:
            say(f"{path} is damaged and not used: {faults[0]}")
    begun = world.on_main(lambda: first_step(moment.run))
    if begun:
        raise InputError(
            f"--step {moment.step}: {moment.run} began after {begun} updates of another training, and has no checkpoint before "
            "that step. Use a later step, or keep more checkpoints (checkpoint.keep_every)"
        )
    return None


def first_step(run: Path) -> int:
    """The number of updates after which a run began: 0 but for one that continues another training, or is not recorded."""
    found = read_fingerprints(run).get("step")
    return found if isinstance(found, int) else 0


def offset_of(moment: Moment, checkpoint: Checkpoint | None) -> int:
    """The number of steps whose data were skipped by rewinds before the steps after a checkpoint."""
    if moment.data_offset is not None:
        return moment.data_offset
    if checkpoint is None:
        return 0
    meta = checkpoint.meta
    later = RunFolder(moment.run).rewind_to(checkpoint.step, meta.get("rewinds", 0))
    return later.get("data_offset", meta.get("data_offset", 0))
