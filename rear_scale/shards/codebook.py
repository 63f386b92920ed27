"""What a config and its token shards must agree on, and the codebook that both name."""

from __future__ import annotations

import torch
from torch import Tensor

from rear_scale.config import ExperimentConfig, InputError
from rear_scale.progress import say_once
from rear_scale.shards.reader import check_agree, check_fits, open_manifest
from rear_scale.shards.record import Manifest, read_codebook
from rear_scale.tokenizer import open_tokenizer


def codebook_of(cfg: ExperimentConfig, manifest: Manifest) -> Tensor:
    """float32 [K, D], of the shards or, where they come without, of the tokenizer."""
    if manifest.codebook_sha256 is not None:
        return torch.from_numpy(read_codebook(cfg.data.train, manifest))
    if cfg.tokenizer.weights is None:
        raise InputError(
            f"{cfg.data.train} has no codebook.npy, and tokenizer.weights is not set. Set tokenizer.weights to the weights of "
            f"{cfg.tokenizer.name}, or put its codebook (float32 [K, D]) beside the shards before their first use"
        )
    return open_tokenizer(cfg.tokenizer, torch.device("cpu")).codebook.detach().clone()


def read_both(cfg: ExperimentConfig, is_main: bool) -> tuple[Manifest, Manifest | None]:
    """The manifests of data.train and, where it is set, data.val. Raises InputError when one does not fit the config, or
    the two do not agree on tokens and classes."""
    train = read_checked(cfg, cfg.data.train)
    if cfg.data.val is None:
        return train, None
    val = read_checked(cfg, cfg.data.val)
    note = check_agree(train, val, cfg.data)
    if note and is_main:
        say_once(note)
    return train, val


def read_checked(cfg: ExperimentConfig, folder: str) -> Manifest:
    """The manifest of a folder of token shards that fits the config's tokenizer and classes."""
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
