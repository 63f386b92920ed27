"""Stages: run in order, not twice, again when what they were made from changes, and continued after a failure or a kill."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from rear_scale.config import InputError
from rear_scale.run.stages import Stage, StageFolder

NAMES = ("one", "two", "three")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def a_stage(name: str, script: str = "", **inputs: str) -> Stage:
    """Writes its name to the file `ran`, does what the script says, and makes its product."""
    command = ["sh", "-c", f"echo {name} >> ran; {script or 'true'} && echo made > {name}"]
    return Stage(name, f"make {name}", command, (Path(name),), inputs)


def chain(first: Stage | None = None, second: Stage | None = None) -> list[Stage]:
    """Three stages, of which each depends on the one before."""
    one = first or a_stage("one", data="a")
    two = second or a_stage("two")
    two = replace(two, inputs={"one": one.key})
    return [one, two, a_stage("three", two=two.key)]


def run_all(stages: list[Stage]) -> list[str]:
    """Names of the stages whose commands were run."""
    ran = Path("ran")
    ran.unlink(missing_ok=True)
    StageFolder("study").run_all(stages)
    return ran.read_text().split() if ran.exists() else []


def removed(path: str) -> Callable[[], list[Stage]]:
    def then() -> list[Stage]:
        Path(path).unlink()
        return chain()

    return then


def cut_short(path: str) -> Callable[[], list[Stage]]:
    def then() -> list[Stage]:
        Path(path).write_text(Path(path).read_text()[:10])
        return chain()

    return then


@pytest.mark.parametrize(
    ("then", "expected", "said"),
    [
        pytest.param(chain, [], "[2/3] make two: finished before", id="nothing"),
        pytest.param(removed("two"), ["two"], "[2/3] make two again: two does not exist", id="product"),
        pytest.param(lambda: chain(second=a_stage("two", "true")), [], "make two: finished before", id="same"),
        pytest.param(
            lambda: chain(second=a_stage("two", ":")),
            ["two", "three"],
            "[2/3] make two again: its command was sh -c",
            id="command",
        ),
        pytest.param(
            lambda: chain(first=a_stage("one", data="b")),
            list(NAMES),
            "[1/3] make one again: its inputs changed (data)",
            id="input",
        ),
        pytest.param(
            lambda: chain(first=a_stage("one")), list(NAMES), "make one again: its inputs changed (data)", id="no_input"
        ),
        pytest.param(removed("study/stages/two.json"), ["two"], "[2/3] make two\n", id="record"),
        pytest.param(cut_short("study/stages/two.json"), ["two"], "[2/3] make two\n", id="damaged_record"),
    ],
)
def test_only_what_is_not_finished_is_run(
    here: Path, capfd: pytest.CaptureFixture[str], then: Callable[[], list[Stage]], expected: list[str], said: str
) -> None:
    assert run_all(chain()) == list(NAMES)
    stages = then()
    capfd.readouterr()
    assert run_all(stages) == expected
    assert said in capfd.readouterr().err
    assert all(StageFolder("study").seconds(stage) >= 0 for stage in stages)
    assert run_all(stages) == []


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 3", "the stage 'make two' failed with exit code 3; see above and study/logs/two.log"),
        ("kill -9 $$", "the stage 'make two' was ended by SIGKILL; see above and study/logs/two.log"),
        ("exit 0", "the stage 'make two' ended without an error, but did not make two; see study/logs/two.log"),
    ],
)
def test_a_stage_that_fails_is_named_and_continued(here: Path, script: str, reason: str) -> None:
    # The first start leaves a part and fails; the next finds the part and ends well.
    stages = chain(second=a_stage("two", f"if [ ! -e part ]; then echo first; touch part; {script}; fi; echo second"))
    with pytest.raises(InputError, match=reason):
        run_all(stages)
    assert not Path("three").exists()
    assert run_all(stages) == ["two", "three"]
    assert Path("study/logs/two.log").read_text() == "first\nsecond\n"


def test_products_of_a_start_that_was_killed_are_not_those_of_the_record(here: Path) -> None:
    """Back at its former command, a stage does not take for its own what another command has half made."""
    run_all(chain())
    with pytest.raises(InputError, match="was ended by SIGKILL"):
        run_all(chain(second=a_stage("two", "echo half > two; kill -9 $$")))
    assert run_all(chain()) == ["two"]
    assert Path("two").read_text() == "made\n"


def test_ctrl_c_names_the_stage_that_is_next(here: Path) -> None:
    # The command sends it to this process, as a terminal does.
    stages = chain(second=a_stage("two", "if [ ! -e part ]; then touch part; kill -INT $PPID; sleep 5; fi"))
    with pytest.raises(KeyboardInterrupt, match="the same command continues with stage 2 of 3, make two"):
        run_all(stages)
    assert run_all(stages) == ["two", "three"]


def test_after_ctrl_c_nothing_goes_on_unseen(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal reaches this process alone, and the command of the stage ends without those that it has started."""
    monkeypatch.setattr("rear_scale.run.stages._PASSED_ON_AFTER_S", 0.1)
    script = "(sleep 300 & echo $! > first; setsid sleep 300 & echo $! > second); kill -INT $PPID"
    with pytest.raises(KeyboardInterrupt, match="stage 1 of 1, make one"):
        run_all([a_stage("one", script)])
    for name in ("first", "second"):
        with suppress(psutil.NoSuchProcess):
            assert psutil.Process(int(Path(name).read_text())).status() == psutil.STATUS_ZOMBIE


