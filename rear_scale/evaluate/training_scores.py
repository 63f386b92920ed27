"""Scores of few samples during training, on the training ranks, under names that contain the number of samples."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rear_scale.checkpoint.folder import open_checkpoint
from rear_scale.config import ExperimentConfig, InputError
from rear_scale.evaluate.images.generated import generated_images
from rear_scale.evaluate.job import Evaluation, check_evaluation
from rear_scale.evaluate.result import ImageScores
from rear_scale.files import write_text_atomically
from rear_scale.progress import say
from rear_scale.sample.job import check_trained_on, load_generator
from rear_scale.sample.sheets import passed
from rear_scale.shards.record import Manifest
from rear_scale.tokenizer import open_tokenizer
from rear_scale.world import World

FILE = "evaluations.jsonl"


def check_training_scores(cfg: ExperimentConfig, manifest: Manifest) -> None:
    """Raises InputError, before training starts, when evaluate.training is set but its scores could not be computed.

    manifest: of the training tokens, which must come from the tokenizer that decodes the images.
    """
    if cfg.evaluate.training is None:
        return
    check_evaluation(cfg)
    if cfg.tokenizer.weights is None or not Path(cfg.tokenizer.weights).exists():
        raise InputError(
            f"not found: tokenizer.weights={cfg.tokenizer.weights}, which evaluate.training needs to make images. Set it, or "
            "evaluate.training=null"
        )
    check_trained_on(cfg, manifest)


def is_due(step: int, cfg: ExperimentConfig) -> bool:
    """Whether training has passed a multiple of every_images since the previous checkpoint; depends on the step alone."""
    assert cfg.evaluate.training is not None
    return passed(step, cfg.evaluate.training.every_images, cfg)


class TrainingScores:
    """A hook on checkpoints that scores samples. All ranks must call it; the model is loaded from the checkpoint, so that it
    does not depend on the training strategy."""

    def __init__(self, cfg: ExperimentConfig, world: World) -> None:
        assert cfg.evaluate.training is not None
        sample = replace(cfg.sample, num_images=cfg.evaluate.training.num_images)
        self.cfg, self.world = replace(cfg, sample=sample), world
        self.evaluation: Evaluation | None = None

    def __call__(self, step: int, path: Path) -> None:
        """Adds a line to evaluations.jsonl of the run, replacing an earlier line of the same step."""
        if not is_due(step, self.cfg):
            return
        cfg, world = self.cfg, self.world
        run = Path(cfg.run.dir)
        if self.evaluation is None:
            self.evaluation = Evaluation(cfg, run / "features", world)
        checkpoint = open_checkpoint(path)
        tokenizer = open_tokenizer(cfg.tokenizer, world.device)
        model = load_generator(cfg, checkpoint, world.device)
        samples = generated_images(cfg, checkpoint, model, tokenizer, world)
        scores = self.evaluation.score(samples)
        world.barrier()  # other ranks may still read the features that are removed next
        if world.is_main:
            # Removed because the next checkpoint has other samples; the features of the references are kept. This is done
            # before the line is written, because a start that finds the line does not come here again.
            self.evaluation.remove_features(samples)
            line = {"step": step, "images_seen": step * cfg.train.global_batch_size, **_named(scores, samples.count)}
            _write(run / FILE, line)
            say(", ".join(f"{name} {value:.4g}" for name, value in line.items() if isinstance(value, float)))
        world.barrier()

    def make_missing(self, step: int, path: Path) -> None:
        """Scores a checkpoint if it is due and has no line, because the run was killed. All ranks must call this."""
        done = self.world.is_main and any(line["step"] == step for line in _lines(Path(self.cfg.run.dir) / FILE))
        if not self.world.from_main(done):
            self(step, path)


def _named(scores: ImageScores, count: int) -> dict[str, float]:
    """The scores under flat names with the number of samples, such as fid_n1000/REFERENCE."""
    numbers = scores.numbers(in_training=True)
    return {"/".join(filter(None, (f"{one.name}_n{count}", one.reference))): one.value for one in numbers}


def _write(path: Path, line: dict[str, Any]) -> None:
    # Lines of this and later steps are dropped: a resumed run repeats these steps.
    lines = [other for other in _lines(path) if other["step"] < line["step"]] + [line]
    write_text_atomically(path, "".join(json.dumps(item) + "\n" for item in lines))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def training_hooks(cfg: ExperimentConfig, world: World) -> list[TrainingScores]:
    """The scores during training that the config asks for, or none."""
    return [] if cfg.evaluate.training is None else [TrainingScores(cfg, world)]
