"""The preflight check of a job's nodes, before hours are spent: `launchers/train.py --check` under any launcher.

Every rank first checks its own node and reports through a key-value store, which needs neither GPUs nor a working fabric;
ranks that do not report are named with their node. If all is well, the ranks then join a process group and time all-reduce.
"""

# W ranks, n nodes

from __future__ import annotations

import json
import os
import shutil
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rear_scale.config import ExperimentConfig, InputError, required_path
from rear_scale.config.devices import Device, device_named
from rear_scale.device import uses_cuda
from rear_scale.progress import say
from rear_scale.shards.storage import is_remote
from rear_scale.train import setup
from rear_scale.world import Ranks, World, joined, node_name, slurm_nodes

# A rank without a report after this time is treated as failed. Imports from a busy file system may take minutes.
_ANSWER_S = 300.0
# Time limit for a file written on one node to become visible on another.
_VISIBLE_S = 30.0
_FREE_FRACTION = 0.9  # of a GPU's memory; with less free memory, another process uses the GPU
# Bus bandwidth in GB/s below which something is broken (such as a fabric that fell back to a slow network). GPUs in
# configs/devices/gpus.yaml have their own minimum there.
_LEAST_GB_PER_S = {"cuda": 1.0, "cpu": 0.01}
_BYTES = {"cuda": 128 * 2**20, "cpu": 4 * 2**20}
# Fraction of the median bandwidth of all nodes; a node below it slows down all others.
_LEAST_FRACTION = 0.5
_REPEATS = 5
# The number of file errors that one error message lists.
_LISTED = 3


@dataclass
class Report:
    """The report of one rank about its node."""

    rank: int
    node: str
    device: str = "cpu"
    shards: str = ""  # a hash of the manifest and of the sizes of its tars
    token: str = ""  # the text of the file that it wrote to the run folder
    faults: list[str] = field(default_factory=list)


def check(cfg: ExperimentConfig, ranks: Ranks) -> None:
    """Checks all nodes and prints a line for each, on rank 0. All ranks must call this.

    Raises InputError when all nodes report the same wrong input, and SystemExit(1) on all ranks when nodes are unfit; rank 0
    then lists them, with the --exclude option for sbatch.
    """
    store = _open_store(ranks)
    try:
        _check(cfg, ranks, store)
    finally:
        _leave(store, ranks)


def _check(cfg: ExperimentConfig, ranks: Ranks, store: dist.Store) -> None:
    mine = _own_report(cfg, ranks)
    store.set(f"report/{ranks.rank}", json.dumps(asdict(mine)))
    if ranks.rank == 0:
        reports, silent = _collect(store, ranks)
        bad = _judge(cfg, ranks, reports, silent)
        store.set("wrong input", _wrong_input(reports) if not silent else "")
        store.set("unfit", json.dumps(bad))
    wrong_input = store.get("wrong input").decode()
    if wrong_input:
        raise InputError(wrong_input)
    bad = json.loads(store.get("unfit"))
    rates: dict[str, dict[str, float]] = {}
    if not bad:
        with AllReduceWatchdog(store, ranks), joined(ranks, timeout_s=_ANSWER_S) as world:
            rates = _measure(world, store)
            bad = world.from_main(_slow(rates, world.device.type, _device_row(world.device)))
    if ranks.rank == 0:
        _show(reports, rates, bad)
    if bad:
        raise SystemExit(1)


def _wrong_input(reports: list[Report]) -> str:
    """The file errors that every node reports identically: bad input rather than a bad node. Empty when there are none."""
    by_node: dict[str, dict[str, None]] = {}
    for report in reports:
        by_node.setdefault(report.node, {}).update(dict.fromkeys(report.faults))
    first, *others = by_node.values()
    if any(other.keys() != first.keys() for other in others) or any(fault.startswith("GPU ") for fault in first):
        return ""
    faults = list(first)
    more = f"; and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
    return "; ".join(faults[:_LISTED]) + more


