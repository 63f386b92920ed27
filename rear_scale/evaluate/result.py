"""result.json: every score of one evaluation with what it was made from, as it is written and read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from rear_scale.checkpoint.folder import Checkpoint
from rear_scale.config import ExperimentConfig, InputError, to_dict
from rear_scale.config.renamed import with_todays_rounding
from rear_scale.evaluate.images.image_set import ImageSet
from rear_scale.evaluate.metrics import METRICS
from rear_scale.evaluate.metrics.base import Metric
from rear_scale.files import write_text_atomically
from rear_scale.run.folder import provenance
from rear_scale.untrusted import read_json
from rear_scale.world import World

OF_SMALL_IMAGES = ("classifier", "pixels")  # extractors whose metrics stand together in the scores by the classifier


@dataclass(frozen=True)
class NetworkScores:
    """Scores by the features of one published network."""

    weights_sha256: str
    weights_are_published: bool | None  # None = their publisher gives no checksum
    samples: int  # images
    of_samples: Mapping[str, Any]  # of the images alone, by key
    references: Mapping[str, Mapping[str, Any]]  # by name of the reference and key

    def to_json(self) -> dict[str, Any]:
        about = {
            "weights_sha256": self.weights_sha256,
            "weights_are_published": self.weights_are_published,
            "samples": self.samples,
        }
        return {**about, **self.of_samples, "references": dict(self.references)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        rest = dict(values)
        about = [rest.pop(name) for name in ("weights_sha256", "weights_are_published", "samples")]
        references = rest.pop("references")
        return cls(*about, rest, references)


@dataclass(frozen=True)
class SetScores:
    """Scores of one set of small images by the config's own classifier."""

    count: int  # images
    of_samples: Mapping[str, Any]  # of the images alone, by key
    by_reference: Mapping[str, Mapping[str, float | None]]  # by key and name of the reference

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, **self.of_samples, **self.by_reference}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        found = {key: value for key, value in values.items() if key != "count"}
        of_samples = {key: value for key, value in found.items() if not isinstance(value, dict)}
        return cls(values["count"], of_samples, {key: found[key] for key in found if key not in of_samples})


@dataclass(frozen=True)
class ClassifierScores:
    """The samples by the config's own classifier, and the references against each other as a yardstick."""

    features: str  # which layer of which weights
    samples: SetScores
    references: Mapping[str, SetScores]

    def to_json(self) -> dict[str, Any]:
        references = {name: scores.to_json() for name, scores in self.references.items()}
        return {"features": self.features, "samples": self.samples.to_json(), "references": references}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        references = {name: SetScores.from_json(scores) for name, scores in values["references"].items()}
        return cls(values["features"], SetScores.from_json(values["samples"]), references)


@dataclass(frozen=True)
class Number:
    """One number of a metric, under its flat name."""

    name: str
    reference: str | None  # None = of the images alone
    value: float


@dataclass(frozen=True)
class ReconstructionScores:
    """How a tokenizer's reconstructions differ from their originals."""

    images: int
    values: Mapping[str, Any]  # by key
    uint8_rounding: str  # how floats became uint8
    tokenizer_sha256: str


