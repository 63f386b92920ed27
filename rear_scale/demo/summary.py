"""summary.json of the demo: the scores of both models, with the spread over seeds where there are several."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from rear_scale.demo.commands import FOLDER, MODELS, run_folder, samples_file
from rear_scale.evaluate.metrics import METRICS
from rear_scale.evaluate.metrics.base import Metric
from rear_scale.evaluate.result import OF_SMALL_IMAGES, Result, SetScores, read_result
from rear_scale.files import write_text_atomically
from rear_scale.text_table import aligned

# (metric, reference) -> name in summary.json where it is not METRIC or METRIC_REFERENCE; None = not in the summary
_NAMES = {
    ("frechet_distance", "validation"): "frechet_distance",
    ("frechet_distance", "training"): "frechet_distance_train",
    ("nearest_distance", "validation"): None,  # only training images can have been memorised
    ("nearest_distance", "training"): "nearest_distance",
}


def _name(metric: Metric, reference: str | None) -> str | None:
    plain = metric.name if reference is None else f"{metric.name}_{reference}"
    return _NAMES.get((metric.name, reference), plain)


def _of_images() -> dict[str, tuple[Metric, str | None]]:
    """By name in summary.json: the metrics of small images, each against each of the demo's references."""
    metrics = [metric for metric in METRICS if metric.network in OF_SMALL_IMAGES]
    pairs = [
        (metric, reference)
        for metric in metrics
        for reference in (("validation", "training") if metric.against_references else (None,))
    ]
    return {name: pair for pair in pairs if (name := _name(*pair)) is not None}


# name in summary.json -> (what the report calls it, digits)
SCORES = {
    **{
        name: ((metric.label or name).format(reference=reference), metric.digits)
        for name, (metric, reference) in _of_images().items()
    },
    "ctr_clean": ("correct token ratio, validation, clean context", 4),
    "ctr_noisy": ("correct token ratio, validation, {replaced} of the context replaced", 4),
    "ctr_train": ("correct token ratio, training, clean context", 4),
    "perplexity": ("perplexity, validation, clean context", 3),
    "perplexity_noisy": ("perplexity, validation, {replaced} of the context replaced", 3),
}


def write_summary(seeds: list[int]) -> dict[str, Any]:
    """Reads each run's result.json and writes FOLDER/summary.json. Returns its content."""
    results = {model: [read_result(run_folder(model, seed) / "result.json") for seed in seeds] for model in MODELS}
    summary: dict[str, Any] = {}
    for model, found in results.items():
        scores = [_scores(result) for result in found]
        summary[model] = {
            "run_dir": str(run_folder(model, seeds[0])),
            "samples": str(samples_file(model, seeds[0])),
            **{name: _over_seeds([score[name] for score in scores]) for name in SCORES},
        }
    images = results["ar"][0].images.classifier
    assert images is not None, "the demo's config has a classifier"
    summary["real"] = _image_scores(images.references["validation"])
    summary["seeds"] = seeds
    summary["num_samples"] = images.samples.count
    summary["features"] = images.features
    summary["replace_rate"] = results["ar"][0].evaluate["replace_rate"]
    write_text_atomically(FOLDER / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def _scores(result: Result) -> dict[str, float]:
    tokens, images = result.tokens, result.images.classifier
    assert tokens is not None
    assert images is not None
    return {
        **_image_scores(images.samples),
        "ctr_clean": tokens["val_clean"]["ctr"],
        "ctr_noisy": tokens["val_noisy"]["ctr"],
        "ctr_train": tokens["train_clean"]["ctr"],
        "perplexity": tokens["val_clean"]["perplexity"],
        "perplexity_noisy": tokens["val_noisy"]["perplexity"],
    }


def _image_scores(scores: SetScores) -> dict[str, float]:
    """By name in summary.json; a reference is not compared with itself."""
    found = {}
    for name, (metric, reference) in _of_images().items():
        values = scores.of_samples if reference is None else scores.by_reference.get(metric.name, {})
        key = metric.name if reference is None else reference
        if key in values:
            found[name] = values[key]
    return found


def _over_seeds(values: list[float]) -> float | dict[str, Any]:
    if len(values) == 1:
        return values[0]
    return {"mean": statistics.mean(values), "std": statistics.stdev(values), "values": values}


def table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, as text."""
    count = len(summary["seeds"])
    header = [
        "",
        *(f"{name} ({count} seed{'s' if count > 1 else ''})" for name in ("vanilla AR", "reAR")),
        "real validation digits",
    ]
    replaced = f"{100 * summary['replace_rate']:g}%"
    rows = [
        [
            title.format(replaced=replaced),
            *(_cell(summary[column].get(name), digits) for column in ("ar", "rear", "real")),
        ]
        for name, (title, digits) in SCORES.items()
    ]
    return header, rows


def _cell(value: float | dict[str, Any] | None, digits: int) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return f"{value['mean']:.{digits}f} ± {value['std']:.{digits}f}"
    return f"{value:.{digits}f}"


def accuracy(summary: dict[str, Any]) -> str:
    """That of reAR's samples, with its spread over seeds."""
    return _cell(summary["rear"].get("class_accuracy"), 3)


def print_table(summary: dict[str, Any], report: Path) -> None:
    header, rows = table(summary)
    print(aligned([header, *rows]))
    print(f"report: {report}", flush=True)
