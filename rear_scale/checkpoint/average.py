"""Averages of the weights (--ema) as checkpoints: the moving average of optim.ema_decay, and averages of any length that are
made from the snapshots of optim.posthoc_ema (optim/posthoc_ema.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from torch import Tensor

from rear_scale import config
from rear_scale.checkpoint.folder import Checkpoint, damage
from rear_scale.checkpoint.meta import stored_tensors
from rear_scale.checkpoint.snapshots import SNAPSHOTS, snapshots
from rear_scale.config import OWN_OF_BRANCH, InputError, check_resumable
from rear_scale.config.derived import completed
from rear_scale.optim import posthoc_ema
from rear_scale.parallel.strategy import StateName
from rear_scale.progress import say
from rear_scale.untrusted import is_count, shown
from rear_scale.world import discover

MOVING_AVERAGE = 0.0  # in place of a length: the moving average of optim.ema_decay
KEY = "average"  # in the meta of an Average: how its weights were made; part of the identity of its samples
BRANCH = "branch"  # in the meta of a branch: the run and the step that it begins with
_MOST_TRUNKS = 10  # branches of branches
_MAPPED_BYTES = 1 << 30
_COARSE = 0.05  # relative error of a profile of which the user is told
_WRONG = 0.5  # relative error of a profile that is another one


class _Readers:
    """Open files of several checkpoints. They are closed after _MAPPED_BYTES, because pages that are read through a mapping count
    towards the memory of the process until it is closed."""

    def __init__(self) -> None:
        self.opened: dict[tuple[Path, StateName], Callable[[str], Tensor]] = {}
        self.mapped = 0

    def read(self, source: Checkpoint, state: StateName, name: str) -> Tensor:
        if self.mapped > _MAPPED_BYTES:
            self.opened, self.mapped = {}, 0
        key = (source.path, state)
        if key not in self.opened:
            self.opened[key] = source.reader(state)
        value = self.opened[key](name)
        self.mapped += value.nbytes
        return value


@dataclass(frozen=True)
class Average(Checkpoint):
    """A checkpoint whose weights are the sum of states of other checkpoints, each times a factor.

    Tensors are added in float64, one after the other, so that no more than three of them are in memory at a time.
    """

    parts: tuple[tuple[Checkpoint, StateName, float], ...] = field(repr=False)
    readers: _Readers = field(default_factory=lambda: _Readers(), init=False, repr=False, compare=False)

    def reader(self, state_name: StateName) -> Callable[[str], Tensor]:
        if state_name != "param":
            raise InputError(f"{self.path}: an average of the weights has no {state_name}. Leave --ema out")

        def read(name: str) -> Tensor:
            total: Tensor | None = None
            for source, state, factor in self.parts:
                value = self.readers.read(source, state, name).double().mul_(factor)
                total = value if total is None else total.add_(value)
            assert total is not None, "an average has parts"
            return total.float()

        return read

    def has(self, state_name: StateName) -> bool:
        return state_name == "param"


def averaged(checkpoint: Checkpoint, length: float) -> Average:
    """The checkpoint with an average in place of its weights: of the length sigma_rel at its step, or MOVING_AVERAGE.

    Made from the averages in the checkpoint itself and in the snapshots of its run that are not later; for a branch also in
    those of the trunk up to the step where it began, if the trunk is still there. Raises InputError when there are none, and
    for damaged ones. Prints the error of the profile on rank 0.
    """
    if "index" not in checkpoint.meta:
        raise InputError(
            f"--ema: {checkpoint.path} is a file of weights alone. Name a run folder or a checkpoint folder, or leave --ema out"
        )
    if length == MOVING_AVERAGE:
        if not checkpoint.has("ema"):
            raise InputError(
                f"--ema: {checkpoint.path} has no moving average. Leave --ema out, give a length (--ema 0.1) if the run has "
                "optim.posthoc_ema, or train with optim.ema_decay=0.9999"
            )
        return Average(checkpoint.path, {**checkpoint.meta, KEY: {"moving": True}}, ((checkpoint, "ema", 1.0),))
    return _posthoc(checkpoint, length)


def _posthoc(checkpoint: Checkpoint, length: float) -> Average:
    time = _updates(checkpoint)
    sources = [source for source in _sources(checkpoint) if 0 < _updates(source) <= time]
    named = [(source, state, sigma) for source in sources for state, sigma in _lengths(source).items()]
    if not named:
        raise InputError(
            f"--ema {length:g}: {checkpoint.path} and {checkpoint.run / SNAPSHOTS} hold no averages that it can be made from. "
            "Leave --ema out, or train with optim.posthoc_ema=[0.05,0.1] checkpoint.ema_every_steps=N"
        )
    _check_sources(checkpoint, sources)
    times = [_updates(source) for source, _, _ in named]
    gammas = [posthoc_ema.gamma_of(sigma) for _, _, sigma in named]
    factors, error = posthoc_ema.factors(times, gammas, time, posthoc_ema.gamma_of(length))
    if error > _WRONG:
        tracked = ", ".join(f"{one:g}" for one in sorted({sigma for _, _, sigma in named}))
        raise InputError(
            f"--ema {length:g}: {len(sources)} snapshots of the lengths {tracked} cannot make this one: its profile would be "
            f"off by {error:.0%}. Use a length closer to these, or more snapshots (checkpoint.ema_every_steps)"
        )
    if discover().rank == 0:
        hint = ". More snapshots (checkpoint.ema_every_steps) make it exact" if error > _COARSE else ""
        say(
            f"{checkpoint.path}: average of sigma_rel={length:g} from {len(sources)} snapshots; its profile is off by "
            f"{error:.2%}{hint}"
        )
    files = [item["sha256"] for source in sources for item in source.meta["files"]]
    parts = [(source, state, float(factor)) for (source, state, _), factor in zip(named, factors, strict=True)]
    record = {"sigma_rel": length, "snapshots": len(sources), "profile_error": error, "sha256": files}
    return Average(checkpoint.path, {**checkpoint.meta, KEY: record}, tuple(parts))


def _updates(source: Checkpoint) -> int:
    """The number of updates that were applied; 0 where it is not known."""
    return source.meta.get("optimizer_step", 0)


def _sources(checkpoint: Checkpoint) -> Iterator[Checkpoint]:
    """The checkpoint itself where it holds averages, then snapshots of other steps: of its run, of its trunk, and so on."""
    steps: set[int] = set()
    if _lengths(checkpoint):
        steps.add(checkpoint.step)
        yield checkpoint
    run, last, record = checkpoint.run, checkpoint.step, checkpoint.meta.get(BRANCH)
    for _ in range(_MOST_TRUNKS):
        for one in snapshots(run):
            if one.step <= last and one.step not in steps:
                steps.add(one.step)
                yield one
        if not isinstance(record, dict) or not isinstance(record.get("run"), str) or not is_count(record.get("step")):
            return
        run, last, record = Path(record["run"]), record["step"], record.get(BRANCH)


def _lengths(source: Checkpoint) -> dict[StateName, float]:
    """The lengths (sigma_rel) of the averages that a checkpoint or snapshot holds, by state name."""
    optim = completed(source.meta["config"]).get("optim")
    lengths = optim.get("posthoc_ema") if isinstance(optim, dict) else None
    if not isinstance(lengths, list) or not all(isinstance(one, float) and _is_length(one) for one in lengths):
        raise InputError(f"{source.path}: its config has optim.posthoc_ema={shown(lengths)}. Use another checkpoint")
    named = zip(posthoc_ema.state_names_of(len(lengths)), lengths, strict=True)
    return {state: sigma for state, sigma in named if source.has(state)}


def _is_length(value: float) -> bool:
    return math.isfinite(value) and 0 < value < posthoc_ema.LONGEST


def _check_sources(checkpoint: Checkpoint, sources: list[Checkpoint]) -> None:
    """Raises InputError for snapshots that are damaged, or of another model or run. The first process of a node computes
    checksums."""
    shapes = checkpoint.shapes()
    cfg = config.from_file(checkpoint.meta["config"], source=str(checkpoint.path))
    # A run that has changed a field when it was resumed has allowed it from then on.
    allowed = {"optim.posthoc_ema", *OWN_OF_BRANCH, *cfg.resume.allow, *chain.from_iterable(map(_allowed, sources))}
    for source in sources:
        if source is checkpoint:
            continue
        if wrong := damage(source, checksums=discover().local_rank == 0):
            raise InputError(f"{source.path}/{wrong}. Copy it again, or remove {source.path} to do without it")
        stored = {key: one.shape for key, one in stored_tensors(source.path, source.meta).items()}
        for state in _lengths(source):
            if {name: stored.get(f"{state}/{name}") for name in shapes} != shapes:
                raise InputError(
                    f"{source.path} is of another model than {checkpoint.path}. Move it out of {source.path.parent}"
                )
        try:
            check_resumable(cfg, source.meta["config"], str(source.path), allowed)
        except InputError as error:
            raise InputError(
                f"{source.path} is a snapshot of another run than {checkpoint.path} ({str(error).partition(': ')[0]}). Move it "
                f"out of {source.path.parent}"
            ) from None


def _allowed(source: Checkpoint) -> list[str]:
    """The fields that the config of a snapshot allows to change."""
    resume = source.meta["config"].get("resume")
    keys = resume.get("allow") if isinstance(resume, dict) else None
    return [key for key in keys if isinstance(key, str)] if isinstance(keys, list) else []
