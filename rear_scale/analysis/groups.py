"""Checks of the checkpoints that are compared: seeds of one model behind each option, on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rear_scale.analysis.experiment import Subject
from rear_scale.analysis.kinds import recipe_of
from rear_scale.checkpoint.open import WeightFile
from rear_scale.config import ExperimentConfig, InputError, required_path
from rear_scale.shards.codebook import read_checked

_OPTIONS = ("--checkpoint", "--versus")
_MOST_FIELDS = 3


def check_runs(groups: Sequence[Sequence[Subject]]) -> list[str]:
    """Lines on checkpoints of one option that are no seeds of one model. Raises InputError where one of them is named twice, or
    two are of one run: they would count as independent seeds."""
    notes = []
    for option, group in zip(_OPTIONS, groups, strict=False):
        first, *others = group
        seen: dict[Path, Subject] = {}
        for one in group:
            place = _place(one)
            if place in seen:
                raise InputError(
                    f"{option} names {seen[place].checkpoint.path} and {one.checkpoint.path}, both of the run {place}, but its "
                    "checkpoints count as independent seeds of one model. Name one of each run; another step goes to "
                    f"{_OPTIONS[1 - _OPTIONS.index(option)]}"
                )
            seen[place] = one
        for one in others:
            if fields := _differing(first.cfg, one.cfg):
                notes.append(f"{option}: {_place(one)} differs from {_place(first)} in more than run.seed: {fields}")
            if one.checkpoint.step != first.checkpoint.step:
                notes.append(
                    f"{option}: {_place(one)} is at step {one.checkpoint.step}, {_place(first)} at {first.checkpoint.step}"
                )
        seeds = [one.cfg.run.seed for one in group]
        if repeated := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
            named = ", ".join(map(str, repeated))
            notes.append(
                f"{option}: several runs have run.seed={named}, so they are not independent, and intervals too short"
            )
    return notes


def check_data(groups: Sequence[Sequence[Subject]]) -> list[str]:
    """A line where the two models are measured on other tokens. Raises InputError where the seeds of one model are, and where
    data.val is missing or does not fit."""
    found = []
    for option, group in zip(_OPTIONS, groups, strict=False):
        prints = [_fingerprint(one.cfg) for one in group]
        other = next((at for at, value in enumerate(prints) if value != prints[0]), None)
        if other is not None:
            raise InputError(
                f"{option}: {_place(group[other])} has data.val={group[other].cfg.data.val}, whose content is not that of "
                f"{group[0].cfg.data.val} of {_place(group[0])}. Seeds of one model are measured on the same tokens: set "
                "data.val=FOLDER for all, or name the runs in several commands"
            )
        found.append(prints[0])
    if len({*found}) < 2:
        return []
    folders = " and ".join(str(group[0].cfg.data.val) for group in groups)
    return [
        f"the two models are measured on other tokens ({folders}): differences between them are those of the data too"
    ]


def _place(one: Subject) -> Path:
    """The run of a checkpoint; of a weight file the file."""
    checkpoint = one.checkpoint
    return (checkpoint.path if isinstance(checkpoint, WeightFile) else checkpoint.run).resolve()


def _differing(a: ExperimentConfig, b: ExperimentConfig) -> str:
    """The fields of the recipe that differ, in words; empty for one recipe."""
    ours, theirs = recipe_of(a), recipe_of(b)
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    shown = ", ".join(f"{name} {theirs.get(name)} instead of {ours.get(name)}" for name in names[:_MOST_FIELDS])
    return f"{shown} and {len(names) - _MOST_FIELDS} more" if len(names) > _MOST_FIELDS else shown


def _fingerprint(cfg: ExperimentConfig) -> str:
    return read_checked(cfg, required_path(cfg.data.val, "data.val")).fingerprint
