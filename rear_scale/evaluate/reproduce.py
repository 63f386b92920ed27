"""Reproduction of published results: the files of each published model, their sources, and the expected scores."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from rear_scale import config
from rear_scale.checkpoint.folder import Checkpoint
from rear_scale.checkpoint.open import WeightFile
from rear_scale.config import ExperimentConfig, InputError, to_dict
from rear_scale.evaluate.images.generated import generated_images
from rear_scale.evaluate.job import Evaluation
from rear_scale.evaluate.networks.inception import INCEPTION
from rear_scale.evaluate.networks.weights import PublishedFile, read_weight_file
from rear_scale.evaluate.published import (
    ACCEPTED_FID_DIFFERENCE,
    PUBLISHED_SAMPLES,
    ROWS,
    PublishedRow,
    our_rows,
    table,
)
from rear_scale.evaluate.result import NetworkScores, write_result
from rear_scale.model import Generator
from rear_scale.progress import say
from rear_scale.sample.job import load_generator
from rear_scale.tokenizer import open_tokenizer
from rear_scale.world import World

_TITOK_FILES = "https://huggingface.co/fun-research/TiTok"
_RAR_FILES = "https://huggingface.co/yucornetto/RAR"
_REAR_FILES = "https://huggingface.co/qyoo/reAR"
_ALITOK_FILES = "https://github.com/ali-vilab/alitok, which links its files"

MASKGIT_VQGAN = PublishedFile("maskgit-vqgan-imagenet-f16-256.bin", _TITOK_FILES, None)
ALITOK = PublishedFile("AliTok.pth", _ALITOK_FILES, None)
ADM_REFERENCE = PublishedFile(
    "VIRTUAL_imagenet256_labeled.npz", "https://github.com/openai/guided-diffusion/tree/main/evaluations", None
)
VALIDATION = PublishedFile(
    "imagenet_val", "https://image-net.org: the 50,000 validation images in a folder or as tar shards", None
)


@dataclass(frozen=True)
class Entry:
    """One published model. `name` is the key of its published row and the name of its config in configs/official."""

    name: str
    generator: PublishedFile
    tokenizer: PublishedFile
    overrides: tuple[str, ...] = ()  # settings of the published row that differ from the released config
    config: str | None = None  # None = official/NAME.yaml

    @property
    def row(self) -> PublishedRow:
        return ROWS[self.name]

    def load_config(self, folder: Path, overrides: Sequence[str]) -> ExperimentConfig:
        """The config with all files in one folder, and with those of the two reference sets that exist there."""
        values = [
            "train.precision=fp32",  # as the released samplers, which use no half precision
            *self.overrides,
            f"tokenizer.weights={folder / self.tokenizer.name}",
            f"evaluate.inception_weights={folder / INCEPTION.name}",
        ]
        cfg = config.load(self.config or f"official/{self.name}.yaml", [*values, *overrides])
        if not cfg.evaluate.reference:
            sets = {"adm": folder / ADM_REFERENCE.name, "validation": folder / VALIDATION.name}
            existing = {name: str(path) for name, path in sets.items() if name == "adm" or path.exists()}
            cfg = replace(cfg, evaluate=replace(cfg.evaluate, reference=existing))
        return cfg

    def missing(self, cfg: ExperimentConfig, folder: Path) -> list[str]:
        """A line for each required file that does not exist."""
        settings = (
            ("tokenizer.weights", cfg.tokenizer.weights, self.tokenizer),
            ("evaluate.inception_weights", cfg.evaluate.inception_weights, INCEPTION),
        )
        unset = [
            f"not set: {name} ({file.name}, published at {file.source})" for name, path, file in settings if not path
        ]
        wanted = [
            (folder / self.generator.name, self.generator),
            *((Path(path), file) for _, path, file in settings if path),
            *(
                (Path(path), ADM_REFERENCE if name == "adm" else VALIDATION)
                for name, path in cfg.evaluate.reference.items()
            ),
        ]
        return unset + [
            f"not found: {path} ({file.name}, published at {file.source})" for path, file in wanted if not path.exists()
        ]

    def left_out(self, cfg: ExperimentConfig, folder: Path) -> list[str]:
        """Notes about optional files that do not exist: the validation images, which are large."""
        if set(cfg.evaluate.reference) != {"adm"}:
            return []
        return [f"without {folder / VALIDATION.name} ({VALIDATION.source}): no row against the validation images"]


def _rear(size: str, scale: float, power: float) -> Entry:
    # Appendix A of the paper; the released configs of B and L have other values.
    guidance = (f"sample.guidance.scale={scale}", f"sample.guidance.power={power}")
    generator = PublishedFile(f"reAR-{size}.safetensors", _REAR_FILES, None)
    return Entry(f"rear_{size.lower()}", generator, MASKGIT_VQGAN, guidance)


ENTRIES = {
    entry.name: entry
    for entry in (
        *(
            Entry(
                f"rar_{size}",
                PublishedFile(f"rar_{size}.bin", _RAR_FILES, None),
                MASKGIT_VQGAN,
                config=f"rar_{size}.yaml",
            )
            for size in ("b", "l", "xl", "xxl")
        ),
        _rear("S", 22.0, 2.75),
        _rear("B", 14.5, 2.25),
        _rear("L", 10.0, 1.75),
        Entry("alitok_b", PublishedFile("alitok_b.bin", _ALITOK_FILES, None), ALITOK, config="ar_alitok_b.yaml"),
    )
}


def entry_of(name: str) -> Entry:
    """The published model of a name. Raises InputError for an unknown one."""
    if name not in ENTRIES:
        raise InputError(f"{name} is not one of the published models {', '.join(ENTRIES)}. Use one of them")
    return ENTRIES[name]


def open_generator(
    entry: Entry, cfg: ExperimentConfig, folder: Path, device: torch.device
) -> tuple[Generator, Checkpoint]:
    """The generator of a published file, in eval mode, and a Checkpoint that identifies the file in results.

    The file may have heads, which sampling does not need. Raises InputError when the file does not fit the config's model.
    """
    path = folder / entry.generator.name
    weights = read_weight_file(path, "--weights", entry.generator)
    meta = {"step": 0, "files": [{"file": path.name, "sha256": weights.sha256}], "config": to_dict(cfg)}
    return load_generator(cfg, WeightFile(path, meta, weights.state), device), Checkpoint(path, meta)


def reproduce(
    entry: Entry, cfg: ExperimentConfig, folder: Path, out: Path, evaluation: Evaluation, world: World
) -> list[str]:
    """Lines for the user, after sampling and scoring one published model and writing out/result.json.

    All ranks must call this. evaluation: an Evaluation of the same config.
    """
    started = time.monotonic()
    tokenizer = open_tokenizer(cfg.tokenizer, world.device)
    model, checkpoint = open_generator(entry, cfg, folder, world.device)
    samples = generated_images(cfg, checkpoint, model, tokenizer, world)
    images = evaluation.score(samples)
    judged = verdicts(entry.row, images.networks["inception"])
    images = replace(images, published={**asdict(entry.row), "verdicts": [asdict(verdict) for verdict in judged]})
    if world.is_main:
        seconds = time.monotonic() - started
        write_result(out / "result.json", cfg, checkpoint, samples, "generated", images, None, seconds, world)
        say(f"{out / 'result.json'}: written")
    ours = our_rows(f"{entry.name}, ours", images, (samples.height, samples.width))
    return [table(ours, {entry.name: entry.row}), *(verdict.text for verdict in judged)]


@dataclass(frozen=True)
class Verdict:
    """Whether a published FID was reproduced, against one reference."""

    reference: str
    fid: float | None  # None = too few samples
    published_fid: float
    accepted: bool | None  # None = not comparable
    text: str


def verdicts(row: PublishedRow, scores: NetworkScores) -> list[Verdict]:
    """The verdicts on the scores by Inception, one per reference."""
    judged = []
    for name, against in scores.references.items():
        fid = against["fid"]
        if fid is None:
            text = f"{row.model} against {name}: no FID of {scores.samples:,} samples, published {row.fid:.2f}"
            judged.append(Verdict(name, None, row.fid, None, f"{text}: not comparable"))
            continue
        difference = fid - row.fid
        text = f"{row.model} against {name}: FID {fid:.3f}, published {row.fid:.2f} ({difference:+.3f})"
        if scores.samples != PUBLISHED_SAMPLES:
            accepted, reason = None, f"not comparable: {scores.samples:,} samples instead of {PUBLISHED_SAMPLES:,}"
        elif not scores.weights_are_published:
            accepted, reason = None, "not comparable: other Inception weights than the published ones"
        else:
            accepted = abs(difference) <= ACCEPTED_FID_DIFFERENCE
            reason = f"{'within' if accepted else 'outside'} +-{ACCEPTED_FID_DIFFERENCE}"
        judged.append(Verdict(name, fid, row.fid, accepted, f"{text}: {reason}"))
    return judged
