"""summary.json of the demo: the scores of both models, with the spread over seeds where there are several."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from rear_scale.demo.commands import FOLDER, MODELS, run_folder, samples_file
from rear_scale.files import write_text_atomically
from rear_scale.text_table import aligned

# name in summary.json -> (what the report calls it, digits)
SCORES = {
    "class_accuracy": ("class accuracy of the samples", 3),
    "frechet_distance": ("Fréchet distance to the validation images", 2),
    "frechet_distance_train": ("Fréchet distance to the training images", 2),
    "nearest_distance": ("distance to the nearest training image", 1),
    "ctr_clean": ("correct token ratio, validation, clean context", 4),
    "ctr_noisy": ("correct token ratio, validation, {replaced} of the context replaced", 4),
    "ctr_train": ("correct token ratio, training, clean context", 4),
    "perplexity": ("perplexity, validation, clean context", 3),
    "perplexity_noisy": ("perplexity, validation, {replaced} of the context replaced", 3),
}


def write_summary(seeds: list[int]) -> dict[str, Any]:
    """Reads each run's result.json and writes FOLDER/summary.json. Returns its content."""
    results = {
        model: [json.loads((run_folder(model, seed) / "result.json").read_text()) for seed in seeds] for model in MODELS
    }
    summary: dict[str, Any] = {}
    for model, found in results.items():
        scores = [_scores(result) for result in found]
        summary[model] = {
            "run_dir": str(run_folder(model, seeds[0])),
            "samples": str(samples_file(model, seeds[0])),
            **{name: _over_seeds([score[name] for score in scores]) for name in SCORES},
        }
    images = results["ar"][0]["images"]
    summary["real"] = _image_scores(images["references"]["validation"])
    summary["seeds"] = seeds
    summary["num_samples"] = images["samples"]["count"]
    summary["features"] = images["features"]
    summary["replace_rate"] = results["ar"][0]["evaluate"]["replace_rate"]
    write_text_atomically(FOLDER / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def _scores(result: dict[str, Any]) -> dict[str, float]:
    tokens = result["tokens"]
    return {
        **_image_scores(result["images"]["samples"]),
        "ctr_clean": tokens["val_clean"]["ctr"],
        "ctr_noisy": tokens["val_noisy"]["ctr"],
        "ctr_train": tokens["train_clean"]["ctr"],
        "perplexity": tokens["val_clean"]["perplexity"],
        "perplexity_noisy": tokens["val_noisy"]["perplexity"],
    }


def _image_scores(images: dict[str, Any]) -> dict[str, float]:
    found = {
        "class_accuracy": images["class_accuracy"],
        "frechet_distance_train": images["frechet_distance"]["training"],
        "nearest_distance": images["nearest_distance"]["training"],
    }
    if "validation" in images["frechet_distance"]:
        found["frechet_distance"] = images["frechet_distance"]["validation"]
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


def print_table(summary: dict[str, Any], report: Path) -> None:
    header, rows = table(summary)
    print(aligned([header, *rows]))
    print(f"report: {report}", flush=True)
