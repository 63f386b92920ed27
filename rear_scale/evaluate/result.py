"""result.json: every score of one evaluation with what it was made from."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rear_scale.config import ExperimentConfig
from rear_scale.parallel.checkpoint import Checkpoint
from rear_scale.progress import say
from rear_scale.shards.record import file_sha256, write_text_atomically
from rear_scale.train.run_folder import provenance
from rear_scale.world import World


def write_result(
    path: Path,
    cfg: ExperimentConfig,
    checkpoint: Checkpoint,
    samples: Path,
    images: dict[str, Any],
    tokens: dict[str, Any],
    world: World,
) -> None:
    """Rank 0 only. images: from evaluate.job.score_images; tokens: from analysis.token_prediction.score_tokens."""
    result = {
        "images": images,
        "tokens": tokens,
        "checkpoint": {
            "path": str(checkpoint.path),
            "step": checkpoint.step,
            "sha256": [item["sha256"] for item in checkpoint.meta["files"]],
        },
        "samples": {"path": str(samples), "sha256": file_sha256(samples)},
        "sample": asdict(cfg.sample),
        "evaluate": asdict(cfg.evaluate),
        "provenance": provenance(world),
    }
    write_text_atomically(path, json.dumps(result, indent=1) + "\n")
    say(f"{path}: written")
