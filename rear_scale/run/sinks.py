"""The sinks of a run, as its config has them: wandb, TensorBoard, both or none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rear_scale.config import ExperimentConfig
from rear_scale.run import tensorboard, wandb
from rear_scale.run.folder import RunFolder
from rear_scale.run.sink import Sink

# The sinks of the run that is training in this process.
_training_sinks: Sequence[Sink] = ()


def check_sinks(cfg: ExperimentConfig, rank: int) -> None:
    """Raises InputError, before the ranks meet, when a sink that the config asks for would fail."""
    wandb.check_wandb(cfg, rank)
    tensorboard.check_tensorboard(cfg)


def open_sinks(cfg: ExperimentConfig, run: RunFolder) -> list[Sink]:
    """The sinks that are not disabled. Rank 0 only."""
    opened: tuple[Sink | None, ...] = (wandb.open_sink(cfg, run), tensorboard.open_sink(cfg, run))
    return [sink for sink in opened if sink is not None]


def log_summary(cfg: ExperimentConfig, run: RunFolder, values: dict[str, float], step: int) -> None:
    """Adds scores of the checkpoint of a step to the run's sinks. Rank 0 only."""
    for sink in open_sinks(cfg, run):
        sink.summary(values, step)
        sink.finish(exit_code=0)


def log_image(step: int, name: str, file: Path) -> None:
    """Adds an image to the sinks of the run that is training in this process, if there are any. Rank 0 only."""
    for sink in _training_sinks:
        sink.image(step, name, file)


def show_images_on(sinks: Sequence[Sink]) -> None:
    """Sets the sinks that `log_image` adds to: those of the run that is training in this process."""
    global _training_sinks
    _training_sinks = sinks
