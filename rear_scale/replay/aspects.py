"""What differs between two runs, from their folders alone, in the order in which it matters."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rear_scale import config
from rear_scale.checkpoint.folder import CHECKPOINTS, open_checkpoint, saved_steps, step_name
from rear_scale.config import ExperimentConfig, InputError
from rear_scale.config.fields import declaration
from rear_scale.config.values import leaves
from rear_scale.replay.command import ROUNDING, ROUNDING_STEPS
from rear_scale.run.folder import read_fingerprints, read_lines
from rear_scale.shards.blocks import open_blocks
from rear_scale.shards.codebook import is_packed
from rear_scale.shards.record import Manifest, read_manifest

# Fields that a resumed run may change, and that change how a run rounds.
_ROUNDING_KEYS = (
    "strategy.",
    "train.micro_batch_size",
    "train.activation_checkpointing",
    "train.recompute_every_n",
    "model.kernel",
    "optim.backend",
)
EQUAL, DIFFERENT, ROUNDED, UNKNOWN = "equal", "different", "rounding", "not recorded"
_MOST_LINES = 8  # of one aspect


@dataclass(frozen=True)
class Aspect:
    """One thing that two runs have in common or not. state: equal, different, rounding (a difference by which losses differ
    within rounding), or not recorded."""

    name: str
    state: str
    lines: tuple[str, ...] = ()

    @property
    def differs(self) -> bool:
        return self.state in (DIFFERENT, ROUNDED)


@dataclass(frozen=True)
class Record:
    """A run folder as it is compared."""

    run: Path
    cfg: ExperimentConfig

    @cached_property
    def starts(self) -> list[dict[str, Any]]:
        return read_lines(self.run / "starts.jsonl")

    @cached_property
    def fingerprints(self) -> dict[str, Any]:
        """Those of the run's start; of an older run without the file, what its newest checkpoint says."""
        if found := read_fingerprints(self.run):
            return found
        steps = saved_steps(self.run)
        if not steps:
            return {}
        meta = open_checkpoint(self.run / CHECKPOINTS / step_name(steps[0])).meta
        named = {"data": meta.get("data_fingerprint"), "tokenizer": meta.get("tokenizer_sha256")}
        return {name: value for name, value in named.items() if value}

    @cached_property
    def logged(self) -> dict[int, dict[str, Any]]:
        """The lines of metrics.jsonl by step."""
        lines = read_lines(self.run / "metrics.jsonl")
        return {line["step"]: line for line in lines if isinstance(line.get("step"), int)}

    @cached_property
    def events(self) -> list[str]:
        """What happened to updates, once for each step: skipped updates and rewinds."""
        found: dict[str, None] = {}
        for line in read_lines(self.run / "events.jsonl"):
            step = line.get("step")
            if line.get("event") == "nonfinite":
                found[f"step {step}: loss or gradient not finite, so no update"] = None
            elif line.get("event") == "loss_spike" and line.get("rewind"):
                found[f"step {step}: a spike, rewound to an earlier checkpoint"] = None
        return list(found)


@dataclass(frozen=True)
class Difference:
    """The first logged step at which a number of two runs differs. relative: of A's value; inf where one is not finite."""

    step: int
    a: float | None
    b: float | None

    @property
    def relative(self) -> float:
        if self.a is None or self.b is None:
            return math.inf
        return abs(self.a - self.b) / max(abs(self.a), 1e-300)


def record(run: Path) -> Record:
    """Raises InputError for a folder that is no run."""
    if not (run / "config.yaml").is_file():
        raise InputError(
            f"not found: {run / 'config.yaml'}. Name two run folders, which training has written, such as runs/demo"
        )
    return Record(run, config.load(str(run / "config.yaml")))


def aspects(a: Record, b: Record) -> list[Aspect]:
    """All aspects of two runs, the most important first; the losses last."""
    return [
        _code(a, b),
        _versions(a, b),
        *_config(a, b),
        _ranks(a, b),
        _data(a, b),
        _named("tokenizer", a, b, ("tokenizer", "weights"), ("codebook", "codebook")),
        _weights(a, b),
        _order(a, b),
        _events(a, b),
        _losses(a, b),
    ]


def equal(found: list[Aspect]) -> bool:
    """Whether two runs are equal in what both record. Runs without a logged step in common are not known to be."""
    losses = found[-1]
    return losses.state != UNKNOWN and not any(one.differs for one in found)


