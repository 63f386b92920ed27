"""The search for the scale and power of guidance of a trained model: a grid on few samples, refined around its best, and the
best one confirmed on all samples.

    python launchers/study.py --config study/guidance.yaml --checkpoint runs/ar_l

Each round is one line of launchers/evaluate.py with --sweep, and is not computed again after a kill.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rear_scale.checkpoint.folder import last_step
from rear_scale.config import InputError
from rear_scale.evaluate.result import Result, read_result
from rear_scale.files import write_text_atomically
from rear_scale.progress import say
from rear_scale.run.stages import Stage, StageFolder
from rear_scale.shards.inputs import Inputs
from rear_scale.text_table import as_csv

CONFIRMED = "guided.json"
_FIELDS = {"scale": list, "power": list, "images": int, "rounds": int, "confirm": int, "score": str}


# Scores of which the largest is the best
_LARGER_IS_BETTER = ("inception_score", "class_accuracy", "precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class Point:
    """The score of one setting."""

    scale: float
    power: float
    images: int
    score: float


@dataclass(frozen=True)
class Space:
    """What is searched: the section `guidance` of a study."""

    scale: list[float]
    power: list[float]
    images: int  # samples of each setting of a round
    rounds: int  # after the first, each around the best so far
    confirm: int  # samples that the best is scored on at the end
    score: str  # NAME, or NAME/REFERENCE: the smaller the better

    @classmethod
    def read(cls, values: Mapping[str, Any], source: str) -> Space:
        """Raises InputError for missing or unknown fields, and for values that cannot be searched."""
        if values.keys() != _FIELDS.keys() or not all(isinstance(values[name], kind) for name, kind in _FIELDS.items()):
            needed = ", ".join(f"{name} ({kind.__name__})" for name, kind in _FIELDS.items())
            raise InputError(f"{source}: guidance needs {needed}. Write it as in configs/study/guidance.yaml")
        for name in ("scale", "power"):
            numbers = values[name]
            if not numbers or any(not isinstance(one, int | float) or one <= 0 for one in numbers):
                raise InputError(
                    f"{source}: guidance.{name}={numbers} is not a list of positive numbers. Use [2, 4, 8]"
                )
        name = values["score"].partition("/")[0]
        if name in _LARGER_IS_BETTER:
            raise InputError(
                f"{source}: guidance.score={values['score']} is better where it is larger, but the search looks for the "
                "smallest. Use fid, classifier_frechet_distance or another distance"
            )
        for name in ("images", "confirm"):
            if values[name] < 1 or values["rounds"] < 0:
                raise InputError(
                    f"{source}: guidance.images and guidance.confirm must be at least 1, and guidance.rounds at least 0. Use "
                    "10000, 50000 and 2"
                )
        return cls(
            **{**values, "scale": sorted(map(float, values["scale"])), "power": sorted(map(float, values["power"]))}
        )


@dataclass
class Search:
    """A search on one checkpoint. `run` returns its best setting."""

    space: Space
    checkpoint: Path
    folder: Path
    start: Sequence[str]
    overrides: Sequence[str] = ()
    processes: int = 1
    points: list[Point] = field(default_factory=list)

    def run(self) -> Point:
        """The best setting with its score on all samples. Writes guidance.csv. Raises InputError where a command fails."""
        scales, powers = self.space.scale, self.space.power
        for number in range(self.space.rounds + 1):
            self._round(number, scales, powers)
            best = self._best()
            say(f"round {number}: {self.space.score} {best.score:.4g} with scale {best.scale:g}, power {best.power:g}")
            scales = around(best.scale, sorted({point.scale for point in self.points}))
            powers = around(best.power, sorted({point.power for point in self.points}))
        confirmed = self._confirm(best)
        write_text_atomically(self.folder / "guidance.csv", _as_csv([*self.points, confirmed]))
        return confirmed

    def _best(self) -> Point:
        """The point with the smallest score. Raises InputError where no score is a number."""
        known = [point for point in self.points if math.isfinite(point.score)]
        if not known:
            raise InputError(
                f"{self.space.score} is not finite with any guidance. Score more images, or another checkpoint"
            )
        return min(known, key=lambda point: point.score)

    def stages(self) -> list[Stage]:
        """The first round and the confirmation of its first setting: what a dry run can show."""
        return [
            self._stage(0, self.space.scale, self.space.power),
            self._confirming(self.space.scale[0], self.space.power[0]),
        ]

    def _round(self, number: int, scales: Sequence[float], powers: Sequence[float]) -> None:
        stage = self._stage(number, scales, powers)
        StageFolder(self.folder).run(stage, f"[round {number}] ")
        for path, (scale, power) in zip(stage.products, _pairs(scales, powers), strict=True):
            point = Point(scale, power, self.space.images, score_of(read_result(path), self.space.score, path))
            if point not in self.points:
                self.points.append(point)

    def _stage(self, number: int, scales: Sequence[float], powers: Sequence[float]) -> Stage:
        run = run_of(self.checkpoint)
        words = [
            *self._words(self.space.images),
            "--sweep", f"sample.guidance.scale={_listed(scales)}",
            "--sweep", f"sample.guidance.power={_listed(powers)}",
        ]  # fmt: skip
        products = tuple(
            run / f"result_guidance.scale={scale:g}_guidance.power={power:g}.json"
            for scale, power in _pairs(scales, powers)
        )
        return Stage(
            f"guidance{number}",
            f"guidance, round {number}",
            words,
            products,
            self._inputs(),
            self.processes,
            tuple(self.start),
        )

    def _confirm(self, best: Point) -> Point:
        stage = self._confirming(best.scale, best.power)
        StageFolder(self.folder).run(stage)
        (path,) = stage.products
        score = score_of(read_result(path), self.space.score, path)
        return Point(best.scale, best.power, self.space.confirm, score)

    def _confirming(self, scale: float, power: float) -> Stage:
        out = self.folder / CONFIRMED
        chosen = [f"sample.guidance.scale={scale:g}", f"sample.guidance.power={power:g}"]
        words = [*self._words(self.space.confirm), *chosen, "--out", str(out)]
        inputs = self._inputs()
        return Stage(
            "guidance_confirm", "guidance, all samples", words, (out,), inputs, self.processes, tuple(self.start)
        )

    def _inputs(self) -> Inputs:
        """The step of the checkpoint: a run that was trained further is searched again."""
        return {"step": last_step(run_of(self.checkpoint))}

    def _words(self, images: int) -> list[str]:
        own = ["sample.guidance.schedule=power_cosine", f"sample.num_images={images}"]
        return ["launchers/evaluate.py", "--checkpoint", str(self.checkpoint), *self.overrides, *own]


def around(best: float, known: Sequence[float]) -> list[float]:
    """The best value of a row, and those half way to its neighbours; at an end of the row, as far beyond it again."""
    at = known.index(best)
    if len(known) == 1:
        return [best]
    below = (known[at - 1] + best) / 2 if at else best - (known[1] - best) / 2
    above = (known[at + 1] + best) / 2 if at + 1 < len(known) else best + (best - known[at - 1]) / 2
    return [round(value, 4) for value in (below, best, above) if value > 0]


def score_of(result: Result, score: str, path: Path) -> float:
    """One score of a result. Raises InputError where it does not have it."""
    name, _, reference = score.partition("/")
    numbers = result.images.numbers()
    for number in numbers:
        if number.name == name and reference in ("", number.reference):
            return number.value
    known = ", ".join(dict.fromkeys(number.name for number in numbers))
    raise InputError(f"{path} has no score {score}. Set guidance.score to one of {known}")


def run_of(checkpoint: Path) -> Path:
    """The run folder of a checkpoint, in which launchers/evaluate.py writes the results of a sweep."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint


def _pairs(scales: Sequence[float], powers: Sequence[float]) -> list[tuple[float, float]]:
    return [(scale, power) for scale in scales for power in powers]


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def _as_csv(points: Sequence[Point]) -> str:
    cells = ([f"{point.scale:g}", f"{point.power:g}", point.images, point.score] for point in points)
    return as_csv(["scale", "power", "images", "score"], cells)
