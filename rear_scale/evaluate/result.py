"""result.json: every score of one evaluation with what it was made from."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rear_scale.checkpoint.folder import Checkpoint
from rear_scale.config import ExperimentConfig, InputError, to_dict
from rear_scale.evaluate.images.image_set import ImageSet
from rear_scale.files import write_text_atomically
from rear_scale.run.folder import provenance
from rear_scale.untrusted import read_json
from rear_scale.world import World


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


def write_result(
    path: Path,
    cfg: ExperimentConfig,
    checkpoint: Checkpoint | None,
    samples: ImageSet,
    source: str,
    images: dict[str, Any],
    tokens: dict[str, Any] | None,
    seconds: float,
    world: World,
) -> None:
    """Rank 0 only. images: from evaluate.job; tokens: from analysis.token_prediction; source: where the images come from.

    Everything outside `provenance` and `seconds` is the same for any number of ranks.
    """
    result = {
        "images": images,
        "tokens": tokens,
        "checkpoint": None
        if checkpoint is None
        else {
            "path": str(checkpoint.path),
            "step": checkpoint.step,
            "sha256": [item["sha256"] for item in checkpoint.meta["files"]],
        },
        "samples": {
            "path": source,
            "identity": samples.identity,
            "images": samples.count,
            "size": [samples.height, samples.width],
            "preprocessing": samples.preprocessing,
            "quantiser": samples.quantiser or "not known: the images came as uint8",
        },
        "sample": None if checkpoint is None else asdict(cfg.sample),
        "dtype": None if checkpoint is None else cfg.train.precision,
        "evaluate": asdict(cfg.evaluate),
        "config": to_dict(cfg) if checkpoint is not None else None,
        "seconds": round(seconds, 1),
        "provenance": provenance(world),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(result, indent=1) + "\n")


def summary(images: dict[str, Any], setting: str) -> dict[str, float]:
    """The scores under flat names (METRIC/REFERENCE, and the setting behind it where there are several), for dashboards."""
    found: dict[str, float | None] = {}
    found["inception_score"] = images.get("inception", {}).get("inception_score", {}).get("value")
    for network in ("inception", "dinov2"):
        scores = images.get(network, {})
        for name, values in scores.get("references", {}).items():
            for metric in ("fid", "sfid", "fd_dinov2"):
                found[f"{metric}/{name}"] = values.get(metric)
            for metric in ("precision", "recall", "density", "coverage"):
                for mode, value in (values.get(metric) or {}).items():
                    place = metric if network == "inception" else f"{network}_{metric}"
                    found[f"{place}_{mode}/{name}"] = value
    for name, value in images.get("samples", {}).get("frechet_distance", {}).items():
        found[f"classifier_frechet_distance/{name}"] = value
    return {
        "/".join([name, setting] if setting else [name]): value for name, value in found.items() if value is not None
    }
