"""result.json: all scores of one evaluation with their inputs and settings; writing and reading."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from rear_scale.checkpoint.average import KEY as AVERAGE
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

OF_SMALL_IMAGES = ("classifier", "pixels")  # extractors whose metrics are part of ClassifierScores


@dataclass(frozen=True)
class NetworkScores:
    """Scores by the features of one published network."""

    weights_sha256: str
    weights_are_published: bool | None  # None = their publisher gives no checksum
    samples: int  # number of images
    of_samples: Mapping[str, Any]  # scores without a reference, by key
    references: Mapping[str, Mapping[str, Any]]  # scores against references, by name of the reference and key

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
        return cls(
            weights_sha256=rest.pop("weights_sha256"),
            weights_are_published=rest.pop("weights_are_published"),
            samples=rest.pop("samples"),
            references=rest.pop("references"),
            of_samples=rest,
        )


@dataclass(frozen=True)
class SetScores:
    """Scores of one set of small images by the config's own classifier."""

    count: int  # number of images
    of_samples: Mapping[str, Any]  # scores without a reference, by key
    by_reference: Mapping[
        str, Mapping[str, float | None]
    ]  # scores against references, by key and name of the reference

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, **self.of_samples, **self.by_reference}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        scores = {key: value for key, value in values.items() if key != "count"}
        of_samples = {key: value for key, value in scores.items() if not isinstance(value, dict)}
        return cls(values["count"], of_samples, {key: scores[key] for key in scores if key not in of_samples})


@dataclass(frozen=True)
class ClassifierScores:
    """Scores of the samples by the config's own classifier, and those of the references against each other for comparison."""

    features: str  # the layer and the weights that give the features
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
    reference: str | None  # None = a score without a reference
    value: float


@dataclass(frozen=True)
class ReconstructionScores:
    """Differences between a tokenizer's reconstructions and their originals."""

    images: int
    values: Mapping[str, Any]  # by key
    uint8_rounding: str  # the rule that rounded floats to uint8
    tokenizer_sha256: str


@dataclass(frozen=True)
class ImageScores:
    """All scores of one set of images: the field `images` of result.json."""

    classifier: ClassifierScores | None = None
    networks: Mapping[str, NetworkScores] = field(default_factory=dict)
    reference_sets: Mapping[str, Any] | None = None  # descriptions of the references of `networks`, by name
    labels: Mapping[str, Any] | None = None  # the number of images of each class; None = the images have no classes
    reconstruction: ReconstructionScores | None = None
    published: Mapping[str, Any] | None = None  # the published scores of the same model, with verdicts

    def to_json(self) -> dict[str, Any]:
        fields_of_json = {} if self.classifier is None else self.classifier.to_json()
        fields_of_json |= {name: scores.to_json() for name, scores in self.networks.items()}
        if self.reference_sets is not None:
            fields_of_json["reference_sets"] = dict(self.reference_sets)
            if self.reconstruction is None:
                fields_of_json["labels"] = self.labels
        if self.reconstruction is not None:
            fields_of_json["reconstruction"] = {"images": self.reconstruction.images, **self.reconstruction.values}
            fields_of_json["uint8_rounding"] = self.reconstruction.uint8_rounding
            fields_of_json["tokenizer_sha256"] = self.reconstruction.tokenizer_sha256
        return fields_of_json if self.published is None else {**fields_of_json, "published": dict(self.published)}

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
        """The dicts that hold a metric's keys, by name of the reference (None: scores without a reference)."""
        if metric.network in self.networks:
            scores = self.networks[metric.network]
            if not metric.against_references:
                return {None: scores.of_samples}
            return dict(scores.references.items())
        if metric.network == "reconstruction" and self.reconstruction is not None:
            return {None: self.reconstruction.values}
        if metric.network not in OF_SMALL_IMAGES or self.classifier is None:
            return {}
        samples = self.classifier.samples
        if not metric.against_references:
            return {None: samples.of_samples}
        return {name: {metric.name: value} for name, value in samples.by_reference.get(metric.name, {}).items()}

    def numbers(self, *, in_training: bool = False) -> list[Number]:
        """All numbers of the metrics, in the order of METRICS, without those that could not be computed."""
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
    average: Mapping[str, Any] | None = None  # how an average was made (--ema); None = the weights themselves


@dataclass(frozen=True)
class SamplesRecord:
    """The images that were scored."""

    path: str  # "generated" where the images were made for this evaluation
    identity: str
    images: int
    size: list[int]  # height and width in pixels
    preprocessing: str
    uint8_rounding: str  # the rule that rounded floats to uint8


@dataclass(frozen=True)
class Result:
    """The contents of result.json. All but `seconds` and `provenance` are the same for any number of ranks."""

    images: ImageScores
    tokens: Mapping[str, Mapping[str, Any]] | None  # token predictions by set and context, such as val_clean
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
    """The result in a file. Raises InputError when the file does not exist or holds no evaluation result."""
    try:
        return Result.from_json(read_json(path))
    except FileNotFoundError as error:
        raise InputError(f"not found: {path}, the result of an evaluation. launchers/evaluate.py writes it") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} does not hold an evaluation result. Make it again with launchers/evaluate.py"
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
    """Writes result.json; rank 0 only. images: from evaluate.job; tokens: from analysis.token_prediction; source: the origin of
    the images."""
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
    return CheckpointRecord(str(checkpoint.path), checkpoint.step, sha256, checkpoint.meta.get(AVERAGE))


def check_result(path: Path) -> None:
    """Raises InputError when a result cannot be written to this path, or would replace a file that is not a result."""
    if path.suffix != ".json" or path.is_dir():
        raise InputError(
            f"--out {path} {'is a folder' if path.is_dir() else 'does not end in .json'}. Name a file such as "
            f"{path / 'result.json' if path.is_dir() else path.with_suffix('.json')}"
        )
    if path.is_file() and path.stat().st_size > 0 and not _is_result(path):
        raise InputError(
            f"--out {path} exists and does not hold an evaluation result. Choose another file, or move that one"
        )


def _is_result(path: Path) -> bool:
    try:
        contents = read_json(path)
    except ValueError:
        return False
    return isinstance(contents, dict) and {"images", "samples", "evaluate"} <= contents.keys()


def summary(images: ImageScores, setting: str) -> dict[str, float]:
    """All scores under flat names for dashboards: METRIC/REFERENCE, or METRIC/REFERENCE/SETTING with several settings."""
    return {
        "/".join(filter(None, (number.name, number.reference, setting))): number.value for number in images.numbers()
    }


def json_line(name: str, path: Path, images: ImageScores) -> str:
    """One line of JSON: the name of the set of images, the path of its result, its scores under flat names
    (METRIC/REFERENCE), and by reference the notes that a reader of the scores needs."""
    notes: dict[str, list[str]] = {}
    for network in images.networks.values():
        for reference, values in network.references.items():
            notes[reference] = list(dict.fromkeys([*notes.get(reference, []), *values.get("notes", [])]))
    return json.dumps({"name": name, "result": str(path), "scores": summary(images, ""), "notes": notes})
