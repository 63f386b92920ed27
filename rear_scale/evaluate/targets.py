"""Evaluation targets: the image sets that one job scores, given as files or generated from checkpoints with several settings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rear_scale import config
from rear_scale.checkpoint.average import KEY as AVERAGE
from rear_scale.checkpoint.folder import Checkpoint
from rear_scale.config import ExperimentConfig, InputError, to_dict
from rear_scale.evaluate.images.generated import generated_images
from rear_scale.evaluate.images.image_set import ImageSet, open_image_set
from rear_scale.model import Generator
from rear_scale.sample.job import check_tokenizer, default_output, is_done, job_identity, load_generator, say_untrained
from rear_scale.tokenizer import open_tokenizer
from rear_scale.tokenizer.base import Tokenizer
from rear_scale.world import World


@dataclass(frozen=True)
class EvalTarget:
    """One set of images to score, and the path of its result."""

    cfg: ExperimentConfig
    checkpoint: Checkpoint | None  # None = images alone
    samples: Path | None  # existing images; None = to be generated
    output: Path
    setting: str = ""  # distinguishes several targets of a run; empty = the only one

    @property
    def name(self) -> str:
        """The name of this target in tables."""
        if self.checkpoint is None:
            assert self.samples is not None, "images are given or generated"
            return os.path.basename(os.path.abspath(self.samples))
        return f"{self.cfg.run.name} {self.output.stem.removeprefix('result').lstrip('_')}".strip()

    @property
    def run(self) -> Path | None:
        return None if self.checkpoint is None else self.checkpoint.run


def result_path_next_to(images: Path, suffix: str) -> Path:
    """The path of the result for images that belong to no run: next to them, under their name."""
    if images.name in ("", ".."):
        images = Path(os.path.abspath(images))  # "." has no name
    # The dots of a folder are part of its name: samples_4.0 and samples_4.5 are different folders.
    return images.with_name(f"{images.name if images.is_dir() else images.stem}.{suffix}")


def eval_targets(
    cfg: ExperimentConfig,
    checkpoints: Sequence[tuple[ExperimentConfig, Checkpoint]],
    samples: Path | None,
    sweeps: Sequence[str],
    output: Path | None,
) -> list[EvalTarget]:
    """The targets of one job: all combinations of checkpoints and swept settings (`section.field=value,value,...`).

    Raises InputError for a sweep of anything but sampling, and for several results with one output path.
    """
    if not checkpoints and samples is None:
        raise InputError(
            "there is nothing to score. Use --checkpoint RUN, or --samples PATH (.npz, images or tar shards)"
        )
    if not checkpoints:
        assert samples is not None
        if sweeps:
            raise InputError(
                f"--sweep {sweeps[0]} needs --checkpoint, because --samples {samples} are images that exist already. Use it "
                "without --sweep"
            )
        return [EvalTarget(cfg, None, samples, output or result_path_next_to(samples, "result.json"))]
    if samples is not None and (sweeps or len(checkpoints) > 1):
        raise InputError(
            f"--samples {samples} is one set of images. Use it without --sweep and --also, or use these without --samples"
        )
    targets = []
    for own, checkpoint in checkpoints:
        average = checkpoint.meta.get(AVERAGE)  # results of averages have names of their own beside that of the weights
        for setting in _settings(sweeps):
            swept = config.from_dict(to_dict(own), str(checkpoint.path), setting)
            which = _distinguishing_parts(checkpoint, [other for _, other in checkpoints])
            which += [f"ema={average['sigma_rel']:g}" if "sigma_rel" in average else "ema"] if average else []
            own_name = "_".join([*which, *(text.removeprefix("sample.").replace("/", "-") for text in setting)])
            file = f"result_{own_name}.json" if own_name else "result.json"
            targets.append(EvalTarget(swept, checkpoint, samples, checkpoint.run / file, own_name))
    if output is None:
        _check_distinct(targets)
        return targets
    if len(targets) > 1:
        raise InputError(
            f"--out {output} is one file, but there are {len(targets)} results. Leave it out: each result has its own file name"
        )
    return [EvalTarget(targets[0].cfg, targets[0].checkpoint, samples, output)]


def _distinguishing_parts(checkpoint: Checkpoint, all_of_them: Sequence[Checkpoint]) -> list[str]:
    """The parts of a result's file name that distinguish a checkpoint from others of the same run: its step or its file name."""
    beside = [other for other in all_of_them if other.run == checkpoint.run and other.path != checkpoint.path]
    if any(other.step == checkpoint.step for other in beside):
        return [checkpoint.path.stem]  # a run's weights and their moving average, each in a file
    return [f"step={checkpoint.step}"] if beside else []


def _check_distinct(targets: Sequence[EvalTarget]) -> None:
    outputs = [target.output for target in targets]
    for output in outputs:
        if outputs.count(output) > 1:
            raise InputError(
                f"{output} would be the result of several checkpoints or settings of this job. Give each of them once, and give "
                "weight files of one run different names"
            )


def _settings(sweeps: Sequence[str]) -> list[list[str]]:
    for text in sweeps:
        field, _, values = text.partition("=")
        if not field.startswith("sample.") or not values:
            raise InputError(
                f"--sweep {text}: the form is sample.FIELD=VALUE,VALUE,..., as in sample.guidance.scale=4.0,6.9"
            )
    return config.combinations(sweeps, "--sweep")


class TargetOpener:
    """Opens the images and models of evaluation targets, and keeps the last model for the next target of the same checkpoint."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._model: tuple[tuple[Path, str], Generator] | None = None
        self._tokenizer: tuple[str | None, Tokenizer] | None = None

    def images(self, target: EvalTarget, size: int | None = None) -> ImageSet:
        """The images of a target: existing files, or images that are generated when they are read.

        size: the size to which image files are cropped; None = no cropping. All ranks must call this. Raises InputError when
        the tokenizer is not the one that the checkpoint was trained with.
        """
        if target.samples is not None:
            return open_image_set(target.samples, self.world, size, target.cfg.evaluate.exif)
        assert target.checkpoint is not None
        check_tokenizer(target.cfg, target.checkpoint)
        written = default_output(target.cfg, target.checkpoint)
        if is_done(written, job_identity(target.cfg, target.checkpoint)):
            return open_image_set(written, self.world)
        cfg = target.cfg
        say_untrained(cfg, self.world)
        if self._tokenizer is None or self._tokenizer[0] != cfg.tokenizer.weights:
            self._tokenizer = (cfg.tokenizer.weights, open_tokenizer(cfg.tokenizer, self.world.device))
        return generated_images(cfg, target.checkpoint, self.model(target), self._tokenizer[1], self.world)

    def model(self, target: EvalTarget) -> Generator:
        assert target.checkpoint is not None
        key = (target.checkpoint.path, target.cfg.train.precision)
        if self._model is None or self._model[0] != key:
            self._model = None  # free the old model before loading the new one
            if self.world.device.type == "cuda":
                torch.cuda.empty_cache()
            self._model = (key, load_generator(target.cfg, target.checkpoint, self.world.device))
        return self._model[1]
