"""Images of a checkpoint as a set to score: generated block by block while their features are taken, written nowhere."""

# B images of a unit

from __future__ import annotations

import numpy as np

from rear_scale.config import ExperimentConfig
from rear_scale.evaluate.sources import ImageSet
from rear_scale.model import Generator
from rear_scale.parallel.checkpoint import Checkpoint
from rear_scale.sample.decode import Decoder
from rear_scale.sample.job import job_identity, labels_of, make_images, units_of
from rear_scale.tokenizer.base import Tokenizer
from rear_scale.world import World


def generated_images(
    cfg: ExperimentConfig, checkpoint: Checkpoint, model: Generator, tokenizer: Tokenizer, world: World
) -> ImageSet:
    """The samples of cfg.sample. A block is a unit of the sampling job, so that image i is the one that would be written.

    The model and the tokenizer are opened by the caller, who may score several settings with them.
    """
    decoder = Decoder(model, cfg.sample, cfg.objective.permutation)

    def read(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return make_images(decoder, tokenizer, numbers, cfg, world.device), labels_of(cfg, numbers)

    size = cfg.tokenizer.image_size
    name = f"{cfg.run.name}, step {checkpoint.step}"
    identity = f"generated {job_identity(cfg, checkpoint)}"
    blocks = units_of(cfg)
    return ImageSet(name, identity, size, size, blocks, read, quantiser=cfg.sample.quantiser)
