"""Weights from one form into another (launchers/convert.py)."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from rear_scale.checkpoint import released as official
from rear_scale.checkpoint import released_trainer as accelerate
from rear_scale.checkpoint.folder import Checkpoint
from rear_scale.checkpoint.open import open_source, open_with_config
from rear_scale.checkpoint.writer import write_consolidated, write_portable
from rear_scale.config import ExperimentConfig, InputError
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
    ema: bool = False,
    dry_run: bool = False,
) -> None:
    """Writes `out` in a form. Raises InputError when the source cannot be read or the form does not exist for it."""
    _check_new(out)
    if form == "portable" and accelerate.is_released_checkpoint(source):
        if not dry_run:
            _portable_of_released(source, config_name, overrides, out)
        say(f"{source} -> {out} (portable, with optimizer state)")
        return
    found, cfg = open_with_config(source, config_name, overrides)
    if ema and (form == "portable" or "index" not in found.meta or not found.has("ema")):
        raise InputError(
            f"--ema: {found.path} has no moving average, or --to {form} keeps it beside the weights. Leave --ema out, "
            "or train with optim.ema_decay=0.9999"
        )
    read = found.reader("ema" if ema else "param")
    weights = {name: read(name) for name in found.names()}
    with torch.device("meta"):
        model = build_model(cfg, with_heads=False)
    official.check_fits(weights, model, str(found.path), heads_optional=True)
    if form in ("official", "merged"):
        weights = _official(cfg, weights, merge=form == "merged")
    if dry_run:
        say(
            f"{found.path}, step {found.step}: {len(weights)} tensors, {sum(w.numel() for w in weights.values()):,} values"
        )
        return
    with _alone(out):
        if form == "portable":
            kept = ("config", "optimizer_step", "tokenizer_sha256")
            meta = {name: found.meta[name] for name in kept if name in found.meta}
            write_portable(out, found.step, _states(found), meta)
        elif form == "consolidated":
            write_consolidated(out, found, weights)
        else:
            official.write(out, weights)
    say(f"{found.path} -> {out} ({form})")


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """No other process writes `out` in the block, and what a killed one has left of it is gone."""
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


def _states(found: Checkpoint) -> dict[str, dict[str, Tensor]]:
    """All tensors of the source: weights, and the optimizer's states and moving average where it has them."""
    keys = (
        [key.split("/") for key in found.meta["index"]]
        if "index" in found.meta
        else [("param", name) for name in found.names()]
    )
    states: dict[str, dict[str, Tensor]] = {}
    for kind, name in keys:
        states.setdefault(kind, {})[name] = found.reader(kind)(name)
    return states


def _official(cfg: ExperimentConfig, weights: dict[str, Tensor], *, merge: bool) -> dict[str, Tensor]:
    model = cfg.model
    if model.tie_codebook is not None:
        raise InputError(
            f"model.tie_codebook={model.tie_codebook} has no released form: the tokenizer has its embeddings. "
            "Use --to consolidated"
        )
    heads = cfg.objective.heads
    released = heads.form == "released" and not heads.shared
    dropped = [name for name in weights if official.is_head(name) and not (released and "align_mlp" in name)]
    if dropped:
        say(f"left out: {len(dropped)} weights of heads that the released code does not have, or has in another form")
    weights = {name: value for name, value in weights.items() if name not in dropped}
    if not merge:
        return weights
    if model.architecture != "rar":
        raise InputError(
            f"--to merged: model.architecture={model.architecture} has no pos_embed to merge into. Use --to official"
        )
    if cfg.objective.permutation.never_settles:
        raise InputError(
            f"--to merged: objective.permutation.end={cfg.objective.permutation.end} leaves the model predicting "
            "in random orders, which need the second table. Use --to official"
        )
    return official.merged_positions(weights, scan_order(cfg.objective.permutation.order, cfg.tokenizer))


def _portable_of_released(source: Path, config_name: str | None, overrides: list[str], out: Path) -> None:
    released = accelerate.read_checkpoint(source, lambda name, weight: decays(name, weight, "released"))
    values = open_source(accelerate.weights_folder(source), config_name, overrides).meta["config"]
    with _alone(out):
        write_portable(out, released.step, released.tensors, {"config": values, "optimizer_step": released.step})
