"""The project's batch scripts on a real SLURM of two nodes."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import slurm_cluster
from helpers import CODEBOOK_DIM, CODEBOOK_SIZE, NUM_CLASSES, NUM_TOKENS, ROOT, TIMES, launch, metrics
from PIL import Image
from slurm_cluster import NODES, Cluster
from test_pretokenize import NUM_IMAGES, settings, tiny_overrides

from rear_scale.sample.npz_writer import write_samples
from rear_scale.shards.images import write_images
from rear_scale.shards.record import read_manifest

TRAIN = "launchers/slurm/train.sbatch"
TWO_NODES = ["--nodes=2"]
STEPS = 16
NODE_LOGS = [f"node{index}-{socket.gethostname().split('.')[0]}.log" for index in range(2)]

pytestmark = pytest.mark.skipif(slurm_cluster.missing() is not None, reason=str(slurm_cluster.missing()))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    yield from slurm_cluster.running_cluster()


@pytest.fixture(scope="module")
def trained(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Path:
    """A folder with the run of two tasks of srun, on two nodes, with nothing in their way."""
    folder = tmp_path_factory.mktemp("unbroken")
    job = cluster.submit(
        TRAIN, *tiny_xl(folder, tokens), options=TWO_NODES, logs=folder / "logs", REAR_TASKS_PER_NODE="1"
    )
    assert cluster.wait(job)["JobState"] == "COMPLETED", said(folder)
    start = json.loads((folder / "run/starts.jsonl").read_text())
    assert (start["launcher"], start["world_size"]) == ("slurm", 2)
    # A log for each node.
    assert sorted(path.name for path in (folder / "logs").iterdir()) == ["job.out", *NODE_LOGS]
    return folder


@pytest.fixture(scope="module")
def unbroken(trained: Path) -> list[dict]:
    """What that run has logged."""
    return curve(trained)


def tiny_xl(folder: Path, tokens: Path, *more: str) -> list[str]:
    """rear_xl.yaml on the tiny set."""
    return [
        "--config", "rear_xl.yaml", f"run.dir={folder}/run", f"data.train={tokens}", f"data.cache_dir={tokens}-cache",
        "model.depth=2", "model.width=32", "model.num_heads=2", f"model.num_classes={NUM_CLASSES}",
        "objective.heads.hidden=32", "tokenizer.name=compact", "tokenizer.image_size=16",
        f"tokenizer.num_tokens={NUM_TOKENS}", f"tokenizer.codebook_size={CODEBOOK_SIZE}",
        f"tokenizer.codebook_dim={CODEBOOK_DIM}", "train.precision=fp32", "train.global_batch_size=12",
        "train.micro_batch_size=6", f"train.total_steps={STEPS}", "train.log_every=1", "optim.lr=5e-3",
        "optim.warmup_steps=2", "checkpoint.every_steps=4", "data.val=null", *more,
    ]  # fmt: skip


def curve(folder: Path) -> list[dict]:
    """metrics.jsonl without the times."""
    return [{name: value for name, value in line.items() if name not in TIMES} for line in metrics(folder / "run")]


def status(folder: Path) -> dict:
    return json.loads((folder / "run/status.json").read_text())


def said(folder: Path) -> str:
    return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in (folder / "logs").glob("*"))


def held(folder: Path, steps: str) -> dict[str, str]:
    """Variables with which training pauses at steps until it is asked to stop, or open/STEP is there."""
    (folder / "open").mkdir()
    paths = [str(ROOT / "tests/held"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "HELD": steps, "HELD_OPEN": str(folder / "open")}


def until(condition: Callable[[], bool], folder: Path, timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, said(folder)
        time.sleep(0.1)


def logged(folder: Path) -> int:
    path = folder / "run/metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_run_that_is_preempted_twice_ends_as_an_unbroken_one(
    cluster: Cluster, unbroken: list[dict], tmp_path: Path, tokens: Path
) -> None:
    job = cluster.submit(
        TRAIN, *tiny_xl(tmp_path, tokens, "wandb.mode=offline"), options=[*TWO_NODES, "--time=60", "--signal=B:USR1@30"],
        logs=tmp_path / "logs", **held(tmp_path, "6,11"), REAR_TASKS_PER_NODE="1",
    )  # fmt: skip
    # wandb's own process dies of the same signal, which must not change how the run ends.
    # As an administrator or a job of higher priority does it: SIGTERM, and SLURM requeues.
    until(lambda: logged(tmp_path) == 5, tmp_path)
    cluster.run("scontrol", "requeue", str(job))
    until(lambda: status(tmp_path)["state"] == "preempted", tmp_path)
    assert status(tmp_path)["step"] == 6
    # The second start meets its time limit: SIGUSR1 to the batch script, which requeues.
    until(lambda: logged(tmp_path) == 10, tmp_path)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    until(lambda: status(tmp_path)["step"] == 11, tmp_path)
    cluster.wait(job, "PENDING")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    found = cluster.wait(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "2"), said(tmp_path)
    assert status(tmp_path)["state"] == "done"
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert curve(tmp_path) == unbroken
    assert "SIGUSR1" not in said(tmp_path) or "User defined signal" not in said(tmp_path)


def test_deepspeed_inside_a_batch_script_ends_as_srun_does(
    cluster: Cluster, unbroken: list[dict], tmp_path: Path, tokens: Path
) -> None:
    """As somebody writes it who does not use ours, on one node."""
    script = tmp_path / "own.sbatch"
    command = "deepspeed launchers/train.py " + " ".join(tiny_xl(tmp_path, tokens))
    script.write_text(f"#!/bin/bash\n#SBATCH --nodes=1 --exclusive\ncd {ROOT}\n{command}\n")
    # Without GPUs deepspeed asks this variable how many ranks a node has.
    job = cluster.submit(script, options=[], logs=tmp_path / "logs", LOCAL_SIZE="2")
    assert cluster.wait(job)["JobState"] == "COMPLETED", said(tmp_path)
    start = json.loads((tmp_path / "run/starts.jsonl").read_text())
    assert (start["launcher"], start["world_size"]) == ("environment", 2)
    assert curve(tmp_path) == unbroken


def test_deepspeed_starts_the_ranks_through_slurm(
    cluster: Cluster, unbroken: list[dict], tmp_path: Path, tokens: Path
) -> None:
    tmp_path = tmp_path / "two words"  # which pass through two programs that split at spaces
    tmp_path.mkdir()
    job = cluster.submit(
        TRAIN, *tiny_xl(tmp_path, tokens), options=TWO_NODES, logs=tmp_path / "logs",
        REAR_TASKS_PER_NODE="1", REAR_LAUNCHER="deepspeed",
    )  # fmt: skip
    assert cluster.wait(job)["JobState"] == "COMPLETED", said(tmp_path)
    start = json.loads((tmp_path / "run/starts.jsonl").read_text())
    assert (start["launcher"], start["world_size"]) == ("slurm", 2)
    assert curve(tmp_path) == unbroken


@pytest.mark.long
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("way", ["time limit", "preemption"])
def test_the_deepspeed_launcher_is_preempted_as_srun_is(
    cluster: Cluster, unbroken: list[dict], tmp_path: Path, tokens: Path, nodes: int, way: str
) -> None:
    job = cluster.submit(
        TRAIN, *tiny_xl(tmp_path, tokens), options=[f"--nodes={nodes}"], logs=tmp_path / "logs",
        **held(tmp_path, "6"), REAR_TASKS_PER_NODE=str(2 // nodes), REAR_LAUNCHER="deepspeed",
    )  # fmt: skip
    until(lambda: logged(tmp_path) == 5, tmp_path)
    if way == "time limit":
        cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    else:
        cluster.run("scontrol", "requeue", str(job))
    until(lambda: status(tmp_path)["state"] == "preempted", tmp_path)
    (tmp_path / "open/6").touch()
    found = cluster.wait(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), said(tmp_path)
    assert curve(tmp_path) == unbroken


def test_a_node_that_dies_leaves_a_clear_state_and_the_run_goes_on(
    cluster: Cluster, unbroken: list[dict], tmp_path: Path, tokens: Path
) -> None:
    job = cluster.submit(
        TRAIN, *tiny_xl(tmp_path, tokens), options=TWO_NODES, logs=tmp_path / "logs",
        **held(tmp_path, "7:1"), REAR_TASKS_PER_NODE="1",
    )  # fmt: skip
    until(lambda: logged(tmp_path) == 6 and status(tmp_path)["step"] == 4, tmp_path)
    cluster.kill_node(NODES[1])
    until(lambda: status(tmp_path)["state"] == "failed", tmp_path)
    assert status(tmp_path)["step"] == 4
    # SLURM finds out by itself, and keeps the job until there are two nodes again.
    cluster.wait(job, "PENDING")
    (tmp_path / "open/7").touch()
    cluster.start_node(NODES[1])
    assert cluster.wait(job)["JobState"] == "COMPLETED", said(tmp_path)
    assert status(tmp_path)["state"] == "done"
    assert curve(tmp_path) == unbroken


def test_the_check_finds_good_nodes_and_names_a_bad_one(cluster: Cluster, tmp_path: Path, tokens: Path) -> None:
    arguments = ["--check", *tiny_xl(tmp_path, tokens, "train.micro_batch_size=3")]
    job = cluster.submit(TRAIN, *arguments, options=TWO_NODES, logs=tmp_path / "logs")
    assert cluster.wait(job)["JobState"] == "COMPLETED", said(tmp_path)
    out = (tmp_path / "logs/job.out").read_text()
    for node in NODES:
        assert f"fit: {node}: 2 ranks; no GPU, so no GPU was checked; all-reduce in the node " in out
    assert "All 2 nodes see the same shards" in out
    assert not (tmp_path / "run").exists()
    # A node where the shards are not mounted.
    script = tmp_path / "python"
    script.write_text(
        f'#!/bin/bash\n[[ $SLURMD_NODENAME == {NODES[1]} ]] && set -- "${{@/data.train=*/data.train=/nowhere}}"\n'
        f'exec {sys.executable} "$@"\n'
    )
    script.chmod(0o755)
    job = cluster.submit(TRAIN, *arguments, options=TWO_NODES, logs=tmp_path / "bad", REAR_PYTHON=str(script))
    assert cluster.wait(job)["JobState"] == "FAILED"
    out = (tmp_path / "bad/job.out").read_text()
    assert f"unfit: {NODES[1]}" in out
    assert "not found: /nowhere/index.json" in out
    assert f"sbatch --exclude={NODES[1]} ..." in out


def test_pretokenizing_goes_on_after_its_time_is_up(cluster: Cluster, tmp_path: Path) -> None:
    """SIGUSR1 to the batch script, as --signal sends it, at whatever moment."""
    settings(tmp_path, "tokens")
    job = cluster.submit(
        "launchers/slurm/pretokenize.sbatch", "--config", "demo.yaml", *tiny_overrides(tmp_path, "tokens"),
        options=TWO_NODES, logs=tmp_path / "logs", REAR_TASKS_PER_NODE="1",
    )  # fmt: skip
    cluster.wait(job, "RUNNING")
    until(lambda: (tmp_path / "logs" / NODE_LOGS[1]).exists(), tmp_path)
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    cluster.wait(job, "PENDING")
    found = cluster.wait(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), said(tmp_path)
    assert read_manifest(tmp_path / "tokens").num_samples == NUM_IMAGES


def test_the_other_scripts_start_their_launchers(cluster: Cluster, trained: Path, tmp_path: Path) -> None:
    logs = {name: tmp_path / name for name in ("sample", "evaluate")}
    jobs = [
        cluster.submit(
            f"launchers/slurm/{name}.sbatch", "--checkpoint", trained / "run", "--dry-run", "--full", "sample.seed=7",
            options=["--nodes=1"], logs=folder, REAR_TASKS_PER_NODE="1",
        )
        for name, folder in logs.items()
    ]  # fmt: skip
    for job, folder in zip(jobs, logs.values(), strict=True):
        assert cluster.wait(job)["JobState"] == "COMPLETED", (folder / "job.out").read_text()
        assert "seed: 7" in (folder / NODE_LOGS[0]).read_text()


@pytest.mark.long
def test_an_array_of_jobs_splits_an_evaluation(cluster: Cluster, tmp_path: Path) -> None:
    """1,100 images are three blocks of features: a share for each job, and the last one scores."""
    images = np.random.default_rng(0).integers(0, 90, (1100, 12, 12, 3), dtype=np.uint8)
    labels = np.arange(1100) % 3
    for label in range(3):
        images[label::3, :, 4 * label : 4 * label + 4] += 150
    shown = ((Image.fromarray(image), int(label)) for image, label in zip(images[:90], labels, strict=False))
    write_images(tmp_path / "real", shown, 12, ["a", "b", "c"])
    arguments = [
        f"evaluate.reference={{real: {tmp_path / 'real'}}}",
        f"evaluate.classifier={{weights: {tmp_path / 'classifier'}, images: {tmp_path / 'real'}, steps: 60}}",
    ]  # fmt: skip
    for name in ("alone", "array"):
        (tmp_path / name).mkdir()
        write_samples(tmp_path / name / "samples.npz", iter([images]), 1100, 12, labels)
    alone = launch(
        "python", "launchers/evaluate.py", "--samples", str(tmp_path / "alone/samples.npz"), *arguments, timeout=300
    )
    assert alone.returncode == 0, alone.stderr
    cluster.submit(
        "launchers/slurm/evaluate.sbatch", "--samples", tmp_path / "array/samples.npz", *arguments,
        options=["--nodes=1", "--array=0-2"], logs=tmp_path / "logs", REAR_TASKS_PER_NODE="1",
    )  # fmt: skip
    results = [tmp_path / name / "samples.result.json" for name in ("alone", "array")]
    until(results[1].exists, tmp_path, timeout_s=240)
    found = [json.loads(path.read_text())["images"] for path in results]
    assert found[0]["samples"] == found[1]["samples"]
    assert found[0]["samples"]["count"] == 1100
