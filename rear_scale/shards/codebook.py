"""The checks of a config against its token shards, and the codebook of both."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from rear_scale.config import ExperimentConfig, InputError, all_checks, required_path
from rear_scale.config.validate import validate
from rear_scale.progress import say_once
from rear_scale.shards.reader import check_agree, check_fits, open_manifest
from rear_scale.shards.record import Manifest, read_codebook
from rear_scale.shards.storage import is_remote
from rear_scale.tokenizer import open_tokenizer

CLASSES_KEY = "model.num_classes"


def is_packed(folder: str | None) -> TypeGuard[str]:
    """Whether a folder of token shards lies here and has a manifest of ours."""
    return folder is not None and not is_remote(folder) and (Path(folder) / "index.json").exists()


def codebook_of(cfg: ExperimentConfig, manifest: Manifest) -> Tensor:
    """The codebook, float32 [K, D], of the shards or, where they have none, of the tokenizer."""
    if manifest.codebook_sha256 is not None:
        return torch.from_numpy(read_codebook(required_path(cfg.data.train, "data.train"), manifest))
    if cfg.tokenizer.weights is None:
        raise InputError(
            f"{cfg.data.train} has no codebook.npy, and tokenizer.weights is not set. Set tokenizer.weights to the weights of "
            f"{cfg.tokenizer.name}, or put its codebook (float32 [K, D]) beside the shards before their first use"
        )
    return open_tokenizer(cfg.tokenizer, torch.device("cpu")).codebook.detach().clone()


def read_both(cfg: ExperimentConfig, is_main: bool) -> tuple[Manifest, Manifest | None]:
    """The manifests of data.train and, where it is set, data.val.

    Raises InputError when one does not fit the config, or the two do not agree on tokens and classes.
    """
    manifests: list[Manifest] = []
    folders = [required_path(cfg.data.train, "data.train"), *([] if cfg.data.val is None else [cfg.data.val])]
    all_checks(*(partial(_read_into, manifests, cfg, folder) for folder in folders))
    train, *others = manifests
    if not others:
        return train, None
    (val,) = others
    note = check_agree(train, val, cfg.data)
    if note and is_main:
        say_once(note)
    return train, val


def _read_into(manifests: list[Manifest], cfg: ExperimentConfig, folder: str) -> None:
    manifests.append(read_checked(cfg, folder))


def read_checked(cfg: ExperimentConfig, folder: str) -> Manifest:
    """The manifest of a folder of token shards. Raises InputError when it does not fit the config's tokenizer and classes."""
    manifest = open_manifest(folder, cfg.tokenizer, cfg.data)
    tokenizer = cfg.tokenizer
    check_fits(
        manifest,
        folder,
        codebook_size=tokenizer.codebook_size,
        num_tokens=tokenizer.num_tokens,
        codebook_dim=tokenizer.codebook_dim,
        num_classes=cfg.model.num_classes,
    )
    return manifest


def classes_of_shards(cfg: ExperimentConfig, given: Collection[str]) -> tuple[ExperimentConfig, str | None]:
    """The config with the number of classes of the shards in data.train, and the line of `with_num_classes`.

    Returns the config itself where the user has set model.num_classes, where the shards cannot be read (other checks report
    that), and with train.init_from, whose weights fit the config. given: the dotted keys that the user has set.
    """
    if CLASSES_KEY in given or cfg.train.init_from is not None or cfg.data.train is None:
        return cfg, None
    try:
        manifest = open_manifest(cfg.data.train, cfg.tokenizer, cfg.data)
    except InputError:
        return cfg, None
    return with_num_classes(cfg, len(manifest.label_counts), f"the number of classes in data.train={cfg.data.train}")


def with_num_classes(cfg: ExperimentConfig, classes: int, source: str) -> tuple[ExperimentConfig, str | None]:
    """The config with this model.num_classes (0: unchanged), and a line for the user where it differs from the config's, else
    None. source: the origin of the number. Raises InputError for sample.labels beyond it.
    """
    if classes in (0, cfg.model.num_classes):
        return cfg, None
    changed = replace(cfg, model=replace(cfg.model, num_classes=classes))
    validate(changed)
    return changed, (
        f"{CLASSES_KEY}={classes}, {source}, not the config's default {cfg.model.num_classes}; set {CLASSES_KEY} for another one"
    )


def class_note(cfg: ExperimentConfig, manifest: Manifest) -> str | None:
    """A line for the user about classes of the model that have no images to train on; None where all have some."""
    counts = manifest.label_counts
    if not any(counts):
        return None  # not counted
    known, total = sum(count > 0 for count in counts), cfg.model.num_classes
    if known == total:
        return None
    first = next((label for label, count in enumerate(counts) if count == 0), len(counts))
    return (
        f"note: {total - known:,} of model.num_classes={total:,} classes have no images in data.train={cfg.data.train} (class "
        f"{first} is the first): they are never trained, but sampled unless sample.labels leaves them out"
    )