def test_a_program_that_is_not_there_is_named(here: Path) -> None:
    with pytest.raises(InputError, match="the stage 'fly' needs the program no-such-program, which was not found"):
        StageFolder("study").run(Stage("fly", "fly", ["no-such-program"], ()))


def test_commands_find_the_programs_and_files_of_the_project(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    script = "import os, sys; print(sys.executable, sys.argv[1], os.environ.get('OMP_NUM_THREADS'))"
    for processes in (1, 1000):
        command = ["python", "-c", script, "launchers/train.py"]
        StageFolder("study").run(Stage(f"by_{processes}", "look", command, (), processes=processes))
    root = Path(__file__).resolve().parents[1]
    for processes, threads in ((1, None), (1000, 1)):
        python, file, given = Path(f"study/logs/by_{processes}.log").read_text().split()
        assert Path(python).parent == Path(sys.executable).parent
        assert (file, given) == (str(root / "launchers/train.py"), str(threads))
    record = json.loads(Path("study/stages/by_1.json").read_text())
    assert record["command"].endswith("launchers/train.py")


def a_lane(name: str, script: str = "") -> list[Stage]:
    """Two stages; the script is that of the first."""
    first = a_stage(f"{name}_1", script)
    return [first, a_stage(f"{name}_2", before=first.key)]


def wait_for(path: str) -> str:
    return f"for turn in $(seq 600); do test -e {path} && break; sleep 0.1; done; test -e {path}"


def test_lanes_run_side_by_side_after_what_all_of_them_need(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each of two lanes waits for a file that the other one makes; a third takes the place of the one that ends first."""
    lanes = [
        a_lane("a", f"echo > a_is_here; {wait_for('b_is_here')}"),
        a_lane("b", f"echo > b_is_here; {wait_for('a_is_here')}"),
    ]
    StageFolder("study").run_all([a_stage("data")], [*lanes, a_lane("c")], jobs=2)
    ran = Path("ran").read_text().split()
    assert ran[0] == "data"
    assert sorted(ran) == ["a_1", "a_2", "b_1", "b_2", "c_1", "c_2", "data"]
    assert all(ran.index(f"{name}_1") < ran.index(f"{name}_2") for name in "abc")
    assert "[6/7] make c_1" in capfd.readouterr().err
    StageFolder("study").run_all([a_stage("data")], [*lanes, a_lane("c")], jobs=2)
    assert capfd.readouterr().err.count("finished before") == 7


def test_a_lane_that_fails_leaves_the_others_alone(here: Path) -> None:
    lanes = [a_lane("a", "exit 3"), a_lane("b"), a_lane("c")]
    with pytest.raises(InputError, match="the stage 'make a_1' failed with exit code 3"):
        StageFolder("study").run_all([], lanes, jobs=2)
    assert sorted(Path("ran").read_text().split()) == ["a_1", "b_1", "b_2", "c_1", "c_2"]


def test_a_process_of_lanes_that_is_killed_is_told(here: Path) -> None:
    with pytest.raises(InputError, match="a process that runs stages was ended by SIGKILL. The same command continues"):
        StageFolder("study").run_all([], [a_lane("a", "kill -9 $PPID"), a_lane("b")], jobs=2)
    assert Path("b_2").exists()


def test_ctrl_c_in_lanes_says_how_much_is_left(here: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match="2 of 4 stages are left; the same command continues"):
        StageFolder("study").run_all([], [a_lane("a", "kill -INT $PPID; sleep 0.2"), a_lane("b")], jobs=2)
