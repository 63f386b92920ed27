"""Sample sheets during training: images with the same classes and seed each time, in the run folder and in its sinks (wandb,
TensorBoard)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from rear_scale.checkpoint.folder import open_checkpoint, step_name
from rear_scale.config import ExperimentConfig, InputError
from rear_scale.files import DISK_ERRORS
from rear_scale.progress import say
from rear_scale.run.sinks import log_image
from rear_scale.sample.decode import Decoder
from rear_scale.sample.grid import write_sheet
from rear_scale.sample.job import batches_of, check_trained_on, labels_of, load_generator, make_images
from rear_scale.shards.record import Manifest
from rear_scale.tokenizer import TOKENS_ONLY, open_tokenizer
from rear_scale.world import World

FOLDER = "grids"  # folder in the run folder: step_00000100.png ...
_COLUMNS = 10  # classes
_ROWS = 5


def passed(step: int, every_images: int, cfg: ExperimentConfig) -> bool:
    """Whether training has passed a multiple of every_images since the previous checkpoint. A function of the step alone, so
    that a resumed run draws the same sheets."""
    before = (step - 1) // cfg.checkpoint.every_steps * cfg.checkpoint.every_steps
    batch = cfg.train.global_batch_size
    return step * batch // every_images > before * batch // every_images


def check_grids(cfg: ExperimentConfig, manifest: Manifest) -> None:
    """Raises InputError, before training starts, when sample.grid_every_images is set but images cannot be decoded.

    manifest: of the training tokens, which must come from the tokenizer that decodes the images.
    """
    if cfg.sample.grid_every_images is None:
        return
    weights = cfg.tokenizer.weights
    if cfg.tokenizer.name in TOKENS_ONLY:
        missing = f"tokenizer.name={cfg.tokenizer.name} does not decode images here"
    elif weights is None or not Path(weights).exists():
        missing = f"not found: tokenizer.weights={weights}"
    else:
        check_trained_on(cfg, manifest)
        return
    raise InputError(f"{missing}, which sample.grid_every_images needs. Set it, or sample.grid_every_images=null")


class SampleGrids:
    """A hook on checkpoints that draws sample sheets. All ranks must call it; rank 0 loads the checkpoint and samples."""

    def __init__(self, cfg: ExperimentConfig, world: World) -> None:
        columns = min(_COLUMNS, cfg.model.num_classes if cfg.sample.labels is None else len(cfg.sample.labels))
        given = list(range(columns)) if cfg.sample.labels is None else cfg.sample.labels[:columns]
        count = columns * _ROWS
        batch_size = min(cfg.sample.batch_size, count)
        sample = replace(cfg.sample, num_images=count, batch_size=batch_size, labels=given)
        self.cfg, self.world, self.columns = replace(cfg, sample=sample), world, columns

    def __call__(self, step: int, path: Path) -> None:
        """Writes a sheet with one class per column, if one is due at this step."""
        every = self.cfg.sample.grid_every_images
        assert every is not None
        if not passed(step, every, self.cfg):
            return
        try:
            self.world.on_main(lambda: self._draw(step, path))
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            if self.world.is_main:
                say(f"{self._file(step)}: {error.strerror}. Training continues without this sheet")

    def make_missing(self, step: int, path: Path) -> None:
        """Writes the sheet of a checkpoint if it is due and missing, because the run was killed. All ranks must call this."""
        if not self.world.from_main(self._file(step).exists()):
            self(step, path)

    def _file(self, step: int) -> Path:
        return Path(self.cfg.run.dir) / FOLDER / f"{step_name(step)}.png"

    def _draw(self, step: int, path: Path) -> None:
        cfg, device = self.cfg, self.world.device
        decoder = Decoder(load_generator(cfg, open_checkpoint(path), device), cfg.sample, cfg.objective.permutation)
        tokenizer = open_tokenizer(cfg.tokenizer, device)
        size = cfg.tokenizer.image_size
        images = np.empty((cfg.sample.num_images, size, size, 3), np.uint8)
        for ids in batches_of(cfg):
            images[ids] = make_images(decoder, tokenizer, ids, cfg, device)
        file = self._file(step)
        file.parent.mkdir(exist_ok=True)
        write_sheet(file, images, self.columns)
        say(f"{file}: {len(images)} samples, classes {', '.join(map(str, labels_of(cfg, np.arange(self.columns))))}")
        log_image(step, "samples", file)


def grid_hooks(cfg: ExperimentConfig, world: World) -> list[SampleGrids]:
    """The hooks that draw the config's sample sheets. Prints a note on rank 0 when checkpoints are too far apart for them."""
    every, apart = cfg.sample.grid_every_images, cfg.checkpoint.every_steps * cfg.train.global_batch_size
    if every is None:
        return []
    if every < apart and world.is_main:
        say(
            f"note: sample.grid_every_images={every:,}, but sheets are drawn at checkpoints, which are {apart:,} images apart "
            "(checkpoint.every_steps x train.global_batch_size), so there is one at each checkpoint"
        )
    return [SampleGrids(cfg, world)]
