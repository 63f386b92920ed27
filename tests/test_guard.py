"""Faults planted in real runs of two processes: all ranks do the same about them, within their time."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from helpers import (
    ROOT,
    command_line,
    environment,
    launch,
    metrics,
    run_alone,
    start,
    tiny_config,
    tiny_config_file,
    write_checkpoint,
)

from rear_scale import config
from rear_scale.run.folder import RunFolder
from rear_scale.shards.record import TarShard
from rear_scale.train import guard, setup
from rear_scale.train.guard import (
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    LossSpikeDetector,
    StopSignal,
    Watchdog,
    shard_positions,
)
from rear_scale.train.loop import Hooks, train
from rear_scale.world import World, discover, free_port, node_name

PLANTED = str(ROOT / "tests/planted.py")
TWO = ["torchrun", "--nproc-per-node", "2"]


def status(folder: Path) -> dict:
    return json.loads((folder / "run/status.json").read_text())


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run/events.jsonl").read_text().splitlines()]


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(tmp_path: Path, tokens: Path) -> None:
    strategy = "zero3"
    config_file = tiny_config_file(tmp_path, tokens)
    result = launch(*TWO, PLANTED, "--config", config_file, f"strategy={strategy}", PLANT="nan:1:6")
    assert result.returncode != 0
    assert "step 6: the loss is not finite on rank 1. The update was not applied" in result.stderr
    assert f"rank 1 trained on {tokens}/shard-000000.tar: " in result.stderr
    assert (status(tmp_path)["state"], status(tmp_path)["step"]) == ("failed", 4)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]
    (event,) = events(tmp_path)
    assert (event["event"], event["step"], set(event["positions"])) == ("nonfinite", 6, {"1"})
    # Both ranks have the error; one prints it, with its traceback. A late one may be ended before it has recorded its own.
    assert result.stderr.count("\nFloatingPointError: ") == result.stderr.count("error on rank") == 1
    recorded = [path.read_text() for path in (tmp_path / "run/tracebacks").iterdir()]
    assert recorded
    for text in recorded:
        assert "\nTraceback (most recent call last):\n" in text
        assert "FloatingPointError: step 6: the loss is not finite on rank 1" in text


def test_updates_are_left_out_up_to_a_bound(tmp_path: Path, tokens: Path) -> None:
    skip = ["guard.on_nonfinite=skip", "guard.max_skips=1", "strategy=zero2"]
    config_file = tiny_config_file(tmp_path, tokens)
    result = launch(*TWO, PLANTED, "--config", config_file, *skip, PLANT="nan:0:6")
    assert result.returncode == 0, result.stderr
    assert "Its update is skipped (1 of at most 1)" in result.stderr
    lines = metrics(tmp_path / "run")
    assert [line["skipped_updates"] for line in lines] == [0] * 5 + [1] * 7
    assert lines[5]["loss"] is None
    assert all(line["loss"] is not None for line in lines[6:])
    meta = json.loads((tmp_path / "run/checkpoints/step_00000012/meta.json").read_text())
    assert (meta["optimizer_step"], meta["skipped_updates"]) == (11, 1)
    # The bound counts the run, not the start: the next one is too many.
    (tmp_path / "run/checkpoints/step_00000012/meta.json").unlink()
    alone = [*skip[:2], "strategy=single"]
    result = launch("python", PLANTED, "--config", config_file, *alone, PLANT="nan:0:10")
    assert "guard.max_skips=1 updates were skipped already" in result.stderr
    assert status(tmp_path)["state"] == "failed"


def test_a_rank_that_hangs_brings_all_down_with_their_stacks(tmp_path: Path, tokens: Path) -> None:
    config_file = tiny_config_file(tmp_path, tokens)
    result = launch(*TWO, PLANTED, "--config", config_file, "strategy=ddp", "guard.hang_timeout_s=8", PLANT="hang:1:12")
    assert result.returncode != 0
    # Since step 11: imports may take any time on a busy machine.
    took_s = (tmp_path / "run/status.json").stat().st_mtime - (tmp_path / "run/metrics.jsonl").stat().st_mtime
    assert took_s < 60
    assert "made no progress for 8 s (step 12, " in result.stderr
    state = status(tmp_path)
    # The checkpoint of step 8 may still have been on its way.
    assert (state["state"], state["step"] in (4, 8)) == ("failed", True)
    stacks = {path.name: path.read_text() for path in (tmp_path / "run/stacks").iterdir()}
    assert "rank_00000.txt" in stacks or "rank_00001.txt" in stacks
    if "rank_00001.txt" in stacks:
        assert "step 12, forward and backward" in stacks["rank_00001.txt"]
        assert "planted.py" in stacks["rank_00001.txt"]
    recorded = [pickle.loads(path.read_bytes()) for path in (tmp_path / "run/collectives").iterdir()]
    assert recorded
    assert all(rank["entries"][-1]["process_group"][1] for rank in recorded)


def test_a_recorder_that_hangs_does_not_keep_the_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = threading.Event()
    monkeypatch.setattr(guard, "_DUMP_S", 0.1)
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace", held.wait, raising=False)
    guard.dump_collectives(tmp_path / "collectives/rank_0")
    assert not list((tmp_path / "collectives").iterdir())
    # With NCCL in torch, its recorder is the one.
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace", lambda: b"nccl", raising=False)
    guard.dump_collectives(tmp_path / "collectives/rank_0")
    assert (tmp_path / "collectives/rank_0").read_bytes() == b"nccl"


def wait_for_checkpoint(folder: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not (folder / "run/checkpoints/latest").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)


@pytest.mark.long
def test_a_signal_to_the_deepspeed_launcher_saves_and_wants_to_go_on(tmp_path: Path, tokens: Path) -> None:
    """As a scheduler sends it: to the whole group, with the launcher itself told to ignore it."""
    config_file = tiny_config_file(tmp_path, tokens)
    command = command_line(
        "deepspeed", "--num_gpus", "2", "launchers/train.py", "--config", config_file, "train.total_steps=100000",
        "checkpoint.every_steps=10",
    )  # fmt: skip
    process = subprocess.Popen(
        ["bash", "-c", "trap '' USR1; exec \"$@\"", "bash", *command],
        env=environment(),
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_checkpoint(tmp_path, process)
    started = time.monotonic()
    os.killpg(process.pid, signal.SIGUSR1)
    _, stderr = process.communicate(timeout=300)
    assert time.monotonic() - started < 60
    state = status(tmp_path)
    assert state["state"] == "preempted", stderr
    assert "was asked to stop" in state["reason"]
    # Saved at the step where it stopped, not at the last multiple of ten.
    assert (tmp_path / f"run/checkpoints/step_{state['step']:08d}/meta.json").exists()
    assert metrics(tmp_path / "run")[-1]["step"] == state["step"]
    more = state["step"] + 3
    result = launch("python", "launchers/train.py", "--config", config_file, "train.total_steps=100000",
                    f"train.stop_at_step={more}", "strategy=single")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, more + 1))


def test_training_saves_and_ends_when_the_deepspeed_command_is_killed(tmp_path: Path, tokens: Path) -> None:
    """The command alone, which starts the launcher that starts the ranks."""
    process = start(
        "deepspeed", "--num_gpus", "1", "launchers/train.py", "--config", tiny_config_file(tmp_path, tokens),
        "strategy=single", "train.total_steps=100000", "checkpoint.every_steps=10",
        fresh=True,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    wait_for_checkpoint(tmp_path, process)
    ranks = [
        child for child in psutil.Process(process.pid).children(recursive=True) if "--local_rank=0" in child.cmdline()
    ]
    process.kill()
    process.communicate(timeout=60)
    assert ranks
    assert not psutil.wait_procs(ranks, timeout=60)[1]
    state = status(tmp_path)
    assert state["state"] == "preempted"
    assert (tmp_path / f"run/checkpoints/step_{state['step']:08d}/meta.json").exists()


def srun(config_file: Path, *overrides: str) -> list[subprocess.Popen]:
    """Two tasks as srun starts them: nobody else watches over them."""
    port = free_port()
    return [
        start(
            "python", "launchers/train.py", "--config", config_file, "train.total_steps=100000", *overrides,
            env=environment(
                SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="2",
                SLURM_STEP_TASKS_PER_NODE="2", SLURM_STEP_NODELIST="127.0.0.1", MASTER_PORT=str(port),
            ),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip


def test_a_signal_to_one_task_of_srun_ends_all_with_75(tmp_path: Path, tokens: Path) -> None:
    tasks = srun(tiny_config_file(tmp_path, tokens), "strategy=fsdp2")
    wait_for_checkpoint(tmp_path, tasks[0])
    tasks[1].send_signal(signal.SIGTERM)
    assert [task.wait(240) for task in tasks] == [EXIT_PREEMPTED] * 2
    assert status(tmp_path)["state"] == "preempted"
    assert "rank 1 was asked to stop" in status(tmp_path)["reason"]


def test_a_task_of_srun_that_dies_brings_the_other_down(tmp_path: Path, tokens: Path) -> None:
    tasks = srun(tiny_config_file(tmp_path, tokens), "strategy=ddp", "guard.hang_timeout_s=20")
    wait_for_checkpoint(tmp_path, tasks[0])
    tasks[1].kill()
    assert tasks[0].wait(240) == 1
    assert status(tmp_path)["state"] == "failed"
    # One line, in place of the tracebacks and the words of gloo.
    assert status(tmp_path)["reason"].startswith(
        f"rank 1 on {node_name()} ended without giving a reason (no heartbeat)"
    )
    said = tasks[0].stderr.read()
    assert said.splitlines()[-1] == f"error: {status(tmp_path)['reason']}"
    assert "Traceback" not in said
    assert "Exception raised from" not in said
    assert status(tmp_path)["step"] == max(
        int(path.name[5:]) for path in (tmp_path / "run/checkpoints").glob("step_????????")
    )


def test_a_spike_is_logged_and_rewound_past_its_data(tmp_path: Path, tokens: Path) -> None:
    config_file = tiny_config_file(tmp_path, tokens)
    spiky = ["train.total_steps=40", "strategy=single", "guard.on_spike=rewind", "guard.spike_sigma=20"]
    result = launch("python", PLANTED, "--config", config_file, *spiky, PLANT="spike:0:30")
    # The fault belongs to the step here, so it comes back until no rewinds are left.
    assert result.returncode == 0, result.stderr
    assert [event["event"] for event in events(tmp_path)] == ["loss_spike"] * 4
    assert [event["rewind"] for event in events(tmp_path)] == [True] * 3 + [False]
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 41))
    meta = json.loads((tmp_path / "run/checkpoints/step_00000040/meta.json").read_text())
    # From step 28 each time, past the data of two steps.
    assert (meta["rewinds"], meta["data_offset"]) == (3, 6)


def test_the_slow_rank_is_named(tmp_path: Path, tokens: Path) -> None:
    config_file = tiny_config_file(tmp_path, tokens)
    result = launch(*TWO, PLANTED, "--config", config_file, "strategy=ddp", "train.total_steps=2", PLANT="slow:1:0")
    assert result.returncode == 0, result.stderr
    lines = metrics(tmp_path / "run")
    assert [line["slowest_rank"] for line in lines] == [1, 1]
    assert [line["own_time_min_s"] for line in lines] == [0, 0]
    assert [line["own_time_max_s"] for line in lines] == pytest.approx([0.05, 0.05])


def test_spikes_are_judged_by_the_losses_before_them() -> None:
    cfg = config.load("demo.yaml", ["guard.spike_sigma=6", "guard.spike_window=30"])
    spikes = LossSpikeDetector(cfg)
    losses = [5.0 - 0.01 * step + 0.02 * (-1) ** step for step in range(60)]
    assert not any(spikes(loss) for loss in losses[:10])
    assert not spikes(100.0)  # too few before it to tell
    spikes = LossSpikeDetector(cfg)
    assert not any(spikes(loss) for loss in losses)
    assert not spikes(float("nan"))
    assert spikes(6.0)
    assert not spikes(losses[-1])


def test_positions_name_the_tar_shard_and_the_sample_in_it() -> None:
    shards = [TarShard(f"shard-{number:06d}.tar", 10, 0, "") for number in range(3)]
    assert shard_positions([25, 3, 9, 20], shards, "data/x") == (
        "data/x/shard-000000.tar: 3, 9; data/x/shard-000002.tar: 0, 5"
    )


def forked(job: Callable[[], None]) -> int:
    """The process of a job that ends with exit code 0 unless something else ends it."""
    child = os.fork()
    if child:
        return child
    try:
        job()
    finally:
        os._exit(0)


def ended(child: int) -> int:
    """Its exit code, or the negative number of the signal that has ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_suspended_job_goes_on_and_a_hanging_one_does_not(tmp_path: Path) -> None:
    world = World(discover({}), torch.device("cpu"))

    def step(until_it_goes_on: Callable[[], None]) -> None:
        with Watchdog(2, RunFolder(tmp_path), world) as watchdog:
            watchdog.beat("forward", 0)
            until_it_goes_on()
            # As much of the step as a suspended process still has to do.
            deadline = time.process_time() + 0.05
            while time.process_time() < deadline:
                pass

    suspended = forked(lambda: step(lambda: os.kill(os.getpid(), signal.SIGSTOP)))
    assert os.WIFSTOPPED(os.waitpid(suspended, os.WUNTRACED)[1])
    assert ended(forked(lambda: step(lambda: time.sleep(3600)))) == 1
    os.kill(suspended, signal.SIGCONT)
    assert ended(suspended) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_a_signal_is_noted_and_a_second_ctrl_c_ends(tmp_path: Path, number: int) -> None:
    world, folder = World(discover({}), torch.device("cpu")), RunFolder(tmp_path)
    write_checkpoint(folder.path, 4)
    ours = signal.getsignal(number)
    before = signal.SIG_DFL if ours == signal.SIG_IGN else ours  # under nohup, the tests themselves ignore one of them
    signal.signal(number, before)
    with StopSignal(folder, world) as stop:
        os.kill(os.getpid(), number)
        while stop.received is None:  # another thread may be the one that is interrupted
            time.sleep(0.01)
        assert stop.received == signal.Signals(number).name
    assert signal.getsignal(number) == before

    def twice() -> None:
        with StopSignal(folder, world):
            for _ in range(2):
                os.kill(os.getpid(), number)
                time.sleep(0.2)

    assert ended(forked(twice)) == (EXIT_INTERRUPTED if number == signal.SIGINT else 0)
    signal.signal(number, ours)
    if number == signal.SIGINT:
        assert json.loads((tmp_path / "status.json").read_text()) == {
            "state": "failed", "step": 4, "reason": "ended by Ctrl-C; the same command continues from step 4",
        }  # fmt: skip


