"""The first tensor in which two runs differ: both are replayed from a step at which they have the same state."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rear_scale.checkpoint.folder import CHECKPOINTS, Checkpoint, open_checkpoint, saved_steps, step_name
from rear_scale.progress import say
from rear_scale.replay.aspects import Record, common_steps, first_difference
from rear_scale.replay.command import differing
from rear_scale.replay.moment import Moment, check_step, checkpoint_before, moment
from rear_scale.replay.recorder import Key, Recorder, Row, first_index
from rear_scale.replay.steps import Replay, Result
from rear_scale.run.fingerprints import digest
from rear_scale.train import setup
from rear_scale.world import Ranks, World, joined

# One line for the first row of each group: the first of all, then what a reader asks for.
_GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("output", ("output", "loss")),
    ("gradient", ("gradient", "weight gradient")),
    ("update", ("update",)),
)

_MOST_SKIPS = 16  # updates that are tried

# The place of a row that two replays have in common: rank, micro-step, name, kind, and how often the name came before.
Place = tuple[int, int, str, str, int]


@dataclass(frozen=True)
class Found:
    """A value that differs. largest: the largest difference of an entry, None where shapes differ or one run lacks the value."""

    row: Row
    largest: float | None
    index: tuple[int, ...] | None
    a: float | None
    b: float | None

    def in_words(self) -> str:
        key = self.row.key
        where = "" if key.micro_step < 0 else f", micro-step {key.micro_step} of rank {key.rank}"
        name = f"{key.what} {key.name} (step {self.row.step}{where})"
        if self.largest is None:
            return f"{name} is not there or has another shape in one of them"
        relative = self.largest / self.row.largest if self.row.largest else float("inf")
        at = list(self.index or ())
        values = f"at {at}: {self.a:.9g} | {self.b:.9g}"
        return f"{name}: differs by up to {self.largest:.3e}, {relative:.1e} of its largest value, {values}"


@dataclass(frozen=True)
class Tensors:
    """The result of `compare`. found: the first difference of all, then the first output, gradient and update that differ."""

    step: int | None  # the first step that differs; None = the replays are the same
    found: list[Found]
    notes: list[str]


def step_to_compare(a: Record, b: Record) -> int | None:
    """The first logged step at which loss or gradient norm differ, else the last that both have logged; None without any."""
    found = [one.step for name in ("loss", "grad_norm") if (one := first_difference(a, b, name)) is not None]
    steps = common_steps(a, b)
    return min(found) if found else steps[-1] if steps else None


def compare(a: Record, b: Record, step: int, ranks: Ranks) -> Tensors:
    """Replays two runs to a step and finds where they part. Joins the ranks. Raises InputError as a replay does."""
    ours, theirs, notes = _same_layout(moment(a.run, step), moment(b.run, step))
    datas = [setup.check_data(one.cfg, ranks) for one in (ours, theirs)]
    for one, data in zip((ours, theirs), datas, strict=True):
        check_step(one, data.plan.total_steps)
    with joined(ranks) as world:
        found = in_world(ours, theirs, datas, world)
    return replace(found, notes=[*notes, *found.notes])


def in_world(ours: Moment, theirs: Moment, datas: list[setup.Data], world: World) -> Tensors:
    """As `compare`, of moments with the same layout of ranks and micro-steps. All ranks must call this."""
    start = _common_start(ours, theirs, world)
    if world.is_main:
        say(f"replaying both from {f'step {start}' if start else 'their beginning'} to step {ours.step}")
    runs = [_Run(one, data, world, start) for one, data in zip((ours, theirs), datas, strict=True)]
    traces = [one.trace() for one in runs]
    notes = [
        line for one, (results, _) in zip(runs, traces, strict=True) for line in _unlike_the_log(one.moment, results)
    ]
    notes += [
        line for one, (results, _) in zip(runs, traces, strict=True) for line in _skipped_in_silence(one, results)
    ]
    step = _first_step(traces, start, world)
    if step is None:
        return Tensors(None, [], [*notes, f"the replays of steps {start + 1} to {ours.step} are the same in every bit"])
    rows = [one.recorded(step, ()).rows for one in runs]
    wanted = _first_rows(rows, world)
    captured = [one.recorded(step, [row.key for row, _ in wanted] + [key for _, key in wanted if key]) for one in runs]
    local = [_size(row, key, captured) for row, key in wanted if row.key.rank == world.rank]
    by_row = {one.row.key: one for of_rank in world.gather(local) for one in of_rank}
    return Tensors(step, [by_row[row.key] for row, _ in wanted], notes)


@dataclass
class _Run:
    """One of the two runs. Each replay starts anew, so that only one model is in memory."""

    moment: Moment
    data: setup.Data
    world: World
    start: int

    def without_update(self, skipped: int, last: int) -> Result:
        """The last step of a replay that leaves out the update of another step."""
        made = self._replay()
        while made.done < last - 1:
            made.step(skip=made.done + 1 == skipped)
        return made.step()

    def trace(self) -> tuple[list[Result], list[str]]:
        """The results of all steps, and a hash of this rank's part of the weights after each."""
        made, hashes = self._replay(), []
        results = []
        while made.done < self.moment.step:
            results.append(made.step())
            hashes.append(_hash(made))
        return results, hashes

    def recorded(self, step: int, wanted: Iterable[Key]) -> Recorder:
        """All values of one step."""
        made = self._replay()
        while made.done < step - 1:
            made.step()
        recorder = Recorder(self.world, wanted=frozenset(wanted))
        made.step(recorder)
        return recorder

    def _replay(self) -> Replay:
        checkpoint = checkpoint_before(self.moment, self.world, at_most=self.start)
        return Replay(self.moment, self.data.plan, self.world, *self.data.open(self.world), checkpoint)


