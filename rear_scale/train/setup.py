"""What training needs from outside: checked on every rank before the process group, opened after it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rear_scale.config import ExperimentConfig, Plan, derive
from rear_scale.model.attention import choose_kernel
from rear_scale.progress import say
from rear_scale.shards.reader import TokenSet, check_fits, open_tokens
from rear_scale.shards.record import Manifest, read_codebook, read_manifest
from rear_scale.train import start
from rear_scale.world import Ranks, World


@dataclass(frozen=True)
class Data:
    cfg: ExperimentConfig
    plan: Plan
    manifest: Manifest
    codebook: Tensor  # float32 [K, D]

    def open(self, world: World) -> tuple[TokenSet, Tensor]:
        """Unpacks the shards on this node unless they are, and maps them."""
        return self._unpacked(self.cfg.data.train, world), self.codebook

    def open_val(self, world: World) -> TokenSet:
        """The same for data.val."""
        return self._unpacked(self.cfg.data.val, world)

    def _unpacked(self, folder: str, world: World) -> TokenSet:
        report = say if world.ranks.local_rank == 0 else _silent
        return open_tokens(folder, self.cfg.data.cache_dir, progress=report)


def check_data(cfg: ExperimentConfig, ranks: Ranks) -> Data:
    """Raises InputError when shards or first weights are missing or do not fit, the batch does not divide, or the attention
    kernel cannot run here."""
    start.check(cfg)
    choose_kernel(cfg.model.kernel, torch.device("cuda" if torch.cuda.is_available() else "cpu"), cfg.train.precision)
    manifest = read_checked(cfg, cfg.data.train)
    if cfg.data.val is not None:
        read_checked(cfg, cfg.data.val)
    plan = derive(cfg, ranks.world_size, manifest.num_images)
    return Data(cfg, plan, manifest, torch.from_numpy(read_codebook(cfg.data.train, manifest)))


def read_checked(cfg: ExperimentConfig, folder: str) -> Manifest:
    """The manifest of a folder of token shards that fits the config's tokenizer and classes."""
    manifest = read_manifest(folder)
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


def _silent(line: str) -> None:
    return
