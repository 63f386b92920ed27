"""Scaling of the training step over the ranks of one srun: weak (fixed micro-batch per rank) and strong (fixed global batch).

Every measurement runs in new processes, because engines keep state that outlives a process group: each task of srun starts
`launchers/bench.py train` as a rank of 1, 2, 4, ... ranks, and waits while it is not one of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from rear_scale.config import ExperimentConfig
from rear_scale.config.devices import devices
from rear_scale.model import meta_model
from rear_scale.progress import say
from rear_scale.scaling.cluster import cluster_of
from rear_scale.scaling.cost import step_time
from rear_scale.text_table import aligned
from rear_scale.world import Ranks

_LONGEST_WAIT = timedelta(hours=6)


def sizes(world_size: int) -> list[int]:
    """The world sizes to measure: powers of two, and the whole world."""
    return sorted({world_size, *(2**power for power in range(world_size.bit_length()) if 2**power < world_size)})


def measure(arguments: argparse.Namespace, cfg: ExperimentConfig, ranks: Ranks) -> dict[str, Any] | None:
    """The results of the whole world and the rows of "scaling", on rank 0; None on other ranks. All ranks must call this."""
    micro_batch_size = cfg.train.micro_batch_size
    assert ranks.master_addr is not None
    assert ranks.master_port is not None
    store = dist.TCPStore(
        ranks.master_addr, ranks.master_port, ranks.world_size, ranks.rank == 0, _LONGEST_WAIT, wait_for_workers=False
    )
    whole = micro_batch_size * ranks.world_size
    # (ranks, images per update); for the whole world, weak and strong scaling are the same measurement.
    points = [(size, images) for size in sizes(ranks.world_size) for images in (micro_batch_size * size, whole)]
    results: dict[tuple[int, int], dict[str, Any]] = {}
    for number, (size, images) in enumerate(dict.fromkeys(points), start=1):
        if ranks.rank < size:
            values = _run_rank(arguments, images, ranks, size, ranks.master_port + number)
            if ranks.rank == 0 and values is not None:
                results[size, images] = values
        if ranks.rank == 0:
            store.set(f"done/{number}", "")
        store.get(f"done/{number}")  # wait until the measurement is done
    # The store ends with rank 0's process, which therefore waits until all ranks have read it.
    store.set(f"left/{ranks.rank}", "")
    if ranks.rank != 0:
        return None
    store.wait([f"left/{rank}" for rank in range(ranks.world_size)])
    ways = {
        "weak": {size: values for (size, images), values in results.items() if images == micro_batch_size * size},
        "strong": {size: values for (size, images), values in results.items() if images == whole},
    }
    scaling = {name: _rows(values, planned(cfg, values, ranks.local_world_size)) for name, values in ways.items()}
    say(table(scaling))
    say(f"planned: the prediction of launchers/plan.py for cluster.gpu={cfg.cluster.gpu}")
    return {**results.get((ranks.world_size, whole), {}), "scaling": scaling}


def _run_rank(arguments: argparse.Namespace, images: int, ranks: Ranks, size: int, port: int) -> dict[str, Any] | None:
    """The JSON object that this rank's process prints in a world of the given size, on rank 0; None on other ranks."""
    command = [sys.executable, sys.argv[0], "train", "--config", arguments.config, *arguments.overrides]
    command += ["--rounds", str(arguments.rounds), "--steps", str(arguments.steps)]
    if arguments.classes is not None:
        command += ["--classes", str(arguments.classes)]
    command += ["--global-batch", str(images)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    place = {
        "RANK": ranks.rank,
        "LOCAL_RANK": ranks.local_rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": min(size, ranks.local_world_size),
        "MASTER_ADDR": ranks.master_addr,
        "MASTER_PORT": port,
    }
    env = {**clean, **{name: str(value) for name, value in place.items()}}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if ranks.rank != 0:
        return None
    if done.returncode != 0:
        say(f"{size} ranks with {images} images an update: not measured, exit code {done.returncode}")
        return None
    return json.loads(done.stdout)


def planned(cfg: ExperimentConfig, results: dict[int, dict[str, Any]], per_node: int) -> dict[int, float]:
    """Images per second predicted by the planner, for the measured world sizes and batches that fill their machines.

    The GPU is cluster.gpu of the config; the number of GPUs per machine is the job's number of tasks per node.
    """
    known = devices()
    if cfg.cluster.gpu not in known:
        return {}
    device, model, rates = replace(known[cfg.cluster.gpu], gpus_per_node=per_node), meta_model(cfg), {}
    for size, values in results.items():
        micro, images = values["micro_batch_size"], values["global_batch_size"]
        sized = replace(cfg, train=replace(cfg.train, micro_batch_size=micro, global_batch_size=images))
        if not device.fills_machines(size):
            continue
        cluster = cluster_of(size, cfg.cluster.gpu, device)
        rates[size] = images / step_time(sized, cluster, images // (micro * size), model).total_s
    return rates


def _rows(results: dict[int, dict[str, Any]], planned: dict[int, float]) -> list[dict[str, Any]]:
    """The rows by world size, with efficiency: images per second and rank, relative to the smallest measured world.

    planned: images per second predicted by the planner, for the predicted efficiency (None where there is none).
    """
    measured = {size: values["images_per_s"] for size, values in results.items()}
    return [
        {
            "world_size": size,
            "global_batch_size": values["global_batch_size"],
            "images_per_s": values["images_per_s"],
            "efficiency": _efficiency(measured, size),
            "planned_efficiency": _efficiency(planned, size),
        }
        for size, values in sorted(results.items())
    ]


def _efficiency(images_per_s: dict[int, float], size: int) -> float | None:
    if size not in images_per_s:
        return None
    first = min(images_per_s)
    return images_per_s[size] / size / (images_per_s[first] / first)


def table(scaling: dict[str, list[dict[str, Any]]]) -> str:
    """The text of the table of `measure`'s "scaling"."""
    lines = [["scaling", "ranks", "batch", "images/s", "efficiency", "planned"]]
    for name, rows in scaling.items():
        for row in rows:
            expected = row["planned_efficiency"]
            lines.append([
                name, str(row["world_size"]), str(row["global_batch_size"]), f"{row['images_per_s']:.1f}",
                f"{row['efficiency']:.1%}", "-" if expected is None else f"{expected:.1%}",
            ])  # fmt: skip
    return aligned(lines)
