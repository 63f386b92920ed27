"""Images generated from a checkpoint as an image set: sampled block by block while features are extracted, and not stored."""

# B images of a batch

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from rear_scale.checkpoint.folder import Checkpoint
from rear_scale.config import ExperimentConfig
from rear_scale.evaluate.images.image_set import Generation, ImageSet
from rear_scale.model import Generator
from rear_scale.sample.decode import Decoder
from rear_scale.sample.job import batches_of, decode_images, job_identity, labels_of, make_tokens, same_compile
from rear_scale.shards.record import read_manifest
from rear_scale.tokenizer.base import Tokenizer
from rear_scale.world import World


def generated_images(
    cfg: ExperimentConfig, checkpoint: Checkpoint, model: Generator, tokenizer: Tokenizer, world: World
) -> ImageSet:
    """The image set of the samples of cfg.sample. Its blocks are the batches of a sampling job, so that image i equals the one
    that launchers/sample.py writes.

    All ranks must call this. The caller opens the model and the tokenizer, so that several settings can be scored with them.
    """
    compiled = same_compile(cfg, world)
    decoder = Decoder(model, cfg.sample, cfg.objective.permutation, compiled=compiled)

    def draw(numbers: np.ndarray) -> Tensor:
        return make_tokens(decoder, numbers, cfg, world.device)

    def decode(tokens: Tensor, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return decode_images(tokenizer, tokens, cfg)[: len(numbers)], labels_of(cfg, numbers)

    def read(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return decode(draw(numbers), numbers)

    size = cfg.tokenizer.image_size
    name = f"{cfg.run.name}, step {checkpoint.step}"
    # Compiled steps round differently, so features that were stored in the other form are not used.
    identity = f"generated {job_identity(cfg, checkpoint)}{' compiled' if compiled else ''}"
    blocks = batches_of(cfg)
    return ImageSet(
        name,
        identity,
        size,
        size,
        blocks,
        read,
        uint8_rounding=cfg.sample.uint8_rounding,
        class_names=_class_names(cfg),
        generation=Generation(draw, decode),
    )


def _class_names(cfg: ExperimentConfig) -> list[str] | None:
    """The names of the class ids in data.train; None where the shards are not on this machine."""
    folder = cfg.data.train
    if folder is None or not (Path(folder) / "index.json").is_file():
        return None
    return read_manifest(folder).class_names
