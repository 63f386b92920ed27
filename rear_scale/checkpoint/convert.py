"""Conversion of weights between file formats (launchers/convert.py)."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from rear_scale.checkpoint import released as official
from rear_scale.checkpoint import released_trainer as accelerate
from rear_scale.checkpoint.average import averaged
from rear_scale.checkpoint.folder import Checkpoint
from rear_scale.checkpoint.open import open_source, open_with_config
from rear_scale.checkpoint.writer import write_consolidated, write_portable
from rear_scale.config import ExperimentConfig, InputError, to_yaml
from rear_scale.files import remove_leftovers
from rear_scale.locks import locked, remove_unheld
from rear_scale.model import build_model
from rear_scale.objective.permutation import scan_order
from rear_scale.optim.groups import decays
from rear_scale.progress import say

FORMS = ("portable", "consolidated", "official", "merged")


def convert(
    source: Path,
    config_name: str | None,
    overrides: list[str],
    form: str,
    out: Path,
    *,
    ema: float | None = None,
    dry_run: bool = False,
    full: bool = False,
) -> None:
    """Writes `out` in a format. Raises InputError for an unreadable source, and for a format that it cannot have.

    ema: an average of the weights in their place, as checkpoint.average.averaged takes it. full: in a dry run, the config is
    printed too.
    """
    _check_new(out)
    if form == "portable" and accelerate.is_released_checkpoint(source):
        if not dry_run:
            _portable_of_released(source, config_name, overrides, out)
        say(f"{source} -> {out} (portable, with optimizer state)")
        return
    checkpoint, cfg = open_with_config(source, config_name, overrides)
    if ema is not None and form == "portable":
        raise InputError(
            "--ema: --to portable keeps averages beside the weights. Leave --ema out, or use --to consolidated"
        )
    if ema is not None:
        checkpoint = averaged(checkpoint, ema)
    read = checkpoint.reader("param")
    weights = {name: read(name) for name in checkpoint.names()}
    with torch.device("meta"):
        model = build_model(cfg, with_heads=False)
    official.check_fits(weights, model, str(checkpoint.path), heads_optional=True)
    if form in ("official", "merged"):
        weights = _official(cfg, weights, merge=form == "merged")
    if dry_run:
        if full:
            print(to_yaml(cfg))
        say(
            f"{checkpoint.path}, step {checkpoint.step}: {len(weights)} tensors, "
            f"{sum(w.numel() for w in weights.values()):,} values"
        )
        return
    with _alone(out):
        if form == "portable":
            kept = ("config", "optimizer_step", "tokenizer_sha256")
            meta = {name: checkpoint.meta[name] for name in kept if name in checkpoint.meta}
            write_portable(out, checkpoint.step, _states(checkpoint), meta)
        elif form == "consolidated":
            write_consolidated(out, checkpoint, weights)
        else:
            official.write(out, weights)
    say(f"{checkpoint.path} -> {out} ({form})")


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """A context manager that locks `out` and removes temporary files of killed processes."""
    refusal = f"--out {out} is being written by another process. Wait for it, or name another"
    with locked(_lock(out), refusal):
        _check_new(out)
        remove_leftovers(out.parent, glob.escape(out.name))
        yield


def _lock(out: Path) -> Path:
    return out.with_name(f".{out.name}.lock")


def _check_new(out: Path) -> None:
    if out.exists():
        remove_unheld(_lock(out))
        raise InputError(f"--out {out} exists. Name another, or remove it first")


def _states(checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
    """All tensors of the source by state name and parameter: weights, and optimizer states and moving average if it has them."""
    keys = (
        [key.split("/") for key in checkpoint.meta["index"]]
        if "index" in checkpoint.meta
        else [("param", name) for name in checkpoint.names()]
    )
    states: dict[str, dict[str, Tensor]] = {}
    for state_name, name in keys:
        states.setdefault(state_name, {})[name] = checkpoint.reader(state_name)(name)
    return states


def _official(cfg: ExperimentConfig, weights: dict[str, Tensor], *, merge: bool) -> dict[str, Tensor]:
    model = cfg.model
    if model.tie_codebook is not None:
        raise InputError(
            f"model.tie_codebook={model.tie_codebook} has no released format, because its embeddings come from the tokenizer. "
            "Use --to consolidated"
        )
    heads = cfg.objective.heads
    released = heads.form == "released" and not heads.shared
    dropped = [name for name in weights if official.is_head(name) and not (released and "align_mlp" in name)]
    if dropped:
        say(f"left out: {len(dropped)} weights of heads that the released code does not have in this form")
    weights = {name: value for name, value in weights.items() if name not in dropped}
    if not merge:
        return weights
    if model.architecture != "rar":
        raise InputError(
            f"--to merged: model.architecture={model.architecture} has no pos_embed to merge into. Use --to official"
        )
    if cfg.objective.permutation.never_settles:
        raise InputError(
            f"--to merged: objective.permutation.end={cfg.objective.permutation.end} means random orders of "
            "prediction, which need the second table. Use --to official"
        )
    return official.merged_positions(weights, scan_order(cfg.objective.permutation.order, cfg.tokenizer))


def _portable_of_released(source: Path, config_name: str | None, overrides: list[str], out: Path) -> None:
    released = accelerate.read_checkpoint(source, lambda name, weight: decays(name, weight, "released"))
    values = open_source(accelerate.weights_folder(source), config_name, overrides).meta["config"]
    with _alone(out):
        write_portable(out, released.step, released.tensors, {"config": values, "optimizer_step": released.step})
