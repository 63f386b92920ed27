"""The interface of an experiment: its work on one checkpoint in blocks, its tables and its figures.

A new experiment is one file with an `Experiment`, and a line in rear_scale/analysis/table.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rear_scale.checkpoint.folder import Checkpoint
from rear_scale.config import ExperimentConfig
from rear_scale.world import World

Arrays = dict[str, np.ndarray]
Row = dict[str, Any]  # the cells of a table by column


@dataclass(frozen=True)
class Subject:
    """One checkpoint that is analysed."""

    cfg: ExperimentConfig
    checkpoint: Checkpoint
    model: str  # its name in tables and figures; the seeds of one model share it

    @property
    def about(self) -> Row:
        """The first columns of each of its rows."""
        cfg = self.cfg
        return {"model": self.model, "run": cfg.run.name, "seed": cfg.run.seed, "step": self.checkpoint.step}


class Work(ABC):
    """The work of an experiment on one checkpoint. All ranks construct it alike.

    A block is computed as a whole by one rank, and results are put together from the blocks in order, so that they do not
    depend on the number of ranks.
    """

    def __init__(self, subject: Subject, world: World) -> None:
        self.subject, self.cfg, self.world = subject, subject.cfg, world

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Everything that the results depend on, as JSON; the weights and precision of the model are added by `identity_of`."""

    @property
    @abstractmethod
    def block_sizes(self) -> list[int]:
        """The number of images of each block, for the progress bar."""

    def prepare(self, folder: Path) -> None:  # noqa: B027 - most experiments have nothing to prepare
        """Makes what the blocks need and all ranks make together, in a folder that lasts until the results are complete. All
        ranks must call this."""

    @abstractmethod
    def compute(self, number: int) -> Arrays:
        """The results of one block."""

    @abstractmethod
    def reduce(self, blocks: Iterable[Arrays]) -> Arrays:
        """The results of all blocks, which are given in order."""


@dataclass(frozen=True)
class Analysed:
    """A checkpoint with its results."""

    subject: Subject
    arrays: Arrays


@dataclass(frozen=True)
class Experiment:
    """One experiment of the table in rear_scale/analysis/table.py."""

    name: str
    source: str  # paper and figure
    work: Callable[[Subject, World], Work]
    # The columns, after those of the checkpoint, that tell apart the rows of its first table; all others are measures.
    keys: tuple[str, ...]
    # The rows of the tables of one checkpoint by the suffix of their file; "" is the first table.
    tables: Callable[[Analysed], Mapping[str, list[Row]]]
    figures: Callable[[Sequence[Analysed]], Mapping[str, bytes]]  # PNGs by the suffix of their file
    inputs: tuple[str, ...] = ("data.train", "data.val")  # config fields of files, for a dry run
    lines: Callable[[Sequence[Analysed]], list[str]] = lambda _: []  # further lines for the user