def _same_layout(ours: Moment, theirs: Moment) -> tuple[Moment, Moment, list[str]]:
    """Both with A's micro-batch and ranks, so that their micro-steps are the same ones; and a line where B had others."""
    train = theirs.cfg.train
    mine = (ours.cfg.train.micro_batch_size, ours.ranks)
    if (train.micro_batch_size, theirs.ranks) == mine:
        return ours, theirs, []
    note = (
        f"B had train.micro_batch_size={train.micro_batch_size} on {theirs.ranks or 'unknown'} ranks and is replayed as A: "
        f"train.micro_batch_size={mine[0]} on {mine[1] or 'unknown'}"
    )
    cfg = replace(theirs.cfg, train=replace(train, micro_batch_size=mine[0]))
    return ours, replace(theirs, cfg=cfg, ranks=ours.ranks), [note]


def _common_start(ours: Moment, theirs: Moment, world: World) -> int:
    """The newest step before the compared one of which both runs keep a checkpoint with the same tensors; 0 = the beginning."""

    def newest() -> int:
        both = set(saved_steps(ours.run)) & set(saved_steps(theirs.run))
        for step in sorted((one for one in both if one < ours.step), reverse=True):
            if _same_state(*(open_checkpoint(one.run / CHECKPOINTS / step_name(step)) for one in (ours, theirs))):
                return step
        return 0

    return world.on_main(newest)


