"""Kills and disk errors before every file call of the launchers: what is visible stays whole, and the same command ends as if
nothing had happened.

    python tests/kills.py --job single                      a kill before each file call of a run
    python tests/kills.py --job zero1 --calls 60            ... before 60 of them, evenly spread over both ranks
    python tests/kills.py --job sample --errors ENOSPC EIO  an error at each write in place of a kill

One process imports everything once and forks a child for each rank of each start, so that a start costs about a second.
tests/file_calls.c, loaded before everything else, counts the calls and stands in their way. What a kill before a call leaves is
copied while all ranks of one run stand still there; every fifth kill is a real SIGKILL, and so are those of later starts.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import errno
import functools
import gc
import importlib
import json
import os
import pkgutil
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kill_jobs import (
    EVERY,
    HERE,
    JOBS,
    STEPS,
    Job,
    fault_of,
    is_stray,
    logged_steps,
    make_inputs,
    newest_published,
    tree,
    wrong_lines,
)

OPEN, RENAME, SYNC, UNLINK, MKDIR, LINK, TRUNCATE, WRITE = (1 << bit for bit in range(8))
KILLED_BEFORE = OPEN | RENAME | SYNC | UNLINK | MKDIR | LINK | TRUNCATE
FAILING = OPEN | RENAME | SYNC | MKDIR | LINK | TRUNCATE | WRITE  # what a disk that is full or broken refuses

_HUNG_S = 120.0  # a start takes a second
_REST_S = 0.3  # for the other ranks after SIGTERM
# A folder that is there already needs no other; a status that cannot be replaced is written over.
_HARMLESS = re.compile(r"\(mkdir|\((open|write|sync|rename)\trun(/status\.json|\))")


@dataclass(frozen=True)
class Interruption:
    """Before the n-th file call of a rank: SIGKILL, or that call fails with an errno (`stays`: and all after it)."""

    rank: int
    number: int
    error: int = 0
    stays: bool = False

    def __str__(self) -> str:
        what = errno.errorcode[self.error] if self.error else "kill"
        return f"{what}{' from' * self.stays} {self.number} on rank {self.rank}"


@dataclass(frozen=True)
class Left:
    """The files that a kill leaves behind."""

    folder: Path  # a copy
    call: str  # that was not made any more
    published: int  # step of the newest checkpoint that had become visible; 0 = none


@dataclass
class Ended:
    """One start of a job: exit codes (negative: the signal), printed lines and file calls, by rank."""

    codes: list[int]
    said: list[str]
    calls: list[list[str]]
    hung: bool

    @property
    def text(self) -> str:
        return "\n".join(self.said)


@dataclass
class Report:
    """The findings of a campaign, one line each."""

    job: str
    calls: list[int] = field(default_factory=list)  # of an unbroken run, by rank
    done: int = 0  # kills or errors
    real: int = 0  # of the kills: by SIGKILL; the others are copies of what such a kill leaves
    again: int = 0  # of the kills: of the start after a first one
    not_reached: int = 0  # runs that were over before
    torn: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    stray: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    codes: dict[str, int] = field(default_factory=dict)  # exit codes of starts with an error, by how many had them
    seconds: float = 0.0

    @property
    def findings(self) -> list[str]:
        names = ("torn", "lost", "differing", "stray", "failed")
        return [f"{name}: {line}" for name in names for line in getattr(self, name)]


class Harness:
    """Starts jobs in forked child processes, with all files below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.inputs, self.case = folder, folder / "inputs", folder / "case"
        self.shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self.lines: dict[str, list[tuple[int, str]]] = {}  # of the logs of an unbroken run
        self.draw = random.Random(0)
        _import_everything()
        self.inputs.mkdir(parents=True)
        self._in_child(lambda: make_inputs(self.inputs))
        gc.collect()
        gc.freeze()

    def _in_child(self, function: Callable[[], object]) -> None:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                function()
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        assert os.waitpid(child, 0)[1] == 0, "the inputs could not be made"

    def _fresh_case(self) -> None:
        shutil.rmtree(self.case, ignore_errors=True)
        self.case.mkdir()

    def start(
        self,
        job: Job,
        interruption: Interruption | None = None,
        mask: int = KILLED_BEFORE,
        stopped: Callable[[], object] | None = None,
    ) -> Ended:
        """One start of all ranks. When one ends badly, the others are ended as a launcher does it.

        stopped: called before each file call, while no rank runs.
        """
        from rear_scale.world import free_port

        port = free_port() if job.ranks > 1 else None
        logs = self._logs(job)
        said = [self.folder / f"said.{rank}" for rank in range(job.ranks)]
        for path in (*logs, *said):
            path.unlink(missing_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        children = {}
        for rank in range(job.ranks):
            here = interruption if interruption is not None and interruption.rank == rank else Interruption(rank, 0)
            if stopped is not None:
                here = Interruption(rank, -1)
            child = os.fork()
            if child == 0:
                self._be(job, rank, port, here, mask, logs[rank], said[rank])
            children[child] = rank
        codes, hung = self._wait(children, stopped or (lambda: None))
        return Ended(
            [codes[rank] for rank in range(job.ranks)],
            [path.read_text(errors="replace") if path.exists() else "" for path in said],
            [path.read_text().splitlines() if path.exists() else [] for path in logs],
            hung,
        )

    def _wait(self, children: dict[int, int], stopped: Callable[[], object]) -> tuple[dict[int, int], bool]:
        codes: dict[int, int] = {}
        deadline, term = time.monotonic() + _HUNG_S, self.draw.random() < 0.3
        hung = False
        while len(codes) < len(children):
            child, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
            if child in children and os.WIFSTOPPED(status):
                # All ranks stand still while the folder is copied.
                others = [other for other, rank in children.items() if other != child and rank not in codes]
                self._signal(children, codes, signal.SIGSTOP)
                ended = {
                    other: state for other in others if not os.WIFSTOPPED(state := os.waitpid(other, os.WUNTRACED)[1])
                }
                codes |= {children[other]: os.waitstatus_to_exitcode(state) for other, state in ended.items()}
                stopped()
                self._signal(children, codes, signal.SIGCONT)
                continue
            if child in children:
                codes[children[child]] = os.waitstatus_to_exitcode(status)
                if codes[children[child]] != 0 and len(codes) < len(children):
                    # torchrun asks before it kills; a scheduler's cgroup does not.
                    self._signal(children, codes, signal.SIGTERM if term else signal.SIGKILL)
                    deadline = min(deadline, time.monotonic() + _REST_S)
                continue
            if time.monotonic() > deadline:
                hung = hung or all(code == 0 for code in codes.values())
                self._signal(children, codes, signal.SIGKILL)
            time.sleep(0.002)
        return codes, hung

    @staticmethod
    def _signal(children: dict[int, int], codes: dict[int, int], number: int) -> None:
        for child, rank in children.items():
            if rank not in codes:
                os.kill(child, number)

    def _be(self, job: Job, rank: int, port: int | None, here: Interruption, mask: int, log: Path, said: Path) -> None:
        """Runs this rank of the job in the forked child, to its end."""
        try:
            out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.chdir(self.folder)
            if port is not None:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.ranks, "LOCAL_WORLD_SIZE": job.ranks}
                place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in place.items()})
            launcher = str(HERE.parent / "launchers" / job.launcher)
            sys.argv = [launcher, *job.arguments(self.inputs, self.case)]
            self.shim.file_calls_begin(
                os.fsencode(self.case), os.fsencode(log), mask, ctypes.c_long(here.number), here.error, int(here.stays)
            )
            runpy.run_path(launcher, run_name="__main__")
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(99)

    def reference(self, job: Job, mask: int) -> tuple[dict[str, str], list[int]]:
        """The files of an unbroken run, and how many calls each rank made."""
        if job.name.startswith("zero"):
            import deepspeed.runtime.zero.muon.original_muon  # noqa: F401

            import rear_scale.parallel.deepspeed  # noqa: F401
        if not job.trains and not (self.inputs / "run").exists():
            self.reference(JOBS["single"], mask)
            shutil.copytree(self.case / "run", self.inputs / "run")
        self._fresh_case()
        if job.trains or job.launcher == "pretokenize.py":
            from rear_scale import cli

            arguments = job.arguments(self.inputs, self.case)
            cli.load_config(arguments[1], arguments[2:])  # remembered
        ended = self.start(job, mask=mask)
        assert ended.codes == [0] * job.ranks, (job.name, ended.codes, ended.text)
        files = tree(self.case)
        if job.trains:
            self.lines = {
                name: logged_steps(self.case / name) for name in ("run/metrics.jsonl", "run/evaluations.jsonl")
            }
        unfinished = [name for name in files if is_stray(name)]
        assert not unfinished, (job.name, "an unbroken run leaves", unfinished)
        return files, [len(calls) for calls in ended.calls]

    def kills(
        self,
        job: Job,
        most: int | None = None,
        report: Callable[[str], object] = print,
        part: tuple[int, int] = (0, 1),
    ) -> Report:
        """A kill before each file call, or before `most` of them, evenly spread.

        What a kill leaves is taken from one run that stops before each call, when the folder is copied; every fifth kill is
        a real one. Every fourth time the start after it is killed too.
        """
        begun, found = time.monotonic(), Report(job.name)
        files, found.calls = self.reference(job, KILLED_BEFORE)
        everywhere = [(rank, n) for rank, count in enumerate(found.calls) for n in range(1, count + 1)]
        told: set[str] = set()

        def new(findings: list[str]) -> list[str]:
            fresh = [line for line in findings if line not in told]
            told.update(fresh)
            return fresh

        wanted = spread(everywhere, most)[part[0] :: part[1]]
        left = self._left_by_kills(job, set(wanted))
        found.not_reached = len(wanted) - len(left)  # ranks share out work, not always alike
        for turn, (place, state) in enumerate(left.items()):
            where, published = f"killed before {state.call}; ", state.published
            if turn % 5 == 4:
                where, published = self._kill(job, Interruption(*place), "", found)
            else:
                self._become(state.folder)
                found.done += 1
            resumed = [f"run/checkpoints/step_{self._newest():08d}/"]  # what a start goes on from is kept
            self._check_after_kill(job, files, where, published, found)
            if turn % 4 == 3:
                rank = self.draw.randrange(job.ranks)
                second = Interruption(rank, self.draw.randint(1, max(1, found.calls[rank] * 2 // 3)))
                before = found.done
                where, again = self._kill(job, second, where, found, fresh=False)
                found.again += found.done - before
                resumed.append(f"run/checkpoints/step_{self._newest():08d}/")
                self._check_after_kill(job, files, where, max(published, again), found)
            self._check_end(job, self.start(job), files, where, found, tuple(resumed))
            report(f"{job.name} {found.done}: {where}" + "".join(f"\n    FOUND {line}" for line in new(found.findings)))
        found.seconds = round(time.monotonic() - begun, 1)
        return found

    def _kill(
        self, job: Job, interruption: Interruption, where: str, found: Report, *, fresh: bool = True
    ) -> tuple[str, int]:
        """A real kill (SIGKILL): its place, and the newest checkpoint that was visible then."""
        if fresh:
            self._fresh_case()
        ended = self.start(job, interruption)
        calls = ended.calls[interruption.rank]
        if ended.codes[interruption.rank] == -signal.SIGKILL and len(calls) == interruption.number and not ended.hung:
            found.done += 1
            found.real += 1
            where += f"{interruption} ({calls[-1]}); "
        else:
            found.not_reached += 1
            where += f"{interruption} (not reached: {ended.codes}); "
            refused = any(code not in (0, -signal.SIGKILL) for code in ended.codes) and not _refuses_what_is_there(
                job, ended
            )
            if ended.hung or refused:
                found.failed.append(f"{where}{ended.codes}{' hung' * ended.hung}: {_last_lines(ended)}")
        return where, newest_published(ended.calls[0])

    def _left_by_kills(self, job: Job, wanted: set[tuple[int, int]]) -> dict[tuple[int, int], Left]:
        """By wanted (rank, number of its call): the folder as a kill of all ranks before that call leaves it."""
        shutil.rmtree(self.folder / "left", ignore_errors=True)
        self._fresh_case()
        seen, left = [0] * job.ranks, {}

        def stopped() -> None:
            calls = [path.read_text().splitlines() if path.exists() else [] for path in self._logs(job)]
            for rank, made in enumerate(calls):
                if len(made) > seen[rank] and (rank, len(made)) in wanted:
                    seen[rank] = len(made)
                    folder = self.folder / "left" / f"{rank}-{len(made)}"
                    shutil.copytree(self.case, folder, symlinks=True)
                    where = f"{len(made)} on rank {rank} ({made[-1]})"
                    left[rank, len(made)] = Left(folder, where, newest_published(calls[0]))

        ended = self.start(job, stopped=stopped)
        assert ended.codes == [0] * job.ranks, (job.name, ended.codes, ended.text)
        return dict(sorted(left.items()))

    def _become(self, folder: Path) -> None:
        shutil.rmtree(self.case)
        shutil.copytree(folder, self.case, symlinks=True)

    def _logs(self, job: Job) -> list[Path]:
        return [self.folder / f"calls.{rank}" for rank in range(job.ranks)]

    def errors(
        self, job: Job, numbers: Sequence[int], most: int | None = None, report: Callable[[str], object] = print
    ) -> Report:
        """Each n-th call that needs the disk fails, with the errnos in turn, once and for good; `most` of them or all."""
        begun, found = time.monotonic(), Report(job.name)
        files, found.calls = self.reference(job, FAILING)
        ways = [(number, stays) for stays in (False, True) for number in numbers]
        places = spread([(rank, n) for rank, count in enumerate(found.calls) for n in range(1, count + 1)], most)
        for turn, place in enumerate(places):
            self._fresh_case()
            interruption = Interruption(*place, *ways[turn % len(ways)])
            ended = self.start(job, interruption, FAILING)
            calls = ended.calls[interruption.rank]
            if len(calls) < interruption.number:
                found.not_reached += 1
            else:
                found.done += 1
            where = f"{interruption} ({calls[min(len(calls), interruption.number) - 1]}); "
            code = " ".join(map(str, ended.codes))
            found.codes[code] = found.codes.get(code, 0) + 1
            self._check_error(job, ended, interruption, files, where, found)
            if job.trains:
                self._check_after_kill(job, files, where, newest_published(_made(ended, interruption)), found)
                self._check_trained(job, self.start(job), files, where, not any(ended.codes), found)
            else:
                self._check_after_kill(job, files, where, 0, found)
                self._check_end(job, self.start(job), files, where, found)
            report(f"{job.name} {found.done}: {where}{ended.codes} {_last_lines(ended)[-200:]!r}")
        found.seconds = round(time.monotonic() - begun, 1)
        return found

    def _check_error(
        self, job: Job, ended: Ended, interruption: Interruption, files: dict[str, str], where: str, found: Report
    ) -> None:
        """Checks the exit code, the message and the state of a start during which the disk fails."""
        first = next((code for code in ended.codes if code not in (-signal.SIGKILL, -signal.SIGTERM)), None)
        if ended.hung or first not in (0, 1, 2):
            found.failed.append(f"{where}{ended.codes}{' hung' * ended.hung}: {_last_lines(ended)}")
        elif "Traceback" in ended.text:
            found.failed.append(f"{where}{ended.codes}, a traceback: {_last_lines(ended)}")
        elif os.strerror(interruption.error) not in ended.text and not (first == 0 and _HARMLESS.search(where)):
            found.failed.append(f"{where}{ended.codes}, the reason is not said: {_last_lines(ended)}")
        if not job.trains:
            return
        try:
            status = json.loads((self.case / "run/status.json").read_text())
        except (OSError, ValueError):
            status = {"state": None}
        expected = {0: {"done"}, 1: {"failed", None}, 2: {"failed", None}}.get(first or 0, set())
        if status["state"] not in expected and not interruption.stays:
            found.failed.append(f"{where}{ended.codes}, but status.json says {status}")

    def _check_trained(
        self, job: Job, ended: Ended, files: dict[str, str], where: str, done: bool, found: Report
    ) -> None:
        """Checks the end of a run that met an error: lost lines may be missing, and all existing files are correct."""
        now = tree(self.case)
        if ended.hung or any(ended.codes) or "Traceback" in ended.text:
            found.failed.append(f"{where}the same command: {ended.codes}{' hung' * ended.hung}: {_last_lines(ended)}")
        # A checkpoint that was not written leaves the one before it, and a line.
        spare = ("run/checkpoints/step_", "run/events.jsonl")
        found.stray += [f"{where}{name}" for name in sorted(set(now) - set(files)) if not name.startswith(spare)]
        last = f"run/checkpoints/step_{STEPS:08d}/"
        for name in sorted(files):
            if name in now and now[name] != files[name] and name not in self.lines:
                found.differing.append(f"{where}{name}")
            if name not in now and (name.startswith(last) or not (done or name.startswith(spare))):
                found.lost.append(f"{where}{name}")
        for name, right in self.lines.items():
            found.differing += [f"{where}{name}: {line}" for line in wrong_lines(self.case / name, right, done)]

    def _check_after_kill(self, job: Job, files: dict[str, str], where: str, published: int, found: Report) -> None:
        now = tree(self.case)
        if not job.trains:
            torn = [name for name, content in now.items() if name in files and content != files[name]]
            if "result.json" in torn and json.loads((self.case / "result.json").read_text())["tokens"] is None:
                torn.remove("result.json")  # it is written twice: the scores of images first
            found.torn += [f"{where}{name}" for name in torn]
            return
        root = self.case / "run/checkpoints"
        steps = [int(path.name[5:]) for path in root.glob("step_????????")]
        found.torn += [
            f"{where}step {step}: {fault}" for step in steps if (fault := fault_of(root / f"step_{step:08d}"))
        ]
        newest = max(steps, default=0)
        if newest < published:
            found.lost.append(f"{where}step {published} was visible, {newest} is left")
        metrics = self.case / "run/metrics.jsonl"
        logged = len(metrics.read_text().splitlines()) - 1 if metrics.exists() else 0
        if newest < (logged - 1) // EVERY * EVERY - EVERY:
            found.lost.append(f"{where}killed at step {logged} with a checkpoint of step {newest} alone")

    def _newest(self) -> int:
        """The step of the newest visible checkpoint, 0 without one."""
        return max((int(path.name[5:]) for path in self.case.glob("run/checkpoints/step_????????")), default=0)

    def _check_end(
        self, job: Job, ended: Ended, files: dict[str, str], where: str, found: Report, kept: tuple[str, ...] = ()
    ) -> None:
        now = tree(self.case)
        complete = _refuses_what_is_there(job, ended) and now == files
        if ended.hung or (any(ended.codes) and not complete) or "Traceback" in ended.text or "damaged" in ended.text:
            found.failed.append(f"{where}the same command: {ended.codes}{' hung' * ended.hung}: {_last_lines(ended)}")
        found.stray += [f"{where}{name}" for name in sorted(set(now) - set(files)) if not name.startswith(kept)]
        found.lost += [f"{where}{name}" for name in sorted(set(files) - set(now))]
        found.differing += [f"{where}{name}" for name in sorted(set(files) & set(now)) if files[name] != now[name]]


def _refuses_what_is_there(job: Job, ended: Ended) -> bool:
    """A kill after the last file leaves a whole conversion, which the same command does not write again."""
    return job.launcher == "convert.py" and ended.codes == [2] and "exists" in ended.text


def _import_everything() -> None:
    import torch
    import torch._dynamo
    import torch.distributed.fsdp
    import torch.utils.serialization.config  # noqa: F401
    from PIL import Image

    from rear_scale import optim, parallel

    for room in (optim, parallel):
        for module in pkgutil.iter_modules(room.__path__, f"{room.__name__}."):
            if "deepspeed" not in module.name:
                importlib.import_module(module.name)
    Image.init()
    torch.set_num_threads(1)
    for launcher in sorted({job.launcher for job in JOBS.values()}):
        runpy.run_path(str(HERE.parent / "launchers" / launcher), run_name="imported")
    from test_evaluate import _Small

    from rear_scale.evaluate import job
    from rear_scale.evaluate.networks import row

    # In place of a network of 95 MB that takes seconds for an image.
    row.check_weight_file = lambda *arguments: None
    job.open_networks = lambda cfg, world: [] if cfg.evaluate.inception_weights is None else [_Small()]
    _remember()


def _remember() -> None:
    """Caches the config and the git commit, which take a quarter of a start's time and write no files."""
    from rear_scale import cli
    from rear_scale.run import versions

    load, commit = functools.cache(lambda *arguments: cli_load(arguments[0], list(arguments[1:]))), versions.commit()
    cli_load = cli.load_config
    cli.load_config = lambda name, overrides: copy.deepcopy(load(name, *overrides))
    for name, module in list(sys.modules.items()):
        if name.startswith("rear_scale.") and hasattr(module, "commit"):
            module.commit = lambda: commit


def _made(ended: Ended, interruption: Interruption) -> list[str]:
    """The calls of rank 0 that did not fail, and one more at their end."""
    first, stays = interruption.number if interruption.rank == 0 else sys.maxsize, interruption.stays
    return [line for n, line in enumerate(ended.calls[0], 1) if n < first or (n > first and not stays)] + ["end"]


def spread(items: Sequence[Any], most: int | None) -> list[Any]:
    """All items, or `most` of them, evenly spread, with the first and the last."""
    if most is None or len(items) <= most:
        return list(items)
    return [items[round(number * (len(items) - 1) / max(1, most - 1))] for number in range(most)]


def _last_lines(ended: Ended) -> str:
    return " | ".join(" / ".join(text.strip().splitlines()[-4:]) for text in ended.said)


def compile_shim(folder: Path) -> Path:
    """tests/file_calls.c as a library. Raises OSError without a compiler."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise OSError("there is no C compiler")
    library = folder / "file_calls.so"
    source = str(HERE / "file_calls.c")
    subprocess.run([compiler, "-O2", "-fPIC", "-shared", "-o", str(library), source, "-ldl"], check=True)
    return library


class Server:
    """A harness in a process of its own, for tests."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError where there is no C compiler."""
        self.folder = tempfile.TemporaryDirectory(dir=_in_memory())
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", self.folder.name],
            env=_environment(compile_shim(folder)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, job: str, calls: int | None = None, errors: Sequence[str] = ()) -> Report:
        """A campaign of kills, or of errors. Raises EOFError when the harness itself fails; its stderr says why."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"job": job, "calls": calls, "errors": list(errors)}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise EOFError(f"the harness ended with code {self.process.wait()}")
        return Report(**json.loads(answer))

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.folder.cleanup()


def _campaign(
    harness: Harness,
    job: str,
    calls: int | None,
    errors: Sequence[str],
    say: Callable[[str], object],
    part: tuple[int, int] = (0, 1),
) -> Report:
    if errors:
        return harness.errors(JOBS[job], [getattr(errno, name) for name in errors], calls, say)
    return harness.kills(JOBS[job], calls, say, part)


def _serve(folder: Path) -> None:
    """Answers each line of stdin with one line on stdout; all other output goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    harness = Harness(folder)
    for line in sys.stdin:
        found = _campaign(harness, **json.loads(line), say=lambda text: print(text, file=sys.stderr, flush=True))
        answers.write(json.dumps(vars(found)) + "\n")
        answers.flush()


def _in_memory() -> str | None:
    """A folder in memory, where files need no disk access."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _environment(shim: Path) -> dict[str, str]:
    # One thread, also of compilers: a process with threads cannot be forked.
    threads = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    # A process that has used a GPU cannot be forked either.
    return {**os.environ, **threads, "LD_PRELOAD": str(shim), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", nargs="+", choices=[*JOBS, "all"], default=["all"], help="default: all")
    parser.add_argument("--calls", type=int, metavar="N", help="this many of them, evenly spread; default: all")
    parser.add_argument("--errors", nargs="+", default=[], metavar="ERRNO", help="in place of kills: ENOSPC EIO EDQUOT")
    parser.add_argument("--part", metavar="I/N", default="0/1", help="of the kills, for several processes")
    parser.add_argument("--serve", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        _serve(args.serve / "work")
        return
    with tempfile.TemporaryDirectory(dir=_in_memory()) as folder:
        if "file_calls" not in os.environ.get("LD_PRELOAD", ""):
            shim = compile_shim(Path(folder))
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=_environment(shim)).returncode)
        harness = Harness(Path(folder) / "work")
        for name in JOBS if "all" in args.job else args.job:
            index, parts = map(int, args.part.split("/"))
            found = _campaign(
                harness, name, args.calls, args.errors, lambda text: print(text, flush=True), (index, parts)
            )
            print(json.dumps(vars(found), indent=1), flush=True)


if __name__ == "__main__":
    main()
