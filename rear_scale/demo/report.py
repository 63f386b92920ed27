"""The demo's report.html."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rear_scale.demo.recipe import MODELS, TITLES, Recipe
from rear_scale.demo.summary import table
from rear_scale.evaluate.images.npz import read_samples
from rear_scale.evaluate.networks.classifier import NUM_FEATURES
from rear_scale.evaluate.result import Result, read_result
from rear_scale.places import as_typed
from rear_scale.report.charts import Chart, Line
from rear_scale.report.curves import Curves
from rear_scale.report.figures import class_rows, grid
from rear_scale.report.page import Picture, Section, Table, write_page
from rear_scale.run.folder import read_metrics
from rear_scale.run.stages import Stage, StageFolder
from rear_scale.sample.sheets import FOLDER as GRIDS
from rear_scale.sample.uint8_rounding import to_uint8
from rear_scale.shards.images import open_images
from rear_scale.shards.walk import shown
from rear_scale.tokenizer import open_tokenizer
from rear_scale.tokenizer.base import to_unit_range

_PER_CLASS = 12
_CLASSES = 40  # that are shown at most
_RECONSTRUCTED = 24  # images that are shown beside their reconstructions


def write_report(recipe: Recipe, summary: dict[str, Any], stages: list[Stage], folder: StageFolder) -> Path:
    """The path of FOLDER/report.html, which is written from finished stages."""
    path = recipe.folder / "report.html"
    seed = summary["seeds"][0]
    result = read_result(recipe.run_folder("rear", seed) / "result.json")
    write_page(
        path,
        f"rear_scale demo: reAR and vanilla AR on {recipe.what}",
        [
            _samples(recipe, seed),
            _scores(recipe, summary, result),
            *([_reconstructions(recipe)] if recipe.yardsticks else []),
            _training(recipe, seed),
            _commands(stages, folder),
            _versions(result),
        ],
    )
    return path


def _samples(recipe: Recipe, seed: int) -> Section:
    held_out = open_images(recipe.images / "val")
    names = [shown(name) for name in held_out.class_names]
    rows = partial(class_rows, per_class=_PER_CLASS, classes=min(len(names), _CLASSES))
    pictures = [Picture(grid(rows(*held_out.load()), _PER_CLASS), "real validation images")]
    for model in MODELS:
        images, classes = read_samples(recipe.samples_file(model, seed))
        assert classes is not None
        pictures.append(Picture(grid(rows(images[:], classes), _PER_CLASS), TITLES[model]))
    more = f", the first {_CLASSES} of {len(names):,}" if len(names) > _CLASSES else ""
    text = (
        f"Each row is a class{more}: {', '.join(names[:_CLASSES])}. Training seed {seed}; the first {_PER_CLASS} samples of each "
        "class, not selected."
    )
    return Section("Samples", [text], rows_of_pictures=[("", pictures)])


@torch.inference_mode()
def _reconstructions(recipe: Recipe) -> Section:
    cfg = recipe.load("rear")
    tokenizer = open_tokenizer(cfg.tokenizer, torch.device("cpu"))
    images, _ = open_images(recipe.images / "val").load()
    # Evenly spaced: a folder's images are sorted by class.
    originals = images[np.unique(np.arange(_RECONSTRUCTED) * len(images) // _RECONSTRUCTED)]
    tokens = tokenizer.encode(to_unit_range(torch.from_numpy(originals)))
    decoded = to_uint8(tokenizer.decode(tokens).float(), cfg.sample.uint8_rounding)
    text = (
        f"Every generator draws {cfg.tokenizer.num_tokens} tokens of {cfg.tokenizer.codebook_size} codes per image, which this "
        "tokenizer turns into an image. So details that it loses in real images are missing in all samples, too."
    )
    pictures = [
        Picture(grid(originals, _PER_CLASS), "validation images"),
        Picture(grid(decoded, _PER_CLASS), "the same through the tokenizer"),
    ]
    return Section("The tokenizer", [text], rows_of_pictures=[("", pictures)])


def _scores(recipe: Recipe, summary: dict[str, Any], result: Result) -> Section:
    header, rows = table(recipe, summary)
    assert result.sample is not None
    guidance = result.sample["guidance"]
    drawn = f"""