def _same_state(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether two checkpoints hold the same tensors, in whatever files."""
    if a.meta["index"].keys() != b.meta["index"].keys():
        return False
    if [item["sha256"] for item in a.meta["files"]] == [item["sha256"] for item in b.meta["files"]]:
        return True
    readers: dict[str, list[Callable[[str], torch.Tensor]]] = {}
    for key in a.meta["index"]:
        state_name, _, name = key.partition("/")
        if state_name not in readers:
            readers[state_name] = [one.reader(state_name) for one in (a, b)]
        ours, theirs = (read(name) for read in readers[state_name])
        # Bit patterns, because NaN != NaN.
        if ours.shape != theirs.shape or not torch.equal(ours.view(torch.int32), theirs.view(torch.int32)):
            return False
    return True


def _hash(made: Replay) -> str:
    content = hashlib.sha256()
    for number, (name, weight) in enumerate(made.strategy.tensors("param")):
        if number % made.world.size == made.world.rank:
            content.update(f"{name} {digest(weight)}\n".encode())
    return content.hexdigest()


def _first_step(traces: list[tuple[list[Result], list[str]]], start: int, world: World) -> int | None:
    """The first step of which numbers or updated weights differ on any rank."""
    (results, hashes), (other_results, other_hashes) = traces
    same = [
        repr(one.numbers) == repr(other.numbers) and mine == theirs  # repr, because NaN != NaN
        for one, other, mine, theirs in zip(results, other_results, hashes, other_hashes, strict=True)
    ]
    everywhere = [all(of_ranks) for of_ranks in zip(*world.gather(same), strict=True)]
    return None if all(everywhere) else start + 1 + everywhere.index(False)


def _unlike_the_log(asked: Moment, results: list[Result]) -> list[str]:
    """A line for the first replayed step whose numbers the run did not log."""
    for result in results:
        line = asked.logged.get(result.step)
        if line is not None and (names := differing(result, line)):
            name = names[0]
            return [
                f"the replay of {asked.run} has {name} {result.numbers[name]!r} at step {result.step}, but {line[name]!r} is "
                "logged: something made it that the folder does not hold (ranks, machine, code, or a fault)"
            ]
    return []


def _skipped_in_silence(run: _Run, results: list[Result]) -> list[str]:
    """A line, if the run has logged what a replay without one update computes: then that update was not made, although no event
    says so. All ranks must call this."""
    logged = run.moment.logged
    # The log is rank 0's, and all ranks have to make the same replays.
    steps = run.world.from_main(_around_the_first_unlike(logged, results))
    if steps is None:
        return []
    agreed, unlike = steps
    for step in range(unlike - 1, max(agreed, unlike - _MOST_SKIPS) - 1, -1):
        found = run.without_update(step, unlike)
        if run.world.from_main(not differing(found, logged[unlike])):
            return [
                f"without the update of step {step}, the replay of {run.moment.run} has what is logged at step {unlike}: that "
                "update was not made, and no event says so"
            ]
    return []


def _around_the_first_unlike(logged: dict[int, dict[str, object]], results: list[Result]) -> tuple[int, int] | None:
    """The last step that has the logged numbers before one that has not, and that one; None without the two."""
    agreed = None
    for result in results:
        if result.step in logged:
            if differing(result, logged[result.step]):
                return None if agreed is None else (agreed, result.step)
            agreed = result.step
    return None


def _places(rows: Iterable[Row]) -> dict[Place, Row]:
    seen: Counter[tuple[int, int, str, str]] = Counter()
    found: dict[Place, Row] = {}
    for row in rows:
        key = row.key
        name = (key.rank, key.micro_step, key.name, key.what)
        found[(*name, seen[name])] = row
        seen[name] += 1
    return found


def _first_rows(rows: list[list[Row]], world: World) -> list[tuple[Row, Key | None]]:
    """The first row of A that differs, over all ranks, and the first of each group; each with its key in B (None = not there)."""
    ours, theirs = (_places(one) for one in rows)
    local = [
        (row, theirs[place].key if place in theirs else None)
        for place, row in ours.items()
        if place not in theirs or theirs[place].digest != row.digest or theirs[place].shape != row.shape
    ]
    local += [(row, row.key) for place, row in theirs.items() if place not in ours]
    everywhere = [one for of_rank in world.gather(local) for one in of_rank]
    everywhere.sort(key=lambda one: (one[0].key.order, one[0].key.rank))
    first = everywhere[:1]
    for _, kinds in _GROUPS:
        first += [one for one in everywhere if one[0].key.what in kinds][:1]
    return [one for at, one in enumerate(first) if one not in first[:at]]


def _size(row: Row, key: Key | None, captured: list[Recorder]) -> Found:
    ours, theirs = captured[0].captured.get(row.key), captured[1].captured.get(key) if key is not None else None
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return Found(row, None, None, None, None)
    a, b = ours.double(), theirs.double()
    difference = (a - b).abs()
    difference = difference.where(difference.isfinite() | (a == b), torch.inf)
    largest = float(difference.max())
    index = first_index(difference == difference.max())
    return Found(row, largest, index, float(a[index]), float(b[index]))


def in_words(found: Tensors, a: Path, b: Path) -> list[str]:
    """The result as lines for a terminal."""
    lines = [*found.notes]
    if found.step is not None:
        lines.append(f"the first step that differs when replayed: {found.step} (A {a}, B {b})")
        lines += [one.in_words() for one in found.found]
    return lines
