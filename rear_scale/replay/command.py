"""The work of launchers/replay.py: a step of a run again, its values by module, and whether its numbers are those of the log."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rear_scale import config
from rear_scale.checkpoint.folder import CHECKPOINTS, saved_steps, step_name
from rear_scale.config import InputError, required_path
from rear_scale.parallel import facts
from rear_scale.progress import progress, say
from rear_scale.replay import table
from rear_scale.replay.moment import Moment, check_step, checkpoint_before, moment
from rear_scale.replay.nonfinite import Fault, faults
from rear_scale.replay.recorder import Recorder, Row
from rear_scale.replay.steps import Replay, Result
from rear_scale.run.folder import device_name, read_lines
from rear_scale.run.versions import source_sha256, versions
from rear_scale.train import setup
from rear_scale.world import Ranks, World, joined

# Relative differences of a loss that rounding explains over some updates: the bounds of tests/test_strategy_matrix.py.
ROUNDING = {"fp32": 1e-5, "bf16": 2e-3}
ROUNDING_STEPS = 20


@dataclass(frozen=True)
class Replayed:
    """A step that was made again. rows: of all ranks; faults: as nonfinite.faults, with `until_nonfinite` alone."""

    moment: Moment
    results: list[Result]  # of the steps from the checkpoint on
    rows: list[Row]
    faults: list[Fault]


def step_to_show(run: Path, step: int | None, until_nonfinite: bool) -> int:
    """The step that the user means. Raises InputError without one, except where `until_nonfinite` finds it in events.jsonl."""
    if step is not None:
        return step
    steps = nonfinite_steps(run)
    if until_nonfinite and steps:
        return steps[-1]
    also = f", and {run}/events.jsonl names no step that was not finite" if until_nonfinite else ""
    raise InputError(f"--step is missing{also}. Name the step to make again: --step N")


def nonfinite_steps(run: Path) -> list[int]:
    """The steps whose loss or gradient was not finite, as events.jsonl has them."""
    events = [line.get("step") for line in read_lines(run / "events.jsonl") if line.get("event") == "nonfinite"]
    return [step for step in events if isinstance(step, int)]


def replay(
    run: Path, step: int, overrides: Sequence[str], out: Path | None, ranks: Ranks, *, until_nonfinite: bool
) -> Replayed:
    """Joins the ranks and makes a step of a run again, as `again` does. Raises InputError as `moment` and `check_data` do."""
    asked = moment(run, step, overrides)
    data = setup.check_data(asked.cfg, ranks)
    check_step(asked, data.plan.total_steps)
    if ranks.rank == 0:
        for line in hints(asked, ranks):
            say(line)
    with joined(ranks) as world:
        return again(asked, data, world, out or default_table(asked), until_nonfinite=until_nonfinite)


def again(asked: Moment, data: setup.Data, world: World, path: Path, *, until_nonfinite: bool = False) -> Replayed:
    """Makes a step of a run again, and says whether it is the logged one. Rank 0 prints its table and writes it to `path`.

    All ranks must call this. until_nonfinite: watches every step from the checkpoint on, ends at the first one with a fault,
    and says the fault in place of the table.
    """
    tokens, codebook = data.open(world)
    checkpoint = checkpoint_before(asked, world)
    if world.is_main:
        say(f"replaying from {checkpoint.path if checkpoint else 'the beginning of the run'}")
    made = Replay(asked, data.plan, world, tokens, codebook, checkpoint)
    recorder, results = _steps(made, until_nonfinite)
    if until_nonfinite:
        folder = required_path(asked.cfg.data.train, "data.train")
        done = Replayed(asked, results, [], faults(recorder, tokens, folder, world))
    else:
        done = Replayed(asked, results, [row for of_rank in world.gather(recorder.rows) for row in of_rank], [])
    if world.is_main:
        for line in report(done, world.size, until_nonfinite):
            print(line)
        if not until_nonfinite:
            table.write_csv(path, done.rows)
            say(f"every rank, micro-step, weight and update: {path}")
    return done


def _steps(made: Replay, until_nonfinite: bool) -> tuple[Recorder, list[Result]]:
    """The recorder of the last step that was made, and all results."""
    asked, world = made.moment, made.world
    results: list[Result] = []
    recorder = Recorder(world, only_faults=until_nonfinite)
    with progress(f"replay of {asked.cfg.run.name}", asked.step, "step", done=made.done, show=world.is_main) as bar:
        while made.done < asked.step:
            watched = until_nonfinite or made.done == asked.step - 1
            recorder = Recorder(world, only_faults=until_nonfinite)
            results.append(made.step(recorder if watched else None))
            bar.update()
            if until_nonfinite and any(world.gather(bool(recorder.rows))):
                break
    return recorder, results


def default_table(asked: Moment) -> Path:
    """The table's path unless the user names one: below the current folder, because the run's is not written to."""
    name = asked.run.resolve().name
    return Path("replays") / name / f"{step_name(asked.step)}.csv"


def report(done: Replayed, ranks: int, until_nonfinite: bool) -> list[str]:
    """The lines of the terminal: the table or the faults, and whether the numbers are the logged ones."""
    if not until_nonfinite:
        return [table.in_words(done.rows), "", *agreement(done, ranks)]
    first, last = done.results[0].step, done.results[-1].step
    found = [fault.in_words() for fault in done.faults]
    if not found:
        found = [f"every value of steps {first} to {last} is finite"]
        if last in nonfinite_steps(done.moment.run):
            found[0] += f", but the run recorded that step {last} was not: neither its data nor its weights made it so"
    return [*agreement(done, ranks), *found]


def agreement(done: Replayed, ranks: int) -> list[str]:
    """Lines on whether the replayed steps have the logged numbers."""
    logged = done.moment.logged
    compared = [(result, logged[result.step]) for result in done.results if result.step in logged]
    last = done.results[-1]
    if not compared:
        return [f"step {last.step}: loss {last.numbers['loss']:.10g}; the run has logged none of the replayed steps"]
    different = [(result, line) for result, line in compared if differing(result, line)]
    if different:
        return [_difference(*different[0], done.moment, ranks)]
    result, _ = compared[-1]
    same = f"step {result.step}: loss {result.numbers['loss']!r}, bit for bit as logged"
    if result.step != last.step:
        same += f"; the run has no line of step {last.step}, whose loss is {last.numbers['loss']!r} here"
    return [same if len(compared) == 1 else f"{same}, as are {len(compared) - 1} logged steps before it"]


def differing(result: Result, line: dict[str, object]) -> list[str]:
    """The names of the numbers of a step that are not those of its line in metrics.jsonl, which has null for NaN and infinity."""
    return [
        name
        for name, value in result.numbers.items()
        if name in line and line[name] != (value if math.isfinite(value) else None)
    ]


def _difference(result: Result, line: dict[str, object], asked: Moment, ranks: int) -> str:
    names = differing(result, line)
    name = "loss" if "loss" in names else names[0]
    here, there = result.numbers[name], line.get(name)
    if not isinstance(there, float) or not math.isfinite(here):
        return f"step {result.step}: {name} {here}, but {'null' if there is None else there} is logged"
    relative = abs(here - there) / max(abs(there), 1e-300)
    bound = ROUNDING[asked.cfg.train.precision]
    what = "within rounding" if relative <= bound else f"more than rounding ({bound:g})"
    before = "" if name == "loss" else f"loss {result.numbers['loss']!r} as logged, but "
    text = f"step {result.step}: {before}{name} {here!r}, logged {there!r}: a relative difference of {relative:.1e}, {what}"
    others = changed(asked, ranks)
    return f"{text}. What differs from the run: {', '.join(others)}" if others else text


def changed(asked: Moment, ranks: int) -> list[str]:
    """What of this program and machine differs from the start of the run that is recorded, and may change bits."""
    start, found = asked.start, []
    if asked.ranks not in (None, ranks):
        found.append(f"{asked.ranks} ranks there, {ranks} here")
    recorded = start.get("versions")
    for name, version in versions().items():
        if isinstance(recorded, dict) and name != "rear_scale" and recorded.get(name, version) != version:
            found.append(f"{name} {recorded[name]} there, {version} here")
    if start.get("source_sha256", source_sha256()) != source_sha256():
        found.append("the code")
    here = device_name()
    if start.get("device", here) != here:
        found.append(f"{start['device']} there, {here} here")
    return found


def hints(asked: Moment, ranks: Ranks) -> list[str]:
    """Lines on how to get the same bits, where these ranks are not as many as the run's."""
    if asked.ranks in (None, ranks.world_size):
        return []
    words = ("replay.py", str(asked.run), "--step", str(asked.step))
    return [
        f"{asked.run} had {asked.ranks} ranks at step {asked.step}, here {ranks.world_size}: losses agree within rounding. For "
        f"the same bits: {command_of(asked.ranks, words)}"
    ]