Training seeds behind each number: {len(summary["seeds"])}. {summary["num_samples"]:,} samples per seed, {guidance["schedule"]}
guidance at scale {guidance["scale"]}. A ± is the standard deviation over seeds."""
    paragraphs = [drawn, *(_on_a_network() if recipe.yardsticks else _on_digits(recipe)), *_on_tokens(summary, result)]
    return Section("Scores", [" ".join(part.split()) for part in paragraphs], Table(header, rows))


def _on_digits(recipe: Recipe) -> list[str]:
    size = recipe.load("rear").tokenizer.image_size
    return [
        f"""
These are not FID figures: Inception says little about digits of {size} pixels. The Fréchet distance here is taken on
{NUM_FEATURES} features of a small digit classifier that was trained on the same training images, and class accuracy is that
classifier's agreement with the requested class. Both can be compared only within this page.""",
        """
The distance to the nearest training image is a root mean square difference in grey levels (0 to 255), averaged over the
samples. The last column gives it for held-out real digits; values far below that would indicate copies.""",
    ]


def _on_a_network() -> list[str]:
    return [
        """
These are not FID figures, which are taken on Inception and 256 pixels. The distances, precision, recall, density and coverage
are taken on the 1,280 features of EfficientNet-Lite0, trained on ImageNet, against the validation images. The column of
reconstructions holds the validation images after the tokenizer: what a generator would reach that drew the tokens of real images.
The column of real images holds training images, as many as there are validation images. A Fréchet distance falls with the number
of samples, so compare models with as many samples; the kernel distance does not depend on it.""",
        f"""
Class accuracy is the agreement of a small classifier, trained on the training images alone, with the class that was asked for;
in the column of real images, its accuracy on the validation images. The other Fréchet distance is taken on its
{NUM_FEATURES} features.""",
    ]


def _on_tokens(summary: dict[str, Any], result: Result) -> list[str]:
    assert result.tokens is not None
    draws = result.tokens["val_noisy"]["draws"]
    ratios = [
        f"{TITLES[model]} {_mean(summary[model]['ctr_train']):.3f} against {_mean(summary[model]['ctr_clean']):.3f}"
        for model in MODELS
    ]
    return [
        f"""
The correct token ratio is the share of right next-token predictions when the true tokens are the context. For the noisy one
(reAR, appendix C.1), each context token is replaced with probability {summary["replace_rate"]:g} by a random one, over
{draws} fixed draws that are the same for both models.""",
        f"""
Memorisation shows as a higher ratio on training images than on validation images: {"; ".join(ratios)}.""",
    ]


def _mean(value: float | dict[str, Any]) -> float:
    return value["mean"] if isinstance(value, dict) else value


def _training(recipe: Recipe, seed: int) -> Section:
    charts = [
        _chart(recipe, seed, "loss_ar", "cross-entropy per token, on the training batches"),
        _chart(recipe, seed, "accuracy", "fraction of correct predictions, on the training batches"),
    ]
    pictures = []
    for model in MODELS:
        for sheet in sorted((recipe.run_folder(model, seed) / GRIDS).glob("*.png")):
            pictures.append(Picture(sheet.read_bytes(), f"{TITLES[model]}: samples during training, {sheet.stem}"))
    steps = read_metrics(recipe.run_folder("rear", seed))
    last = max((line["step"] for line in steps if line["noise_max"] > 0), default=0)
    text = f"reAR predicts from noisy context up to step {last} of {steps[-1]['step']}, so its curves are worse until then."
    return Section("Training", [text], charts=charts, rows_of_pictures=[("", pictures)] if pictures else [])


def _chart(recipe: Recipe, seed: int, metric: str, title: str) -> Chart:
    """The curves of both models over images seen."""
    lines = []
    for color, model in enumerate(MODELS):
        read = Curves(recipe.run_folder(model, seed) / "metrics.jsonl")
        read.update()
        curve = read.curve(metric)
        assert curve is not None, metric
        lines.append(Line(TITLES[model], curve.images, curve.mean, curve.low, curve.high, color))
    return Chart(title, lines, x_label="images seen")


def _commands(stages: list[Stage], folder: StageFolder) -> Section:
    lines = [f"{as_typed(stage.line)}   # {folder.seconds(stage):.0f} s" for stage in stages]
    return Section("Commands", ["Each stage can be run by itself in the project's root."], code="\n".join(lines))


def _versions(result: Result) -> Section:
    provenance = result.provenance
    rows = [[name, version] for name, version in provenance["versions"].items()]
    rows.append(["device", f"{provenance['device']}, {provenance['world_size']} processes"])
    rows.append(["commit", str(provenance["commit"])])
    return Section("Made with", table=Table(["", ""], rows))
