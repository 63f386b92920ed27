"""The token sequences that experiments look at, and the predictions of a model for them under teacher forcing."""

# n sequences, B sequences of a batch, N tokens of an image, K codes

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from rear_scale.analysis.experiment import Subject, Work
from rear_scale.config import ExperimentConfig, required_path
from rear_scale.model import Generator
from rear_scale.objective import permutation
from rear_scale.objective.prediction import Replacement, held_out_task
from rear_scale.objective.terms import Task
from rear_scale.sample.job import load_generator
from rear_scale.shards.codebook import codebook_of, read_both, read_checked
from rear_scale.shards.reader import MappedSet, TokenSet, open_set, open_tokens
from rear_scale.shards.record import Manifest
from rear_scale.world import World

_LABELS_AT_ONCE = 65_536


def open_sets(cfg: ExperimentConfig, world: World) -> dict[str, TokenSet]:
    """data.val, if it is set, and data.train, by `val` and `train`. Raises InputError for a set that does not fit the model or
    the other set."""
    opened: dict[str, TokenSet] = {}
    train, val = read_both(cfg, world.is_main)
    if val is not None:
        opened["val"] = _open_val(cfg, val)
    # A training set may be streamed, if it is larger than the node's disk; a validation set is always unpacked.
    return {**opened, "train": open_set(cfg.data, train, world.size)}


def open_val(cfg: ExperimentConfig) -> TokenSet:
    """data.val alone. Raises InputError where it is not set or does not fit the model."""
    return _open_val(cfg, read_checked(cfg, required_path(cfg.data.val, "data.val")))


def _open_val(cfg: ExperimentConfig, manifest: Manifest) -> TokenSet:
    return open_tokens(required_path(cfg.data.val, "data.val"), cfg.data.cache_dir, manifest=manifest)


def labels_of_set(tokens: TokenSet) -> np.ndarray:
    """The classes, int64 [samples], of a whole set."""
    if isinstance(tokens, MappedSet):
        return tokens.labels.astype(np.int64)
    ids = torch.arange(len(tokens)).split(_LABELS_AT_ONCE)
    return torch.cat([tokens.labels_of(part) for part in ids]).numpy()


def of_each_class(labels: np.ndarray, count: int, classes: int) -> tuple[np.ndarray, int]:
    """The ids (int64 [n], rising) of `count` samples of each of `classes` classes, evenly spaced among its samples, and the
    number of classes that have fewer, of which all samples are taken, or none."""
    chosen, short = [], 0
    for label in range(classes):
        own = np.flatnonzero(labels == label)
        short += len(own) < count
        chosen.append(own[evenly(len(own), count)])
    return np.sort(np.concatenate(chosen)), short


def spread_over_classes(labels: np.ndarray, count: int) -> np.ndarray:
    """The ids (int64 [n], rising) of `count` samples, evenly spaced in the set sorted by class; all if there are fewer."""
    by_class = np.argsort(labels, kind="stable")
    return np.sort(by_class[evenly(len(labels), count)])


def evenly(size: int, count: int) -> np.ndarray:
    """The positions int64 of `count` of `size` things, evenly spaced; all if there are fewer."""
    if count >= size:
        return np.arange(size)
    return np.arange(count, dtype=np.int64) * size // count


class TokenWork(Work):
    """The base of work on sequences of data.val: their ids in blocks, the model and its predictions."""

    with_train: ClassVar[bool] = False  # whether data.train is needed beside data.val

    def __init__(self, subject: Subject, world: World) -> None:
        super().__init__(subject, world)
        required_path(self.cfg.data.val, "data.val")
        self.sets = open_sets(self.cfg, world) if self.with_train else {"val": open_val(self.cfg)}
        self.ids = spread_over_classes(labels_of_set(self.val), self.cfg.analyze.images)

    @property
    def val(self) -> TokenSet:
        return self.sets["val"]

    @property
    def identity(self) -> dict[str, Any]:
        permuted = self.cfg.objective.permutation
        return {
            "sets": {name: tokens.manifest.fingerprint for name, tokens in self.sets.items()},
            "images": len(self.ids),
            "block": self.block_images,
            "order": [permuted.order, permuted.prefix, permuted.never_settles],
        }

    @property
    def block_images(self) -> int:
        """Images of a block."""
        return self.cfg.evaluate.batch_size

    @cached_property
    def blocks(self) -> list[np.ndarray]:
        return np.split(self.ids, range(self.block_images, len(self.ids), self.block_images))

    @property
    def block_sizes(self) -> list[int]:
        return [len(block) for block in self.blocks]

    @cached_property
    def model(self) -> Generator:
        return load_generator(self.cfg, self.subject.checkpoint, self.world.device)

    @cached_property
    def codebook(self) -> Tensor:
        """The codebook, float32 [K, Z], on the device."""
        data = replace(self.cfg.data, train=self.cfg.data.val)
        return codebook_of(replace(self.cfg, data=data), self.val.manifest).to(self.world.device)

    def rows(self, tokens: TokenSet, ids: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens int64 [B, N], classes [B] and ids [B] on the device."""
        index = torch.from_numpy(ids)
        truth, labels = tokens.rows(index)
        return truth.to(self.world.device), labels.to(self.world.device), index.to(self.world.device)

    def task(self, truth: Tensor, ids: Tensor, replacement: Replacement | None = None) -> Task:
        """Context and targets in the model's order of prediction."""
        orders = partial(permutation.orders_of_model, self.cfg.objective.permutation, self.cfg.tokenizer)
        return held_out_task(truth, ids, orders(ids), replacement)

    def predict(self, task: Task, labels: Tensor) -> dict[str, Tensor]:
        """The model's output for a task: "logits" [B, N, K], logits[:, t] predicts task.tokens[:, t]."""
        classes, class_index = labels.unique(return_inverse=True)
        with torch.inference_mode():
            return self.model(task.context, classes, class_index, task.order)