def command_of(ranks: int | None, words: Sequence[str]) -> str:
    """A command line of a launcher on a number of ranks; words: the launcher's name and its arguments."""
    name, *arguments = words
    start = "python" if ranks in (None, 1) else f"torchrun --nproc-per-node {ranks}"
    return f"{start} launchers/{name} {shlex.join(arguments)}"


def show(run: Path, step: int, overrides: Sequence[str], out: Path | None, ranks: Ranks, *, full: bool) -> None:
    """Prints what `replay` would do, on rank 0, without data and process group. full: the config of the step too."""
    asked = moment(run, step, overrides)
    if ranks.rank != 0:
        return
    if full:
        print(config.to_yaml(asked.cfg))
    before = [saved for saved in saved_steps(run) if saved < step]
    place = run / CHECKPOINTS / step_name(before[0]) if before else "the beginning of the run"
    updates = step - (before[0] if before else 0)
    row = facts.of(asked.cfg.strategy)
    print(f"from: {place}, {updates} updates")
    print(f"the run: strategy={row.name}, ranks: {asked.ranks or 'not recorded'}; here: {ranks.world_size}")
    line = asked.logged.get(step)
    print(f"logged at step {step}: {json.dumps({'loss': line.get('loss')}) if line else 'nothing'}")
    print(f"table: {out or default_table(asked)}")
    for text in hints(asked, ranks):
        print(text)