def test_what_nohup_ignores_stays_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal(RunFolder(tmp_path), World(discover({}), torch.device("cpu"))) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def _rewound_run(folder: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int | None) -> dict:
    """meta.json of step 12 of a run that has a spike at step 6, and is killed at a step after its return to step 4."""
    folder.mkdir()
    cfg = tiny_config(folder, tokens, "strategy=single", "guard.on_spike=rewind")
    losses = iter(range(1, 100))
    monkeypatch.setattr(LossSpikeDetector, "__call__", lambda self, loss: next(losses) == 6)
    returned = []

    def kill(step: int, model: object) -> None:
        returned.append(step)
        if kill_at is not None and step == kill_at and returned.count(kill_at) == 2:
            raise RuntimeError("killed")

    def run(world: World) -> None:
        data = setup.check_data(cfg, world.ranks)
        train(cfg, data.plan, world, *data.open(world), Hooks([kill]))

    if kill_at is not None:
        with pytest.raises(RuntimeError, match="killed"):
            run_alone(run)
    run_alone(run)
    return json.loads((folder / "run/checkpoints/step_00000012/meta.json").read_text())


def test_a_rewind_outlives_a_kill(tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unbroken = _rewound_run(tmp_path / "unbroken", tokens, monkeypatch, None)
    assert (unbroken["rewinds"], unbroken["data_offset"]) == (1, 2)
    killed = _rewound_run(tmp_path / "killed", tokens, monkeypatch, 5)
    assert (killed["rewinds"], killed["data_offset"]) == (1, 2)
    assert [file["sha256"] for file in killed["files"]] == [file["sha256"] for file in unbroken["files"]]


@pytest.mark.parametrize("left", ["", "null", "[]", '{"step": 4}', '{"step": 4, "data_offset": 2, "rewinds": null}'])
def test_a_note_of_a_rewind_counts_for_its_checkpoint_alone(tmp_path: Path, left: str) -> None:
    folder = RunFolder(tmp_path)
    folder.note_rewind(4, data_offset=2, rewinds=1)
    assert folder.rewind_to(4, rewinds=0) == {"data_offset": 2, "rewinds": 1}
    assert folder.rewind_to(4, rewinds=1) == folder.rewind_to(8, rewinds=0) == {}
    (tmp_path / "rewind.json").write_text(left)
    assert folder.rewind_to(4, rewinds=0) == {}
