"""The start of a run: random initialization, a weight file (train.init_from), or the checkpoint of a released trainer."""

from __future__ import annotations

from pathlib import Path

import torch

from rear_scale.checkpoint import released as official
from rear_scale.checkpoint import released_trainer as accelerate
from rear_scale.checkpoint.folder import Checkpoint, step_name
from rear_scale.checkpoint.open import newest_intact, read_weights
from rear_scale.checkpoint.writer import write_portable
from rear_scale.config import ExperimentConfig, InputError, to_dict
from rear_scale.model import Generator, build_model
from rear_scale.optim.groups import decays
from rear_scale.optim.parametrization import scale_initial_weights
from rear_scale.progress import say
from rear_scale.run.folder import RunFolder
from rear_scale.run.versions import commit, versions
from rear_scale.shards.reader import TokenSet
from rear_scale.world import World


def check(cfg: ExperimentConfig) -> None:
    """Raises InputError when train.init_from is not there."""
    if cfg.train.init_from is not None and not Path(cfg.train.init_from).exists():
        raise InputError(
            f"not found: train.init_from={cfg.train.init_from}. Set the path of a weight file, a run folder or a checkpoint, "
            "or null for random initialization"
        )


def first_weights(cfg: ExperimentConfig, model: Generator, world: World) -> None:
    """Initializes the weights of a new run at random, then loads those of train.init_from; heads that it lacks stay random."""
    model.init_weights(cfg.run.seed)
    scale_initial_weights(model, cfg)
    if cfg.train.init_from is None:
        return
    weights = read_weights(Path(cfg.train.init_from), "train.init_from")
    fresh = official.load(weights, model, f"train.init_from={cfg.train.init_from}", heads_optional=True)
    if world.is_main:
        fresh_text = f"; not in it, so initialized at random: {', '.join(fresh[:4])} ..." if fresh else ""
        say(f"initial weights: {cfg.train.init_from}{fresh_text}")


def take_over(cfg: ExperimentConfig, tokens: TokenSet, run: RunFolder, world: World) -> Checkpoint | None:
    """The first checkpoint of this run, converted from a released trainer's checkpoint-N folder; None for other sources.

    Weights, moments and step continue from there; the order of data is that of rear_scale. All ranks must call this. Raises
    InputError when the folder does not fit the config's model.
    """
    source = None if cfg.train.init_from is None else Path(cfg.train.init_from)
    if source is None or not accelerate.is_released_checkpoint(source):
        return None
    world.on_main(lambda: _write_first(cfg, tokens, run, source, world))
    return newest_intact(run.checkpoints, world, report=say)


def _write_first(cfg: ExperimentConfig, tokens: TokenSet, run: RunFolder, source: Path, world: World) -> None:
    released = accelerate.read_checkpoint(source, lambda name, weight: decays(name, weight, "released"))
    with torch.device("meta"):
        model = build_model(cfg)
    official.check_fits(released.tensors["param"], model, f"train.init_from={source}", heads_optional=False)
    meta = {
        "optimizer_step": released.step,
        "images_seen": released.step * cfg.train.global_batch_size,
        "config": to_dict(cfg),
        "data_fingerprint": tokens.manifest.fingerprint,
        "tokenizer_sha256": tokens.manifest.tokenizer_sha256,
        "world_size": world.size,
        "versions": versions(),
        "commit": commit(),
    }
    folder = run.checkpoints / step_name(released.step)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    write_portable(folder, released.step, released.tensors, meta)
    say(f"continuing from {source}: {released.step} updates done")
