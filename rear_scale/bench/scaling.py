"""How the training step scales over the ranks of one srun: weak (an equal micro-batch for every rank) and strong (an equal
update, shared out).

Every measurement is a world of its own in fresh processes, since engines keep state that outlives a process group: each task
of srun starts `launchers/bench.py train` as a rank of 1, 2, 4, ... ranks, and waits where it is not one of them.
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
from rear_scale.model import meta_model
from rear_scale.progress import say
from rear_scale.scaling.cost import step_time
from rear_scale.scaling.devices import cluster_of, devices
from rear_scale.text_table import aligned
from rear_scale.world import Ranks

_LONGEST_WAIT = timedelta(hours=6)


def sizes(world_size: int) -> list[int]:
    """1, 2, 4, ... and the whole world."""
    return sorted({world_size, *(2**power for power in range(world_size.bit_length()) if 2**power < world_size)})


def measure(arguments: argparse.Namespace, cfg: ExperimentConfig, ranks: Ranks) -> dict[str, Any] | None:
    """The figures of the whole world with a table "scaling", on rank 0; None on the others. All ranks must call this."""
    micro_batch_size = cfg.train.micro_batch_size
    assert ranks.master_addr is not None
    assert ranks.master_port is not None
    store = dist.TCPStore(
        ranks.master_addr, ranks.master_port, ranks.world_size, ranks.rank == 0, _LONGEST_WAIT, wait_for_workers=False
    )
    whole = micro_batch_size * ranks.world_size
    # (ranks, images of an update); at the whole world both ways are one.
    points = [(size, images) for size in sizes(ranks.world_size) for images in (micro_batch_size * size, whole)]
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for number, (size, images) in enumerate(dict.fromkeys(points), start=1):
        if ranks.rank < size:
            values = _run_rank(arguments, images, ranks, size, ranks.master_port + number)
            if ranks.rank == 0 and values is not None:
                found[size, images] = values
        if ranks.rank == 0:
            store.set(f"done/{number}", "")
        store.get(f"done/{number}")  # nobody starts while others are timed
    # The store goes with rank 0: not before all have read it.
    store.set(f"left/{ranks.rank}", "")
    if ranks.rank != 0:
        return None
    store.wait([f"left/{rank}" for rank in range(ranks.world_size)])
    ways = {
        "weak": {size: values for (size, images), values in found.items() if images == micro_batch_size * size},
        "strong": {size: values for (size, images), values in found.items() if images == whole},
    }
    scaling = {name: _rows(values, planned(cfg, values, ranks.local_world_size)) for name, values in ways.items()}
    say(table(scaling))
    say(f"planned: for cluster.gpu={cfg.cluster.gpu}, as launchers/plan.py reckons")
    return {**found.get((ranks.world_size, whole), {}), "scaling": scaling}


def _run_rank(arguments: argparse.Namespace, images: int, ranks: Ranks, size: int, port: int) -> dict[str, Any] | None:
    """This rank's process in a world of some size; what it prints on rank 0."""
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


def planned(cfg: ExperimentConfig, found: dict[int, dict[str, Any]], per_node: int) -> dict[int, float]:
    """Images per second by the planner, for the world sizes and batches that were measured and fill their machines.

    The GPU is cluster.gpu of the config; a machine has as many as the job has tasks there.
    """
    known = devices()
    if cfg.cluster.gpu not in known:
        return {}
    device, model, rates = replace(known[cfg.cluster.gpu], gpus_per_node=per_node), meta_model(cfg), {}
    for size, values in found.items():
        micro, images = values["micro_batch_size"], values["global_batch_size"]
        sized = replace(cfg, train=replace(cfg.train, micro_batch_size=micro, global_batch_size=images))
        if not device.fills_machines(size):
            continue
        cluster = cluster_of(size, cfg.cluster.gpu, device)
        rates[size] = images / step_time(sized, cluster, images // (micro * size), model).total_s
    return rates


def _rows(found: dict[int, dict[str, Any]], planned: dict[int, float]) -> list[dict[str, Any]]:
    """By world size, with the efficiency against the smallest one that was measured: images per second and rank.

    planned: the planner's images per second, for the efficiency beside it (null where there is none).
    """
    measured = {size: values["images_per_s"] for size, values in found.items()}
    return [
        {
            "world_size": size,
            "global_batch_size": values["global_batch_size"],
            "images_per_s": values["images_per_s"],
            "efficiency": _efficiency(measured, size),
            "planned_efficiency": _efficiency(planned, size),
        }
        for size, values in sorted(found.items())
    ]


def _efficiency(images_per_s: dict[int, float], size: int) -> float | None:
    if size not in images_per_s:
        return None
    first = min(images_per_s)
    return images_per_s[size] / size / (images_per_s[first] / first)


def table(scaling: dict[str, list[dict[str, Any]]]) -> str:
    """For reading, of what `measure` gives."""
    lines = [["scaling", "ranks", "batch", "images/s", "efficiency", "planned"]]
    for name, rows in scaling.items():
        for row in rows:
            expected = row["planned_efficiency"]
            lines.append([
                name, str(row["world_size"]), str(row["global_batch_size"]), f"{row['images_per_s']:.1f}",
                f"{row['efficiency']:.1%}", "-" if expected is None else f"{expected:.1%}",
            ])  # fmt: skip
    return aligned(lines)