def verdict(found: list[Aspect]) -> str:
    """One line: equal, or the first difference, and whether the losses differ by more than rounding."""
    different = [one for one in found if one.differs]
    if not different:
        return "equal" if equal(found) else "not known to be equal: no step is logged by both, and nothing else differs"
    first = different[0]
    return f"different, first in {first.name}: {first.lines[0] if first.lines else first.state}"


def _code(a: Record, b: Record) -> Aspect:
    ours, theirs = (_each(one, "source_sha256") for one in (a, b))
    commits = [_each(one, "commit") for one in (a, b)]
    shown = " | ".join(", ".join(_short(commit) for commit in of_run) or "none" for of_run in commits)
    if ours and theirs:
        if ours == theirs:
            return Aspect("code", EQUAL, (f"the same files of the package ({shown})",))
        return Aspect("code", DIFFERENT, (f"other files of the package ({shown})",))
    if not all(commits):
        return Aspect("code", UNKNOWN)
    if commits[0] != commits[1]:
        return Aspect("code", DIFFERENT, (shown,))
    if any(commit.endswith("-changed") for commit in commits[0]):
        return Aspect("code", UNKNOWN, (f"{shown}: with changes that are not recorded",))
    return Aspect("code", EQUAL, (shown,))


def _short(commit: str) -> str:
    return commit if commit.startswith("version") else commit[:10] + "-changed" * commit.endswith("-changed")


def _each(one: Record, name: str) -> list[str]:
    """The different values of a key over all starts, in their order."""
    return list(dict.fromkeys(str(start[name]) for start in one.starts if name in start))


def _versions(a: Record, b: Record) -> Aspect:
    ours, theirs = (_merged(one, "versions") for one in (a, b))
    if not ours or not theirs:
        return Aspect("versions", UNKNOWN)
    lines = [f"{name}: {ours.get(name, 'none')} | {theirs.get(name, 'none')}" for name in {**ours, **theirs}
             if ours.get(name) != theirs.get(name)]  # fmt: skip
    devices = [", ".join(_each(one, "device")) for one in (a, b)]
    if devices[0] != devices[1]:
        lines.append(f"device: {' | '.join(devices)}")
    return Aspect("versions", DIFFERENT if lines else EQUAL, tuple(lines))


def _merged(one: Record, name: str) -> dict[str, str]:
    """The versions of every package over all starts."""
    found: dict[str, list[str]] = {}
    for start in one.starts:
        values = start.get(name)
        for package, version in values.items() if isinstance(values, dict) else ():
            if version not in found.setdefault(package, []):
                found[package].append(version)
    return {package: ", ".join(map(str, all_of)) for package, all_of in found.items()}


def _config(a: Record, b: Record) -> list[Aspect]:
    ours, theirs = (leaves(config.to_dict(one.cfg)) for one in (a, b))
    by_effect: dict[str, list[str]] = {DIFFERENT: [], ROUNDED: [], EQUAL: []}
    for key in {**ours, **theirs}:
        if ours.get(key) != theirs.get(key):
            by_effect[effect(key)].append(f"{key}: {_value(ours.get(key))} | {_value(theirs.get(key))}")
    others = (f"{len(by_effect[EQUAL])} fields differ that change no number of training",) if by_effect[EQUAL] else ()
    lines = by_effect[DIFFERENT]
    found = [Aspect("config", DIFFERENT if lines else EQUAL, _cut(lines) if lines else others)]
    if by_effect[ROUNDED]:
        found.append(Aspect("config of the computation", ROUNDED, _cut(by_effect[ROUNDED])))
    return found


def effect(key: str) -> str:
    """What another value of a config field makes of a run: different, rounding, or equal."""
    own = declaration(ExperimentConfig, key)
    if key.startswith(_ROUNDING_KEYS):
        return ROUNDED
    # Paths are among those that may change: the content of their files counts, by its fingerprint.
    return EQUAL if own is not None and own.may_change else DIFFERENT


