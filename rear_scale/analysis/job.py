"""The distribution of an experiment's blocks over ranks. Each finished block is a file, so that a killed job continues.

OUT/parts/IDENTITY/block_00012.npz   a block, until all blocks of a checkpoint are there
OUT/results/IDENTITY.npz             the results of a checkpoint
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from rear_scale.analysis.experiment import Analysed, Arrays, Experiment, Subject, Work
from rear_scale.config import InputError
from rear_scale.evaluate.networks.feature_cache import is_whole
from rear_scale.files import atomic_open, remove_folder
from rear_scale.progress import progress
from rear_scale.sample.job import tied_identity
from rear_scale.world import World

_FORMAT = 1  # to be increased whenever equal inputs begin to give other results


def identity_of(experiment: Experiment, work: Work) -> str:
    """A hash of everything that the results of a checkpoint depend on."""
    subject = work.subject
    parts = {
        "format": _FORMAT,
        "experiment": experiment.name,
        "weights": [item["sha256"] for item in subject.checkpoint.meta["files"]],
        "precision": subject.cfg.train.precision,
        **tied_identity(subject.cfg),
        **work.identity,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def analyse(experiment: Experiment, subjects: Sequence[Subject], world: World, out: Path) -> list[Analysed]:
    """The results of all checkpoints, computed where they are not there yet; without arrays on ranks other than 0. All ranks
    must call this."""
    found = []
    for subject in subjects:
        work = experiment.work(subject, world)
        identity = identity_of(experiment, work)
        _check_same(subject, identity, world)
        result = out / "results" / f"{identity}.npz"
        if not world.on_main(partial(is_whole, result)):
            _compute(work, out / "parts" / identity, result, f"{experiment.name} of {subject.cfg.run.name}")
        found.append(Analysed(subject, _read(result) if world.is_main else {}))
    return found


def _check_same(subject: Subject, identity: str, world: World) -> None:
    """Raises InputError when ranks have different checkpoints or inputs. Each rank finds the newest checkpoint by itself."""
    jobs = world.gather((identity, str(subject.checkpoint.path)))
    other = next((rank for rank, (own, _) in enumerate(jobs) if own != jobs[0][0]), None)
    if other is not None:
        raise InputError(
            f"rank 0 would analyse {jobs[0][1]} and rank {other} {jobs[other][1]}, or their inputs differ: a training run may "
            "have written a checkpoint meanwhile. Choose one: --checkpoint RUN/checkpoints/step_XXXXXXXX"
        )


def _compute(work: Work, parts: Path, result: Path, description: str) -> None:
    """Computes the missing blocks, each on the rank that is free, and puts the results together. All ranks must call this."""
    world, sizes = work.world, work.block_sizes
    files = [parts / f"block_{number:05d}.npz" for number in range(len(sizes))]
    world.on_main(lambda: parts.mkdir(parents=True, exist_ok=True))
    work.prepare(parts)
    # All ranks use rank 0's list and take blocks from it by a shared counter, whose random name no other job uses.
    missing = world.on_main(lambda: [number for number, file in enumerate(files) if not is_whole(file)])
    name = world.from_main(secrets.token_hex(8))
    total = sum(sizes[number] for number in missing)
    with progress(description, total, "image", show=world.is_main and bool(missing)) as bar:
        while (turn := world.add(f"{name}/turn") - 1) < len(missing):
            number = missing[turn]
            _write(files[number], work.compute(number))
            bar.update(world.add(f"{name}/images", sizes[number]) - bar.n)
    world.barrier()
    world.on_main(lambda: _finish(work, files, result))
    if world.is_main:
        remove_folder(parts)
        with suppress(OSError):  # blocks of other checkpoints are in it
            parts.parent.rmdir()
    world.barrier()


def _finish(work: Work, files: Sequence[Path], result: Path) -> None:
    result.parent.mkdir(parents=True, exist_ok=True)
    _write(result, work.reduce(_each(files)))


def _each(files: Sequence[Path]) -> Iterator[Arrays]:
    for file in files:
        yield _read(file)


def _write(path: Path, arrays: Arrays) -> None:
    with atomic_open(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub asks whether a name is allow_pickle


def _read(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}