@dataclass(frozen=True)
class ImageScores:
    """All scores of one set of images: `images` of result.json."""

    classifier: ClassifierScores | None = None
    networks: Mapping[str, NetworkScores] = field(default_factory=dict)
    reference_sets: Mapping[str, Any] | None = None  # by name: what the networks' scores are against
    labels: Mapping[str, Any] | None = None  # how many images each class has; None = they bring no classes
    reconstruction: ReconstructionScores | None = None
    published: Mapping[str, Any] | None = None  # the published row beside them, with verdicts

    def to_json(self) -> dict[str, Any]:
        found = {} if self.classifier is None else self.classifier.to_json()
        found |= {name: scores.to_json() for name, scores in self.networks.items()}
        if self.reference_sets is not None:
            found["reference_sets"] = dict(self.reference_sets)
            if self.reconstruction is None:
                found["labels"] = self.labels
        if self.reconstruction is not None:
            found["reconstruction"] = {"images": self.reconstruction.images, **self.reconstruction.values}
            found["uint8_rounding"] = self.reconstruction.uint8_rounding
            found["tokenizer_sha256"] = self.reconstruction.tokenizer_sha256
        return found if self.published is None else {**found, "published": dict(self.published)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        values = with_todays_rounding(values)
        pairs = dict(values["reconstruction"]) if "reconstruction" in values else None
        return cls(
            ClassifierScores.from_json(values) if "samples" in values else None,
            {
                name: NetworkScores.from_json(scores)
                for name, scores in values.items()
                if isinstance(scores, dict) and "weights_sha256" in scores
            },
            values.get("reference_sets"),
            values.get("labels"),
            None
            if pairs is None
            else ReconstructionScores(pairs.pop("images"), pairs, values["uint8_rounding"], values["tokenizer_sha256"]),
            values.get("published"),
        )

    def values(self, metric: Metric) -> Mapping[str | None, Mapping[str, Any]]:
        """The parts that hold a metric's keys, by name of the reference (None: of the images alone)."""
        if metric.network in self.networks:
            scores = self.networks[metric.network]
            return dict(scores.references) if metric.against_references else {None: scores.of_samples}
        if metric.network == "reconstruction" and self.reconstruction is not None:
            return {None: self.reconstruction.values}
        if metric.network not in OF_SMALL_IMAGES or self.classifier is None:
            return {}
        samples = self.classifier.samples
        if not metric.against_references:
            return {None: samples.of_samples}
        return {name: {metric.name: value} for name, value in samples.by_reference.get(metric.name, {}).items()}

    def numbers(self, *, in_training: bool = False) -> list[Number]:
        """Every number that the metrics give, in the order of their list; those that could not be computed are left out."""
        return [
            Number(name, reference, value)
            for metric in METRICS
            for reference, values in self.values(metric).items()
            for name, value in (metric.training_numbers if in_training else metric.numbers)(values).items()
            if value is not None
        ]


@dataclass(frozen=True)
class CheckpointRecord:
    """The checkpoint that images were generated from."""

    path: str
    step: int
    sha256: list[str]  # of its files


@dataclass(frozen=True)
class SamplesRecord:
    """The images that were scored."""

    path: str  # `generated` where they were made for the scores
    identity: str
    images: int
    size: list[int]  # height and width in pixels
    preprocessing: str
    uint8_rounding: str  # how floats became uint8


@dataclass(frozen=True)
class Result:
    """One result.json. Everything but `seconds` and `provenance` is the same for any number of ranks."""

    images: ImageScores
    tokens: Mapping[str, Mapping[str, Any]] | None  # token predictions by set and context, as val_clean
    checkpoint: CheckpointRecord | None  # None = images alone
    samples: SamplesRecord
    sample: Mapping[str, Any] | None  # settings of sampling
    dtype: str | None
    evaluate: Mapping[str, Any]
    config: Mapping[str, Any] | None
    seconds: float
    provenance: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        rest = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {
            **rest,
            "images": self.images.to_json(),
            "checkpoint": None if self.checkpoint is None else asdict(self.checkpoint),
            "samples": asdict(self.samples),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        rest = {entry.name: values[entry.name] for entry in fields(cls)}
        checkpoint = None if rest["checkpoint"] is None else CheckpointRecord(**rest["checkpoint"])
        own = {
            "images": ImageScores.from_json(rest["images"]),
            "samples": SamplesRecord(**with_todays_rounding(rest["samples"])),
        }
        return cls(**{**rest, **own, "checkpoint": checkpoint})


def read_result(path: Path) -> Result:
    """Raises InputError when there is no result of an evaluation at the path."""
    try:
        return Result.from_json(read_json(path))
    except FileNotFoundError as error:
        raise InputError(f"not found: {path}, the result of an evaluation. launchers/evaluate.py writes it") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} holds no result of an evaluation. Make it again with launchers/evaluate.py"
        ) from error


def write_result(
    path: Path,
    cfg: ExperimentConfig,
    checkpoint: Checkpoint | None,
    samples: ImageSet,
    source: str,
    images: ImageScores,
    tokens: Mapping[str, Mapping[str, Any]] | None,
    seconds: float,
    world: World,
) -> None:
    """Rank 0 only. images: from evaluate.job; tokens: from analysis.token_prediction; source: where the images come from."""
    uint8_rounding = samples.uint8_rounding or "not known: the images came as uint8"
    size = [samples.height, samples.width]
    result = Result(
        images=images,
        tokens=tokens,
        checkpoint=None if checkpoint is None else _record(checkpoint),
        samples=SamplesRecord(source, samples.identity, samples.count, size, samples.preprocessing, uint8_rounding),
        sample=None if checkpoint is None else asdict(cfg.sample),
        dtype=None if checkpoint is None else cfg.train.precision,
        evaluate=asdict(cfg.evaluate),
        config=to_dict(cfg) if checkpoint is not None else None,
        seconds=round(seconds, 1),
        provenance=provenance(world),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(result.to_json(), indent=1) + "\n")


def _record(checkpoint: Checkpoint) -> CheckpointRecord:
    sha256 = [item["sha256"] for item in checkpoint.meta["files"]]
    return CheckpointRecord(str(checkpoint.path), checkpoint.step, sha256)


def check_result(path: Path) -> None:
    """Raises InputError when a result cannot be written there, or only over a file that is none."""
    if path.suffix != ".json" or path.is_dir():
        raise InputError(
            f"--out {path} {'is a folder' if path.is_dir() else 'does not end in .json'}. Name a file such as "
            f"{path / 'result.json' if path.is_dir() else path.with_suffix('.json')}"
        )
    if path.is_file() and path.stat().st_size > 0 and not _is_result(path):
        raise InputError(
            f"--out {path} is there and holds no result of an evaluation. Name another file, or move that one"
        )


def _is_result(path: Path) -> bool:
    try:
        found = read_json(path)
    except ValueError:
        return False
    return isinstance(found, dict) and {"images", "samples", "evaluate"} <= found.keys()


def summary(images: ImageScores, setting: str) -> dict[str, float]:
    """The scores under flat names (METRIC/REFERENCE, and the setting behind it where there are several), for dashboards."""
    return {
        "/".join(filter(None, (number.name, number.reference, setting))): number.value for number in images.numbers()
    }
