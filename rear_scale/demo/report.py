"""report.html of the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rear_scale.config import load
from rear_scale.demo.commands import FOLDER, MODELS, run_folder, samples_file
from rear_scale.demo.summary import table
from rear_scale.evaluate.images.npz import read_samples
from rear_scale.evaluate.networks.classifier import NUM_FEATURES
from rear_scale.evaluate.result import Result, read_result
from rear_scale.places import as_typed
from rear_scale.report.figures import class_rows, curves, grid
from rear_scale.report.page import Picture, Section, Table, write_page
from rear_scale.run.folder import read_metrics
from rear_scale.run.stages import Stage, StageFolder
from rear_scale.sample.sheets import FOLDER as GRIDS
from rear_scale.shards.images import open_images

_PER_CLASS = 12
_TITLES = {"ar": "vanilla AR", "rear": "reAR"}


def write_report(summary: dict[str, Any], stages: list[Stage], folder: StageFolder) -> Path:
    """Writes FOLDER/report.html from finished stages. Returns its path."""
    path = FOLDER / "report.html"
    seed = summary["seeds"][0]
    result = read_result(run_folder("rear", seed) / "result.json")
    write_page(
        path,
        "rear_scale demo: reAR and vanilla AR on handwritten digits",
        [
            _samples(seed),
            _scores(summary, result),
            _training(seed),
            _commands(stages, folder),
            _versions(result),
        ],
    )
    return path


def _samples(seed: int) -> Section:
    cfg = load("demo.yaml")
    digits, labels = open_images(cfg.evaluate.reference["validation"]).load()
    pictures = [Picture(grid(class_rows(digits, labels, _PER_CLASS), _PER_CLASS), "real validation digits")]
    for model in MODELS:
        images, classes = read_samples(samples_file(model, seed))
        assert classes is not None
        pictures.append(Picture(grid(class_rows(images[:], classes, _PER_CLASS), _PER_CLASS), _TITLES[model]))
    text = f"Each row is a class. Training seed {seed}; the first {_PER_CLASS} samples of each class, not selected."
    return Section("Samples", [text], pictures=pictures)


def _scores(summary: dict[str, Any], result: Result) -> Section:
    header, rows = table(summary)
    assert result.sample is not None
    assert result.tokens is not None
    guidance, draws = result.sample["guidance"], result.tokens["val_noisy"]["draws"]
    size = load("demo.yaml").tokenizer.image_size
    ratios = [
        f"{_TITLES[model]} {_mean(summary[model]['ctr_train']):.3f} against {_mean(summary[model]['ctr_clean']):.3f}"
        for model in MODELS
    ]
    text = f"""
Training seeds behind each number: {len(summary["seeds"])}. {summary["num_samples"]:,} samples per seed, {guidance["schedule"]}
guidance at scale {guidance["scale"]}. A ± is the standard deviation over seeds.

These are not FID figures: Inception says little about digits of {size} pixels. The Fréchet distance here is taken on
{NUM_FEATURES} features of a small digit classifier that was trained on the same training images, and class accuracy is that
classifier's agreement with the class that was asked for. Both compare inside this page only.

The distance to the nearest training image is a root mean square difference in grey levels (0 to 255), averaged over the
samples. The last column gives it for real digits that were held out; values far below it would mean copies.

The correct token ratio is the share of right next-token predictions when the true tokens are the context. For the noisy one
(reAR, appendix C.1), each context token is replaced with probability {summary["replace_rate"]:g} by a random one, over
{draws} fixed draws that are the same for both models.

What a model has memorised shows in its ratio on training images against that on validation images: {"; ".join(ratios)}."""
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    return Section("Scores", paragraphs, Table(header, rows))


def _mean(value: float | dict[str, Any]) -> float:
    return value["mean"] if isinstance(value, dict) else value


def _training(seed: int) -> Section:
    metrics = {_TITLES[model]: read_metrics(run_folder(model, seed)) for model in MODELS}
    pictures = [
        Picture(curves(metrics, "loss_ar", "cross-entropy per token"), "cross-entropy on the training batches"),
        Picture(curves(metrics, "accuracy", "share of correct predictions"), "accuracy on the training batches"),
    ]
    for model in MODELS:
        for sheet in sorted((run_folder(model, seed) / GRIDS).glob("*.png")):
            pictures.append(Picture(sheet.read_bytes(), f"{_TITLES[model]}: samples during training, {sheet.stem}"))
    steps = read_metrics(run_folder("rear", seed))
    last = max((line["step"] for line in steps if line["noise_max"] > 0), default=0)
    text = f"reAR predicts from noisy context up to step {last} of {steps[-1]['step']}, so its curves are worse until then."
    return Section("Training", [text], pictures=pictures)


def _commands(stages: list[Stage], folder: StageFolder) -> Section:
    lines = [f"{as_typed(stage.line)}   # {folder.seconds(stage):.0f} s" for stage in stages]
    return Section("Commands", ["Each stage can be typed by itself, from the project's root."], code="\n".join(lines))


def _versions(result: Result) -> Section:
    provenance = result.provenance
    rows = [[name, version] for name, version in provenance["versions"].items()]
    rows.append(["device", f"{provenance['device']}, {provenance['world_size']} processes"])
    rows.append(["commit", str(provenance["commit"])])
    return Section("Made with", table=Table(["", ""], rows))
