"""What several tests need: tiny shards, configs for them, processes."""

from __future__ import annotations

import atexit
import gc
import json
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fork_server
import numpy as np
import psutil
import torch
import torch.distributed as dist

from rear_scale.checkpoint.folder import Checkpoint, open_checkpoint
from rear_scale.checkpoint.meta import FORMAT
from rear_scale.checkpoint.open import newest_or_refuse
from rear_scale.config import ExperimentConfig, load
from rear_scale.config.overrides import in_quotes
from rear_scale.files import file_sha256
from rear_scale.shards import writer
from rear_scale.shards.record import Manifest, write_manifest
from rear_scale.world import Ranks, end_with_parent, free_port, joined

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
TINY = ROOT / "tests/tiny.yaml"

# What tells a process its place among the ranks.
PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# The tiny set: 16 tokens of 32 codes of width 8, 5 classes.
NUM_TOKENS, CODEBOOK_SIZE, CODEBOOK_DIM, NUM_CLASSES = 16, 32, 8, 5

# What in a line of metrics.jsonl differs from run to run.
TIMES = (
    "images_per_s",
    "images_per_s_per_gpu",
    "step_time_s",
    "data_wait_s",
    "forward_s",
    "backward_s",
    "optimizer_s",
    "checkpoint_s",
    "own_time_min_s",
    "own_time_max_s",
    "time_left_s",
    "peak_mem_gib",
    "slowest_rank",
)


def write_token_shards(folder: Path, num_samples: int, seed: int = 0) -> Path:
    """Synthetic token shards whose sequences follow their class, so that something can be learnt."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, NUM_CLASSES, num_samples)
    steps = generator.integers(0, 3, (num_samples, NUM_TOKENS)).cumsum(1)
    tokens = (labels[:, None] * 5 + steps) % CODEBOOK_SIZE
    shards = [
        writer.write_shard(folder, index, tokens[start:end], labels[start:end], source="synthetic")
        for index, start, end in writer.shard_ranges(num_samples)
    ]
    np.save(
        folder / "codebook.npy",
        np.random.default_rng(1).standard_normal((CODEBOOK_SIZE, CODEBOOK_DIM)).astype(np.float32),
    )
    write_manifest(
        folder,
        Manifest(
            tokenizer="synthetic",
            tokenizer_sha256="0" * 64,
            codebook_size=CODEBOOK_SIZE,
            codebook_dim=CODEBOOK_DIM,
            num_tokens=NUM_TOKENS,
            num_samples=num_samples,
            crops_per_image=1,
            label_counts=np.bincount(labels, minlength=NUM_CLASSES).tolist(),
            class_names=[str(label) for label in range(NUM_CLASSES)],
            codebook_sha256=file_sha256(folder / "codebook.npy"),
            shards=shards,
        ),
    )
    writer.remove_records(folder)
    return folder


def tiny_config_file(folder: Path, tokens: Path) -> Path:
    """A reAR config for the tiny set, as a user would keep one outside configs/."""
    path = folder / "tiny.yaml"
    # Renamed into place: several ranks may write it at once, and read it.
    part = path.with_suffix(f".{os.getpid()}")
    text = TINY.read_text()
    for key, value in _tiny_paths(folder, tokens).items():
        text = text.replace(key.upper(), str(value))
    part.write_text(text)
    part.replace(path)
    return path


def _tiny_paths(folder: Path, tokens: Path) -> dict[str, Path]:
    return {"run.dir": folder / "run", "data.train": tokens, "data.cache_dir": folder / "cache"}


def tiny_config(folder: Path, tokens: Path, *overrides: str) -> ExperimentConfig:
    """The config of that file, which is written too, with overrides.

    Its paths are overrides here as well: a file that is the same for all is composed once in a process, which takes longer than
    all the rest.
    """
    tiny_config_file(folder, tokens)
    paths = [f"{key}={in_quotes(str(value))}" for key, value in _tiny_paths(folder, tokens).items()]
    return load(str(TINY), [*paths, *overrides])


def write_checkpoint(folder: Path, step: int) -> Path:
    """A checkpoint that counts as one of the run in `folder`, with nothing in it."""
    path = folder / f"checkpoints/step_{step:08d}"
    path.mkdir(parents=True)
    (path / "part-00000.safetensors").write_bytes(b"1234")
    part = {"file": "part-00000.safetensors", "size": 4, "sha256": "0" * 64}
    meta = {"format": FORMAT, "step": step, "config": {}, "files": [part], "index": {}}
    (path / "meta.json").write_text(json.dumps(meta))
    return path


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, fresh: bool = False) -> list[Any]:
    """function(world, *arguments) in processes joined by gloo; its results in rank order. `function` is a module's own.

    Two ranks stay for the next call, because starting them takes longer than most tests; fresh: not these, and none that is
    forked from a process whose memory counts as its own.
    """
    keep = world_size == 2 and not fresh
    ranks = (_waiting.pop() if keep and _waiting else None) or _Ranks(world_size, fresh=fresh)
    results = ranks.run(function, arguments)
    errors = [result for result in results if isinstance(result, BaseException)]
    if keep and not errors and ranks.resident_bytes() < _MOST_RESIDENT:
        _waiting.append(ranks)
    else:
        ranks.end()
    if errors:
        raise errors[0]
    return results


class _Ranks:
    """Processes that run one function after the other in one process group."""

    def __init__(self, world_size: int, *, fresh: bool) -> None:
        start = subprocess.Popen if fresh else fork_server.Popen
        port = free_port()
        self.processes, self.ends = [], []
        for rank in range(world_size):
            end, theirs = multiprocessing.Pipe()
            code = f"import sys; sys.path[:] = {sys.path}; import helpers; helpers.be_rank(*map(int, sys.argv[1:]))"
            words = [sys.executable, "-c", code, *map(str, (rank, world_size, port, theirs.fileno()))]
            with theirs:
                self.processes.append(start(words, env=environment(), pass_fds=[theirs.fileno()]))
            self.ends.append(end)

    def run(self, function: Callable[..., Any], arguments: tuple) -> list[Any]:
        task = pickle.dumps((function, arguments, dict(os.environ), os.getcwd()))
        for end in self.ends:
            end.send_bytes(task)
        return [pickle.loads(end.recv_bytes()) for end in self.ends]

    def resident_bytes(self) -> int:
        """The most that any of them holds. What engines leave behind must not pile up."""
        return max(psutil.Process(process.pid).memory_info().rss for process in self.processes)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
        for end in self.ends:
            end.close()


_waiting: list[_Ranks] = []
_LINEAR = torch.nn.functional.linear


def _as_at_the_start() -> None:
    """What rounds otherwise once it has been changed, and is changed for as long as a process lives."""
    torch.nn.functional.linear = _LINEAR  # ZeRO-3 has one of its own
    torch.set_flush_denormal(False)  # a library built for speed turns this on when it is loaded
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")


_MOST_RESIDENT = 1_500_000_000


@atexit.register
def _end_waiting() -> None:
    for ranks in _waiting:
        ranks.end()


def be_rank(rank: int, world_size: int, port: int, end: int) -> None:
    """One of _Ranks, with a descriptor of its end of the pipe."""
    end_with_parent(signal.SIGKILL)
    tasks = multiprocessing.connection.Connection(end)
    ranks = Ranks(rank, rank, world_size, world_size, "127.0.0.1", port, "environment")
    with joined(ranks, same_for_any_world=True, timeout_s=300) as world:
        placed = {name: os.environ[name] for name in PLACE if name in os.environ}
        while True:
            function, arguments, variables, folder = pickle.loads(tasks.recv_bytes())
            os.environ.clear()
            os.environ.update(variables, **placed)
            os.chdir(folder)
            _as_at_the_start()
            ours = {module: dict(vars(module)) for name, module in sys.modules.items() if name.startswith("rear_scale")}
            try:
                result = function(world, *arguments)
            except BaseException as error:
                result = error
            for module, names in ours.items():
                vars(module).update(names)  # a constant or a function that the test has replaced
            gc.collect()
            tasks.send_bytes(pickle.dumps(result))


def run_alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(world, *arguments) in this process, a world of one."""
    _as_at_the_start()
    try:
        with joined(Ranks(0, 0, 1, 1, None, None, "single"), same_for_any_world=True) as world:
            return function(world, *arguments)
    finally:
        # A process ends after an error; a test goes on.
        if dist.is_initialized():
            dist.destroy_process_group()


