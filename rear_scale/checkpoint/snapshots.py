"""Snapshots of the averages of optim.posthoc_ema, from which averages of other lengths are made (average.py).

    <run>/ema/step_00000100/part-00000.safetensors ...   keys posthoc_ema_1/NAME, posthoc_ema_2/NAME
    <run>/ema/step_00000100/meta.json                    as in a checkpoint; written last

A snapshot has the format of a checkpoint without weights and optimizer states, float32: 4 bytes per weight and average. It is
written under a temporary name, read back, and renamed when it is complete. No snapshot is ever removed, except those of steps
that a resumed run repeats, which are then written again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rear_scale.checkpoint.folder import Checkpoint, clear, complete, open_checkpoint, step_of
from rear_scale.checkpoint.writer import Writer
from rear_scale.files import remove_folder
from rear_scale.optim.posthoc_ema import state_names
from rear_scale.parallel.strategy import StateName, Strategy

SNAPSHOTS = "ema"  # folder in a run folder


class SnapshotWriter(Writer):
    """Writes snapshots. Training waits for the disk: they are rare, and each rank writes its part of them."""

    what = "a snapshot of the averages"

    def write(self, step: int, strategy: Strategy, meta: dict[str, Any]) -> str | None:
        """Writes the snapshot of a step. All ranks must call this, and all get the problem when it cannot be written."""
        problem = self.begin(step, strategy, meta)
        return self.finish()[1] if problem is None else problem

    def states(self, strategy: Strategy) -> tuple[StateName, ...]:
        return state_names(strategy.cfg.optim)

    def _verify_older(self) -> None:
        return  # each snapshot is read back when it is written, and none depends on another

    def _tidy(self, newest: Path) -> None:
        return  # all are kept


def snapshots(run: Path) -> list[Checkpoint]:
    """The snapshots of a run, oldest first. Raises InputError for an invalid meta.json. The other files are not checked."""
    return [open_checkpoint(path) for path in complete(run / SNAPSHOTS)]


def remove_later(run: Path, step: int) -> None:
    """Removes what a run that is resumed after `step` updates writes again, and unfinished snapshots. The run must be locked."""
    clear(run / SNAPSHOTS)
    for path in complete(run / SNAPSHOTS):
        if step_of(path) > step:
            remove_folder(path)
