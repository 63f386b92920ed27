"""summary.json of a demo: the scores of both models, with the spread over seeds where there are several."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rear_scale.demo.recipe import MODELS, TITLES, Recipe
from rear_scale.evaluate.metrics import METRICS
from rear_scale.evaluate.metrics.base import Metric
from rear_scale.evaluate.result import OF_SMALL_IMAGES, ImageScores, Result, SetScores, read_result
from rear_scale.files import write_text_atomically
from rear_scale.text_table import aligned

# (metric, reference) -> name in summary.json where it is not METRIC or METRIC_REFERENCE; None = not in the summary
_NAMES: dict[tuple[str, str | None], str | None] = {
    ("frechet_distance", "validation"): "frechet_distance",
    ("frechet_distance", "training"): "frechet_distance_train",
    ("nearest_distance", "validation"): None,  # not of interest: only training images can have been memorised
    ("nearest_distance", "training"): "nearest_distance",
}
NETWORK = "efficientnet"  # of the distances on a real network
# name in summary.json -> (title in the report, decimal places)
Scores = dict[str, tuple[str, int]]
_OF_NETWORK: Scores = {
    "fd_efficientnet": ("Fréchet distance on EfficientNet-Lite0 to the validation images", 2),
    "kd_efficientnet": ("kernel distance on EfficientNet-Lite0", 5),
    "precision": ("precision on EfficientNet-Lite0", 3),
    "recall": ("recall on EfficientNet-Lite0", 3),
    "density": ("density on EfficientNet-Lite0", 3),
    "coverage": ("coverage on EfficientNet-Lite0", 3),
}
_OF_TOKENS: Scores = {
    "ctr_clean": ("correct token ratio, validation, clean context", 4),
    "ctr_noisy": ("correct token ratio, validation, {replaced} of the context replaced", 4),
    "ctr_train": ("correct token ratio, training, clean context", 4),
    "perplexity": ("perplexity, validation, clean context", 3),
    "perplexity_noisy": ("perplexity, validation, {replaced} of the context replaced", 3),
}
_OF_TOKENIZER: Scores = {
    "psnr": ("PSNR of the tokenizer's reconstructions, dB", 2),
    "codebook_used": ("share of the tokenizer's codes in use", 3),
}


def scores_of(recipe: Recipe) -> Scores:
    """The scores of each model, in the order of the table."""
    references = recipe.load("rear").evaluate.reference
    of_small = {
        name: ((metric.label or name).format(reference=reference), metric.digits)
        for name, (metric, reference) in _small_metrics(references).items()
    }
    return {**of_small, **(_OF_NETWORK if recipe.yardsticks else {}), **_OF_TOKENS}


def _small_metrics(references: Mapping[str, str]) -> dict[str, tuple[Metric, str | None]]:
    """The metrics of small images with each reference, by name in summary.json."""
    metrics = [metric for metric in METRICS if metric.network in OF_SMALL_IMAGES]
    pairs = [
        (metric, reference)
        for metric in metrics
        for reference in (references if metric.against_references else (None,))
    ]
    named = {pair: _NAMES.get((pair[0].name, pair[1]), _plain(*pair)) for pair in pairs}
    return {name: pair for pair, name in named.items() if name is not None}


def _plain(metric: Metric, reference: str | None) -> str:
    return metric.name if reference is None else f"{metric.name}_{reference}"


def write_summary(recipe: Recipe, seeds: list[int]) -> dict[str, Any]:
    """The contents of FOLDER/summary.json, which is written from the result.json of each run."""
    results = {
        model: [read_result(recipe.run_folder(model, seed) / "result.json") for seed in seeds] for model in MODELS
    }
    summary: dict[str, Any] = {}
    names = scores_of(recipe)
    for model, of_seeds in results.items():
        scores = [_scores(recipe, result) for result in of_seeds]
        summary[model] = {
            "run_dir": str(recipe.run_folder(model, seeds[0])),
            "samples": str(recipe.samples_file(model, seeds[0])),
            **{name: _over_seeds([score[name] for score in scores]) for name in names},
        }
    images = results["ar"][0].images.classifier
    assert images is not None, "the demo's config has a classifier"
    summary["real"] = _image_scores(recipe, images.references["validation"])
    if recipe.yardsticks:
        summary["real"] |= _network_scores(read_result(recipe.held_in).images, "validation")
        reconstruction = read_result(recipe.reconstruction).images
        assert reconstruction.reconstruction is not None
        of_tokenizer = {name: reconstruction.reconstruction.values[name] for name in _OF_TOKENIZER}
        summary["tokenizer"] = {**_network_scores(reconstruction, "originals"), **of_tokenizer}
    summary["seeds"] = seeds
    summary["num_samples"] = images.samples.count
    summary["features"] = images.features
    summary["replace_rate"] = results["ar"][0].evaluate["replace_rate"]
    write_text_atomically(recipe.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def _scores(recipe: Recipe, result: Result) -> dict[str, float | None]:
    tokens, images = result.tokens, result.images.classifier
    assert tokens is not None
    assert images is not None
    return {
        **_image_scores(recipe, images.samples),
        **(_network_scores(result.images, "validation") if recipe.yardsticks else {}),
        "ctr_clean": tokens["val_clean"]["ctr"],
        "ctr_noisy": tokens["val_noisy"]["ctr"],
        "ctr_train": tokens["train_clean"]["ctr"],
        "perplexity": tokens["val_clean"]["perplexity"],
        "perplexity_noisy": tokens["val_noisy"]["perplexity"],
    }


def _image_scores(recipe: Recipe, scores: SetScores) -> dict[str, float | None]:
    """The scores by name in summary.json, without those of a reference against itself."""
    scores_by_name: dict[str, Any] = {}
    for name, (metric, reference) in _small_metrics(recipe.load("rear").evaluate.reference).items():
        values = scores.of_samples if reference is None else scores.by_reference.get(metric.name, {})
        key = metric.name if reference is None else reference
        if key in values:
            scores_by_name[name] = values[key]
    return scores_by_name


def _network_scores(images: ImageScores, reference: str) -> dict[str, float | None]:
    """The scores on the network against one reference, by name in summary.json; None where there are too few images for one."""
    values = images.networks[NETWORK].references[reference]
    shares = {name: (values[name] or {}).get("exact") for name in ("precision", "recall", "density", "coverage")}
    return {
        "fd_efficientnet": values["fd_efficientnet"],
        "kd_efficientnet": (values["kd_efficientnet"] or {}).get("value"),
        **shares,
    }


def _over_seeds(scores: list[float | None]) -> float | dict[str, Any] | None:
    """The score of one seed, or mean and spread of several; None where one of them has none."""
    values = [score for score in scores if score is not None]
    if len(values) < len(scores):
        return None
    if len(values) == 1:
        return values[0]
    return {"mean": statistics.mean(values), "std": statistics.stdev(values), "values": values}


def table(recipe: Recipe, summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table, as text."""
    count = len(summary["seeds"])
    columns = {model: f"{TITLES[model]} ({count} seed{'s' if count > 1 else ''})" for model in MODELS}
    names = scores_of(recipe)
    if recipe.yardsticks:
        columns["tokenizer"] = "reconstructions"
        names = {**names, **_OF_TOKENIZER}
    columns["real"] = f"real {'images' if recipe.yardsticks else 'validation digits'}"
    replaced = f"{100 * summary['replace_rate']:g}%"
    rows = [
        [title.format(replaced=replaced), *(_cell(summary[column].get(name), digits) for column in columns)]
        for name, (title, digits) in names.items()
    ]
    return ["", *columns.values()], rows


def _cell(value: float | dict[str, Any] | None, digits: int) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return f"{value['mean']:.{digits}f} ± {value['std']:.{digits}f}"
    return f"{value:.{digits}f}"


def accuracy(summary: dict[str, Any]) -> str:
    """The class accuracy of reAR's samples, with its spread over seeds."""
    return _cell(summary["rear"].get("class_accuracy"), 3)


def print_table(recipe: Recipe, summary: dict[str, Any], report: Path) -> None:
    header, rows = table(recipe, summary)
    print(aligned([header, *rows]))
    print(f"report: {report}", flush=True)