def launch(
    *command: str | Path, cwd: Path = ROOT, timeout: float = 240, fresh: bool = False, **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs a launcher as a user would: `launch("torchrun", "--nproc-per-node", "2", "launchers/train.py", ...)`.

    fresh: with imports of its own, which take seconds; see tests/fork_server.py for what the other kind does not show.
    """
    with start(
        *command,
        fresh=fresh,
        cwd=cwd,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start(*command: str | Path, fresh: bool = False, **options: Any) -> subprocess.Popen:
    """As `launch`, without waiting for its end. The options are those of subprocess.Popen."""
    return (subprocess.Popen if fresh else fork_server.Popen)(
        command_line(*command), **{"env": environment(), **options}
    )


def command_line(*command: str | Path) -> list[str]:
    program, *arguments = map(str, command)
    if program == "deepspeed":
        arguments = ["--master_port", str(free_port()), *arguments]
    if program == "torchrun":
        arguments = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *arguments]
    return [
        str(BIN / program),
        *[str(ROOT / word) if word.startswith(("launchers/", "data/")) else word for word in arguments],
    ]


def environment(**extra: str) -> dict[str, str]:
    """This process's, without what a launcher or an earlier test has set, one thread per process."""
    clean = {name: value for name, value in os.environ.items() if name not in PLACE and not name.startswith("SLURM_")}
    return {**clean, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **extra}


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def find(path: Path) -> Checkpoint:
    """The checkpoint that a path stands for; its files are not looked at."""
    return open_checkpoint(newest_or_refuse(path, f"--checkpoint {path}"))