def _leave(store: dist.Store, ranks: Ranks) -> None:
    """Waits on rank 0 until the other ranks are done with the store, which ends with the process of rank 0."""
    if ranks.rank != 0:
        store.set(f"left/{ranks.rank}", "")
        return
    there = [rank for rank in range(1, ranks.world_size) if store.check([f"report/{rank}"])]
    with suppress(dist.DistStoreError):
        store.wait([f"left/{rank}" for rank in there], timedelta(seconds=_VISIBLE_S))


def _open_store(ranks: Ranks) -> dist.Store:
    if ranks.master_addr is None or ranks.master_port is None:
        return dist.HashStore()
    # The next port, because the process group uses MASTER_PORT afterwards.
    port, patience = ranks.master_port + 1, timedelta(seconds=2 * _ANSWER_S + _VISIBLE_S)
    return dist.TCPStore(ranks.master_addr, port, None, ranks.rank == 0, patience, wait_for_workers=False)


def _own_report(cfg: ExperimentConfig, ranks: Ranks) -> Report:
    """The report of this rank, which checks its own device; the first rank of each node checks the files too."""
    report = Report(ranks.rank, node_name())
    try:
        data = setup.check_data(cfg, ranks)
        report.shards = data.manifest.fingerprint
        folder = required_path(cfg.data.train, "data.train")
        if ranks.local_rank == 0 and not is_remote(folder):
            for shard in data.manifest.shards:
                path = Path(folder) / shard.file
                size = path.stat().st_size if path.exists() else None
                if size != shard.size:
                    problem = "is not there" if size is None else f"has {size:,} bytes instead of {shard.size:,}"
                    report.faults.append(f"{path} {problem}")
    except (InputError, OSError) as error:
        report.faults.append(str(error))
    if ranks.local_rank == 0:
        report.token = f"{report.node} {os.getpid()} {time.time_ns()}"
        try:
            path = _probe_folder(cfg) / str(ranks.rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(report.token)  # rank 0 reads it, to check that the run folder is shared
        except OSError as error:
            report.faults.append(f"run.dir={cfg.run.dir} cannot be written to: {error.strerror}")
    try:
        report.device = torch.cuda.get_device_name(0) if uses_cuda() else "cpu"
    except InputError as error:
        if str(error) not in report.faults:  # check_data may have raised the same error
            report.faults.append(str(error))
    if report.device != "cpu":
        report.faults += _gpu_faults(ranks)
    return report


def _probe_folder(cfg: ExperimentConfig) -> Path:
    return Path(cfg.run.dir) / ".preflight"


def _gpu_faults(ranks: Ranks) -> list[str]:
    """Errors of this rank's GPU: it does not answer, computes wrong numbers, or is used by another process."""
    visible = torch.cuda.device_count()
    index = ranks.local_rank if ranks.local_rank < visible else 0
    try:
        free, total = torch.cuda.mem_get_info(index)
        if free < _FREE_FRACTION * total:
            return [f"GPU {index} has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free: another process uses it"]
        matrix = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
        product = (matrix.to(f"cuda:{index}", torch.float64) @ matrix.to(f"cuda:{index}", torch.float64)).cpu()
        if not torch.allclose(product, matrix.double() @ matrix.double(), rtol=1e-9, atol=1e-9):
            return [f"GPU {index} computes wrong numbers"]
    except RuntimeError as error:
        return [f"GPU {index} does not answer: {str(error).splitlines()[0]}"]
    return []


def _collect(store: dist.Store, ranks: Ranks) -> tuple[list[Report], list[int]]:
    """The reports, and the ranks that have not reported in time."""
    deadline = time.monotonic() + _ANSWER_S
    reports, silent = [], []
    for rank in range(ranks.world_size):
        try:
            store.wait([f"report/{rank}"], timedelta(seconds=max(0.01, deadline - time.monotonic())))
            reports.append(Report(**json.loads(store.get(f"report/{rank}"))))
        except dist.DistStoreError:
            silent.append(rank)
    return reports, silent


def _judge(cfg: ExperimentConfig, ranks: Ranks, reports: list[Report], silent: list[int]) -> dict[str, list[str]]:
    """The faults of unfit nodes, by node name."""
    bad: dict[str, list[str]] = {}
    for rank in silent:
        _add(bad, _node_of(rank, ranks, reports), f"rank {rank} did not answer within {_ANSWER_S:.0f} s")
    for report in reports:
        for fault in report.faults:
            _add(bad, report.node, fault)
    for what, values in (
        ("other shards", {report.rank: report.shards for report in reports if report.shards}),
        ("another device", {report.rank: report.device for report in reports}),
    ):
        # The value of most ranks is assumed to be right.
        usual = Counter(values.values()).most_common(1)[0][0] if values else None
        for report in reports:
            if values.get(report.rank, usual) != usual:
                _add(bad, report.node, f"it has {what} than most nodes ({values[report.rank][:20]})")
    deadline = time.monotonic() + _VISIBLE_S  # one deadline for all nodes, of which there may be hundreds
    for report in reports:
        if (
            report.token
            and not any("run.dir" in fault for fault in report.faults)
            and not _is_visible(cfg, report, deadline)
        ):
            _add(bad, report.node, f"its files in run.dir={cfg.run.dir} are not visible on {reports[0].node}")
    shutil.rmtree(_probe_folder(cfg), ignore_errors=True)
    with suppress(OSError):
        Path(cfg.run.dir).rmdir()  # fails, and leaves the folder, unless this check alone has made it
    return bad


def _add(bad: dict[str, list[str]], node: str, fault: str) -> None:
    if fault not in bad.setdefault(node, []):
        bad[node].append(fault)


def _is_visible(cfg: ExperimentConfig, report: Report, deadline: float) -> bool:
    path = _probe_folder(cfg) / str(report.rank)
    while True:
        try:
            if path.read_text() == report.token:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def _node_of(rank: int, ranks: Ranks, reports: Iterable[Report]) -> str:
    """The name of the node of a rank that has not reported: from another rank's report, from SLURM, or "the node of rank ..."."""
    index = rank // ranks.local_world_size
    for report in reports:
        if report.rank // ranks.local_world_size == index:
            return report.node
    try:
        return slurm_nodes()[index]
    except (InputError, IndexError):
        return f"the node of rank {rank}"


class AllReduceWatchdog:
    """Ends rank 0 with a message that lists the late nodes, when an all-reduce does not return: a hanging fabric raises no
    error."""

    def __init__(self, store: dist.Store, ranks: Ranks) -> None:
        self.store, self.ranks = store, ranks
        self.done = threading.Event()

    def __enter__(self) -> None:
        if self.ranks.rank == 0:
            threading.Thread(target=self._watch, daemon=True).start()

    def __exit__(self, *error: object) -> None:
        self.done.set()

    def _watch(self) -> None:
        if self.done.wait(_ANSWER_S):
            return
        reports = [Report(**json.loads(self.store.get(f"report/{rank}"))) for rank in range(self.ranks.world_size)]
        late = sorted({report.node for report in reports if not self.store.check([f"measured/{report.rank}"])})
        say(
            f"all-reduce between nodes did not finish within {_ANSWER_S:.0f} s. Nodes that did not finish: {', '.join(late)}"
        )
        os._exit(1)


def _measure(world: World, store: dist.Store) -> dict[str, dict[str, float]]:
    """Bus bandwidths in GB/s by node: among its own ranks, with the faster of its two neighbours, and of the whole world."""
    nodes = world.gather(node_name())
    order = list(dict.fromkeys(nodes))
    members = {node: [rank for rank, name in enumerate(nodes) if name == node] for node in order}
    groups: dict[tuple[str, ...], Any] = {
        (node,): dist.new_group(ranks) for node, ranks in members.items() if len(ranks) > 1
    }
    count = len(order)
    pairs: list[tuple[str, ...]] = [
        (order[index], order[(index + 1) % count]) for index in range(count if count > 2 else count - 1)
    ]
    for pair in pairs:
        groups[pair] = dist.new_group([*members[pair[0]], *members[pair[1]]])
    mine: dict[str, float] = {}
    # Pairs of neighbours take turns, so that each node is in one measurement at a time. In a ring of an odd number of nodes
    # the last pair is measured alone.
    alone: list[tuple[str, ...]] = [(node,) for node in order]
    turns = [alone, pairs[0::2], pairs[1::2]]
    if count > 2 and count % 2:
        turns = [alone, pairs[0:-1:2], pairs[1:-1:2], pairs[-1:]]
    for turn in turns:
        for group in turn:
            if group in groups and nodes[world.rank] in group:
                mine[",".join(group)] = _bandwidth(world, groups[group])
        world.barrier()
    whole = min(world.gather(_bandwidth(world, None) if world.size > 1 else 0.0))
    store.set(f"measured/{world.rank}", "")
    slowest: dict[str, float] = {}
    for rates in world.gather(mine):
        for among, rate in rates.items():
            slowest[among] = min(rate, slowest.get(among, rate))
    return {
        node: {
            "within": slowest.get(node, 0.0),
            # The faster pair counts, because a good node is slow beside one bad neighbour, and rarely has two.
            "between": max((slowest[",".join(pair)] for pair in pairs if node in pair), default=0.0),
            "all": whole,
        }
        for node in order
    }


def _bandwidth(world: World, group: dist.ProcessGroup | None) -> float:
    """The best bus bandwidth of all-reduce in GB/s, as nccl-tests define it. Raises RuntimeError for a wrong sum."""
    size = dist.get_world_size(group)
    values = torch.ones(_BYTES[world.device.type] // 4, device=world.device)
    times = []
    for turn in range(_REPEATS + 1):
        values.fill_(1)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        dist.all_reduce(values, group=group)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        if turn:  # the first repetition, which sets up connections, is not timed
            times.append(time.perf_counter() - started)
    if not (values == size).all():
        raise RuntimeError(f"all-reduce of ones over {size} ranks gave {values.min().item()} to {values.max().item()}")
    return 2 * (size - 1) / size * values.nbytes / min(times) / 1e9


def _device_row(device: torch.device) -> Device | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return device_named(properties.name, properties.total_memory / 2**30)


def _slow(rates: dict[str, dict[str, float]], device: str, row: Device | None = None) -> dict[str, list[str]]:
    """The faults of nodes whose all-reduce is far slower than that of the others, or than any working network."""
    bad: dict[str, list[str]] = {}
    floors = {"within": _LEAST_GB_PER_S[device], "between": _LEAST_GB_PER_S[device]}
    if row is not None:
        floors = {"within": row.least_node_gb_per_s, "between": row.least_network_gb_per_s}
    for name, where in (("within", "among its own ranks"), ("between", "with its neighbours")):
        values = {node: rate[name] for node, rate in rates.items() if rate[name] > 0}
        if not values:
            continue
        usual = statistics.median(values.values())
        for node, value in values.items():
            # On CPUs, nodes are not compared: other processes on their cores slow some of them down, not the network.
            if device == "cuda" and value < _LEAST_FRACTION * usual:
                _add(bad, node, f"all-reduce {where}: {value:.2f} GB/s, {usual:.2f} on the others")
            elif value < floors[name]:
                _add(bad, node, f"all-reduce {where}: {value:.3f} GB/s, expected {floors[name]} or more")
    return bad


def _show(reports: list[Report], rates: dict[str, dict[str, float]], bad: dict[str, list[str]]) -> None:
    nodes = dict.fromkeys([*(report.node for report in reports), *bad])
    for node in nodes:
        of_node = [report for report in reports if report.node == node]
        device = of_node[0].device if of_node else "unknown device"
        if device == "cpu":
            device = "no GPU, so no GPU was checked"
        parts = [f"{len(of_node)} ranks", device]
        if node in rates:
            parts += [
                f"{name} {rates[node][key]:.2f} GB/s"
                for key, name in (
                    ("within", "all-reduce in the node"),
                    ("between", "with a neighbour"),
                    ("all", "of all"),
                )
                if rates[node][key] > 0
            ]
        print(f"{'unfit' if node in bad else 'fit'}: {node}: {'; '.join(parts)}")
        for fault in bad.get(node, []):
            print(f"    {fault}")
    if bad:
        print(f"Exclude the unfit nodes: sbatch --exclude={','.join(bad)} ...", flush=True)
    else:
        print(f"All {len(nodes)} nodes see the same shards and write to the run folder.", flush=True)