def _value(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _cut(lines: list[str]) -> tuple[str, ...]:
    more = len(lines) - _MOST_LINES
    return (*lines[:_MOST_LINES], *([f"and {more} more"] if more > 0 else []))


def _ranks(a: Record, b: Record) -> Aspect:
    ours, theirs = (_each(one, "world_size") for one in (a, b))
    if not ours or not theirs:
        return Aspect("ranks", UNKNOWN)
    shown = f"{', '.join(ours)} | {', '.join(theirs)}"
    return Aspect("ranks", EQUAL) if ours == theirs else Aspect("ranks", ROUNDED, (shown,))


def _named(name: str, a: Record, b: Record, *keys: tuple[str, str]) -> Aspect:
    """Whether fingerprints are the same. keys: the name in the file, and the words for it."""
    lines, known = [], False
    for key, words in keys:
        ours, theirs = a.fingerprints.get(key), b.fingerprints.get(key)
        if ours is None or theirs is None:
            continue
        known = True
        if ours != theirs:
            lines.append(f"{words}: {str(ours)[:12]} | {str(theirs)[:12]}")
    return Aspect(name, UNKNOWN if not known else DIFFERENT if lines else EQUAL, tuple(lines))


def _data(a: Record, b: Record) -> Aspect:
    found = _named("data", a, b, ("data", "fingerprint"))
    if found.state != DIFFERENT:
        return found
    with suppress(InputError, OSError):
        if line := _first_sample(a, b):
            return Aspect("data", DIFFERENT, (*found.lines, line))
    return found


def _first_sample(a: Record, b: Record) -> str | None:
    """The first sample that differs, where the shards of both runs are still there with the same layout; else None."""
    manifests: list[Manifest] = []
    for one in (a, b):
        folder = one.cfg.data.train
        if not is_packed(folder):
            return None
        manifest = read_manifest(folder)
        if manifest.fingerprint != one.fingerprints["data"]:
            return None
        manifests.append(manifest)
    ours, theirs = manifests
    if ours.num_samples != theirs.num_samples:
        return f"{ours.num_samples:,} | {theirs.num_samples:,} samples"
    files = [open_blocks(str(one.cfg.data.train), manifest) for one, manifest in zip((a, b), manifests, strict=True)]
    first = 0
    for number, (shard, other) in enumerate(zip(ours.shards, theirs.shards, strict=False)):
        if shard.samples != other.samples:
            return f"{shard.file}: {shard.samples} | {other.samples} samples"
        for block in range(files[0].count(number)) if shard.sha256 != other.sha256 else ():
            (tokens, labels), (other_tokens, other_labels) = (reader.read(number, block) for reader in files)
            changed = (tokens != other_tokens).any(1) | (labels != other_labels)
            if changed.any():
                at = int(np.flatnonzero(changed)[0])
                sample = first + block * ours.block_samples + at
                where = f"{shard.file}: sample {sample}"
                if labels[at] != other_labels[at]:
                    return f"{where} has class {labels[at]} | {other_labels[at]}"
                position = int(np.flatnonzero(tokens[at] != other_tokens[at])[0])
                return f"{where} has code {tokens[at, position]} | {other_tokens[at, position]} at token {position}"
        first += shard.samples
    return None


def _weights(a: Record, b: Record) -> Aspect:
    ours, theirs = (one.fingerprints.get("weights") for one in (a, b))
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return Aspect("first weights", UNKNOWN)
    lines = [f"{name} is in {'A' if name in ours else 'B'} alone" for name in {**ours, **theirs}
             if (name in ours) != (name in theirs)]  # fmt: skip
    both = [name for name in ours if name in theirs]
    changed = [name for name in both if ours[name] != theirs[name]]
    if changed:
        lines.insert(0, f"{changed[0]} differs ({len(changed)} of {len(both)} parameters)")
    if a.fingerprints.get("step") != b.fingerprints.get("step"):
        lines.append(f"they begin after {a.fingerprints.get('step')} | {b.fingerprints.get('step')} updates")
    return Aspect("first weights", DIFFERENT if lines else EQUAL, _cut(lines))


def _order(a: Record, b: Record) -> Aspect:
    ours, theirs = (one.fingerprints.get("order") for one in (a, b))
    if not isinstance(ours, list) or not isinstance(theirs, list):
        return Aspect("order of data", UNKNOWN)
    first = next((at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    if first is None:
        return Aspect("order of data", EQUAL)
    step = (a.fingerprints.get("step") or 0) + first + 1
    return Aspect("order of data", DIFFERENT, (f"other samples in the batch of step {step}",))


def _events(a: Record, b: Record) -> Aspect:
    lines = [f"{event}, in A alone" for event in a.events if event not in b.events]
    lines += [f"{event}, in B alone" for event in b.events if event not in a.events]
    return Aspect("updates", DIFFERENT if lines else EQUAL, _cut(lines))


def common_steps(a: Record, b: Record) -> list[int]:
    """The steps that both runs have logged, in order."""
    return sorted(a.logged.keys() & b.logged.keys())


def first_difference(a: Record, b: Record, name: str = "loss") -> Difference | None:
    """The first logged step of both at which a number differs; None where it is the same in all of them."""
    for step in common_steps(a, b):
        ours, theirs = a.logged[step].get(name), b.logged[step].get(name)
        if ours != theirs:
            return Difference(step, ours, theirs)
    return None


def rounding_bound(a: Record, b: Record) -> float:
    """The relative difference of losses up to which rounding explains it, in the precision of the coarser run."""
    return max(ROUNDING[one.cfg.train.precision] for one in (a, b))


def _losses(a: Record, b: Record) -> Aspect:
    steps = common_steps(a, b)
    if not steps:
        return Aspect("losses", UNKNOWN, ("no step is logged by both",))
    far = f"{len(steps)} logged steps, up to {steps[-1]}"
    loss = first_difference(a, b)
    # grad_norm tells of a difference a step before the loss does.
    norm = first_difference(a, b, "grad_norm")
    earlier = norm if norm is not None and (loss is None or norm.step < loss.step) else None
    notes = [] if earlier is None else [f"grad_norm already at step {earlier.step}: {earlier.a} | {earlier.b}"]
    if loss is None:
        return Aspect("losses", DIFFERENT if notes else EQUAL, (*notes, f"the same in {far}"))
    if math.isinf(loss.relative):
        what = f"first at step {loss.step}: {_value(loss.a)} | {_value(loss.b)}"
        return Aspect("losses", DIFFERENT, (what, *notes))
    bound = rounding_bound(a, b)
    by_step = [Difference(step, a.logged[step].get("loss"), b.logged[step].get("loss")) for step in steps]
    largest = max(by_step, key=lambda one: one.relative)
    # A difference that is no rounding may be as small at first: the gates of AdaLN start at zero.
    within = all(one.relative <= bound for one in by_step if one.step < loss.step + ROUNDING_STEPS)
    said = f"within rounding (at most {bound:g}" if within else f"more than rounding ({bound:g}"
    said += f" over {ROUNDING_STEPS} steps)"
    first = f"first at step {loss.step}: {loss.a!r} | {loss.b!r}, by {loss.relative:.1e} of A's, {said}"
    notes.append(f"largest at step {largest.step} of {far}: by {largest.relative:.1e}")
    return Aspect("losses", ROUNDED if within else DIFFERENT, (first, *notes, *_masks(a, b)))


def _masks(a: Record, b: Record) -> list[str]:
    """A line where micro-batches or ranks differ and dropout is on: its masks then are others."""
    layouts = [(one.cfg.train.micro_batch_size, _each(one, "world_size")) for one in (a, b)]
    models = [one.cfg.model for one in (a, b)]
    on = any(model.dropout or model.attn_dropout or model.embed_dropout for model in models)
    if layouts[0] == layouts[1] or not on:
        return []
    return ["dropout masks belong to (step, micro-step, rank), so with other micro-batches or ranks they are others"]


def in_words(a: Record, b: Record, found: list[Aspect]) -> list[str]:
    """The comparison as lines for a terminal."""
    lines = [f"A  {_about(a)}", f"B  {_about(b)}"]
    width = max(len(one.name) for one in found)
    for one in found:
        mark = {EQUAL: "same", DIFFERENT: "DIFFERENT"}.get(one.state, one.state)
        lines.append(f"{one.name.ljust(width)}  {mark.ljust(12)}  {one.lines[0] if one.lines else ''}".rstrip())
        lines += [f"{' ' * (width + 16)}{line}" for line in one.lines[1:]]
    return [*lines, verdict(found)]


def _about(one: Record) -> str:
    steps = sorted(one.logged)
    state = "unknown"
    with suppress(OSError, ValueError, LookupError, TypeError):
        state = str(json.loads((one.run / "status.json").read_text())["state"])
    return f"{one.run} ({state}, {f'logged to step {steps[-1]}' if steps else 'nothing logged'}, starts: {len(one.starts)})"
