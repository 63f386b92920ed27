"""Ranks, devices and the process group: discovery, joining, small collectives and a clean end.

This is the one module that reads RANK, LOCAL_RANK and the SLURM variables; all other modules receive a World. Plain
`python launchers/train.py` is a world of size one and takes the same path through the code.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import math
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rear_scale import device
from rear_scale.config import InputError, first_line
from rear_scale.locks import locked
from rear_scale.peers import Peers
from rear_scale.progress import say

_T = TypeVar("_T")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_RENDEZVOUS_S = 1800.0  # within this time the last rank must have started
_FIRST_FREE_PORT = 16_384  # above those that SLURM jobs meet at, see `discover`
_NAME_S = 20  # for this long the lookup of a host name is tried again
_MOST_NODES = 65_536  # SLURM's own limit


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, the number of ranks and their rendezvous address, as set by the launcher."""

    rank: int
    local_rank: int  # on this node
    world_size: int
    local_world_size: int  # processes on this node
    master_addr: str | None  # None = a world of one, which needs no rendezvous
    master_port: int | None
    launcher: str  # deepspeed or torchrun ("environment"), slurm, single


def discover(env: Mapping[str, str] = os.environ) -> Ranks:
    """The ranks that torchrun, deepspeed or srun describe in environment variables; without such variables, a world of one.

    Raises InputError when the variables contradict each other.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        world_size = _whole(env, "WORLD_SIZE")
        ranks = Ranks(
            rank=_whole(env, "RANK"),
            local_rank=_whole(env, "LOCAL_RANK", default=0),
            world_size=world_size,
            # torchrun sets LOCAL_WORLD_SIZE, deepspeed LOCAL_SIZE.
            local_world_size=_whole(env, "LOCAL_WORLD_SIZE", "LOCAL_SIZE", default=world_size),
            master_addr=env.get("MASTER_ADDR"),
            master_port=_whole(env, "MASTER_PORT", default=0) or None,
            launcher="environment",
        )
    # SLURM_STEP_ID is set only in tasks of srun: a batch script that starts plain python is one process.
    elif (
        "SLURM_PROCID" in env
        and "SLURM_STEP_ID" in env
        and _whole(env, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", default=1) > 1
    ):
        world_size = _whole(env, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
        ranks = Ranks(
            rank=_whole(env, "SLURM_PROCID"),
            local_rank=_whole(env, "SLURM_LOCALID"),
            world_size=world_size,
            local_world_size=_slurm_local_tasks(env, world_size),
            master_addr=env.get("MASTER_ADDR") or slurm_nodes(env)[0],
            # A function of the job id, so that every task computes the same port without communication. It stays below the
            # ephemeral ports (from 32,768, in some containers from 16,000) and leaves thirty ports to each job.
            master_port=_whole(
                env,
                "MASTER_PORT",
                default=10_000 + _whole(env, "SLURM_JOB_ID", default=0) * 31 % 5_983 + _whole(env, "SLURM_STEP_ID") % 7,
            ),
            launcher="slurm",
        )
    else:
        return Ranks(0, 0, 1, 1, None, None, "single")
    if not 0 <= ranks.rank < ranks.world_size:
        raise InputError(
            f"RANK={ranks.rank} is not below WORLD_SIZE={ranks.world_size}. Unset both, or use torchrun, deepspeed or srun"
        )
    if ranks.world_size > 1 and (ranks.master_addr is None or ranks.master_port is None):
        raise InputError(
            f"WORLD_SIZE={ranks.world_size} needs MASTER_ADDR and MASTER_PORT. Use torchrun, deepspeed or srun, which set them"
        )
    return ranks


def _whole(env: Mapping[str, str], *names: str, default: int | None = None) -> int:
    """The integer in the first of these variables that is set and not empty. Raises InputError when it is not an integer."""
    name = next((name for name in names if env.get(name)), None)
    if name is None and default is not None:
        return default
    text = env.get(name or names[0], "")
    if not text.strip().isdecimal():
        raise InputError(
            f"{name or names[0]}={text} is not a whole number. Unset it, or use torchrun, deepspeed or srun, which set it"
        )
    return int(text)


def _slurm_local_tasks(env: Mapping[str, str], world_size: int) -> int:
    """The number of tasks on this node, from SLURM's list over the nodes of the step, such as "8(x3),4"."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or str(world_size)
    per_node: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise InputError(f"SLURM_TASKS_PER_NODE={text} is not a list such as 8(x2),4. Start the job with srun")
        per_node += [int(match[1])] * int(match[2] or 1)
    return per_node[min(_whole(env, "SLURM_NODEID", default=0), len(per_node) - 1)]


def node_name(env: Mapping[str, str] = os.environ) -> str:
    """The name of this machine, in the form that sbatch --exclude takes."""
    return env.get("SLURMD_NODENAME") or socket.gethostname()


def slurm_nodes(env: Mapping[str, str] = os.environ) -> list[str]:
    """The names of the nodes of this job step, in rank order. Raises InputError where SLURM's variables name none.

    SLURM's own `scontrol show hostnames` is not called, because containers rarely have it.
    """
    variable = next((name for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST") if env.get(name)), None)
    text = env[variable] if variable else ""
    try:
        return _expand_nodes(text)
    except ValueError as error:
        raise InputError(
            f"{variable or 'SLURM_JOB_NODELIST'}={text[:200]} is not a list of nodes such as node[01-02],gpu7: {error}. "
            "Set MASTER_ADDR to the name of the first node"
        ) from None


def _expand_nodes(text: str) -> list[str]:
    """The node names in a list such as "gpu-[1-2]-[01-03],login". Raises ValueError for a malformed list."""
    names: list[str] = []
    # Commas inside brackets do not separate names.
    for item in re.findall(r"(?:\[[^]]*\]|[^,\[])+|\[.*", text):
        # "a[1,3-4]b" splits into "a", "1,3-4", "b": every second part was in brackets.
        parts = re.split(r"\[([^][]*)\]", item.strip())
        choices = [_numbers(part) if index % 2 else [part] for index, part in enumerate(parts)]
        if any(set(part) & set("[]") for part in parts[::2]):
            raise ValueError("its brackets do not match")
        if len(names) + math.prod(map(len, choices)) > _MOST_NODES:
            raise ValueError(f"more than {_MOST_NODES:,} nodes")
        names += map("".join, itertools.product(*choices))
    if not names or not all(names):
        raise ValueError("a name is missing")
    return names


def _numbers(text: str) -> list[str]:
    """The numbers of a list such as "1,03-05", with their leading zeros."""
    numbers: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip(), re.ASCII)
        if match is None:
            raise ValueError(f"[{text[:50]}] holds something other than numbers and ranges")
        first, last = match[1], match[2] or match[1]
        if not 0 <= int(last) - int(first) < _MOST_NODES:
            raise ValueError(f"{part} is not a range of up to {_MOST_NODES:,} numbers")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


@dataclass(frozen=True)
class World:
    """A joined process group. All ranks must call its methods in the same order."""

    ranks: Ranks
    device: torch.device
    peers: Peers | None = None  # None in a world of one

    def explained(self, error: BaseException) -> BaseException:
        """LostRanks, which names the ranks that have ended, where their end has caused the error; else the error itself."""
        return error if self.peers is None else self.peers.explained(error)

    @property
    def rank(self) -> int:
        return self.ranks.rank

    @property
    def size(self) -> int:
        return self.ranks.world_size

    @property
    def is_main(self) -> bool:
        return self.ranks.rank == 0

    def barrier(self) -> None:
        dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def sum(self, values: Sequence[float] | torch.Tensor) -> torch.Tensor:
        """The elementwise sums of a vector over the ranks, float64, on the CPU of every rank."""
        packed = torch.as_tensor(values, dtype=torch.float64, device=self.device).clone()
        dist.all_reduce(packed)
        return packed.cpu()

    def table(self, values: Sequence[float], computed: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """The n values of each rank in rank order, float64 [W, n], on the CPU of every rank.

        computed: further values, tensors of one element that a GPU may still be computing. This method synchronizes with the
        GPU only once, at its end.
        """
        known = torch.tensor(values, dtype=torch.float64)
        if self.device.type == "cuda":
            known = known.pin_memory()  # copies from pinned memory are asynchronous
        parts = [part.detach().reshape(1).to(self.device, torch.float64) for part in computed]
        mine = torch.cat([known.to(self.device, non_blocking=True), *parts])
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine)
        return torch.stack(rows).cpu()

    def gather(self, item: _T) -> list[_T]:
        """The items of all ranks in rank order, on every rank. Meant for small Python objects."""
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def add(self, counter: str, amount: int = 1) -> int:
        """The new value of a counter in the store, which starts at 0. An atomic increment, not a collective."""
        return dist.distributed_c10d._get_default_store().add(f"rear_scale/{counter}", amount)

    def from_main(self, item: _T) -> _T:
        """The item of rank 0, on every rank. Meant for small Python objects."""
        box = [item]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def on_main(self, job: Callable[[], _T]) -> _T:
        """The return value of `job` on every rank; it runs on rank 0 alone. Its InputError or OSError is raised on every rank.

        If rank 0 alone raised, the other ranks would fail in a collective and their errors would bury its message.
        """
        outcome: tuple[_T] | InputError | OSError | None = None
        if self.is_main:
            try:
                outcome = (job(),)
            except (InputError, OSError) as raised:
                outcome = raised
        outcome = self.from_main(outcome)
        assert outcome is not None, "rank 0 has one"
        if isinstance(outcome, Exception):
            raise outcome
        return outcome[0]

    @contextmanager
    def alone(self, lock: Path, refusal: str) -> Iterator[None]:
        """Holds a lock file (by rank 0) for the block. Raises InputError on all ranks when another process holds it."""
        with ExitStack() as stack:
            self.on_main(lambda: stack.enter_context(locked(lock, refusal)))
            yield


@dataclass(frozen=True)
class SingleProcess(World):
    """A world of one rank without a process group, for use as a library. A process group of the calling program is not used."""

    ranks: Ranks = Ranks(0, 0, 1, 1, None, None, "single")
    device: torch.device = torch.device("cpu")
    counters: dict[str, int] = field(default_factory=dict)

    def barrier(self) -> None:
        return

    def sum(self, values: Sequence[float] | torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.float64).clone().cpu()

    def table(self, values: Sequence[float], computed: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        parts = [part.detach().reshape(1).double().cpu() for part in computed]
        return torch.cat([torch.tensor(values, dtype=torch.float64), *parts])[None]

    def gather(self, item: _T) -> list[_T]:
        return [item]

    def add(self, counter: str, amount: int = 1) -> int:
        self.counters[counter] = self.counters.get(counter, 0) + amount
        return self.counters[counter]

    def from_main(self, item: _T) -> _T:
        return item


@contextmanager
def joined(ranks: Ranks, *, same_for_any_world: bool = False, timeout_s: float = 1800) -> Iterator[World]:
    """The world after joining its process group (NCCL on GPUs, gloo on CPUs), which is destroyed when the block ends normally.

    same_for_any_world: True for results that must not depend on how many ranks share a machine. CPU kernels may round
    differently with another number of threads, so each rank then computes with one thread, also on a GPU, because float64
    work stays on the CPU. False: without GPUs each rank has an equal number of the machine's cores.

    After an exception the group is not destroyed: destroying it waits for the other ranks, which would hide the error.
    """
    device.prepare()
    own_device = _device(ranks)
    if ranks.rank == 0:
        say(f"device: {device.describe(own_device)}; ranks: {ranks.world_size}")
    threads = torch.get_num_threads()
    if same_for_any_world:
        torch.set_num_threads(1)
    elif own_device.type == "cpu":
        torch.set_num_threads(_threads(ranks))
    timeout = timedelta(seconds=timeout_s)
    join = partial(
        dist.init_process_group,
        backend="cpu:gloo,cuda:nccl" if own_device.type == "cuda" else "gloo",
        timeout=timeout,
        # With device_id, every later group is created by splitting this one, which is faster than connecting anew. In a world
        # of one DeepSpeed fails on such groups (DeepSpeed issue 8248).
        device_id=own_device if own_device.type == "cuda" and ranks.world_size > 1 else None,
    )
    # DeepSpeed reads these variables, and srun does not set them.
    os.environ.update(RANK=str(ranks.rank), LOCAL_RANK=str(ranks.local_rank), WORLD_SIZE=str(ranks.world_size))
    if ranks.master_addr is None or ranks.master_port is None:
        join(store=dist.HashStore(), rank=0, world_size=1)
    else:
        os.environ.update(MASTER_ADDR=ranks.master_addr, MASTER_PORT=str(ranks.master_port))
        store = dist.PrefixStore("default_pg", _meet(ranks, min(timeout_s, _RENDEZVOUS_S)))
        store.set_timeout(timeout)
        join(store=store, rank=ranks.rank, world_size=ranks.world_size)
    peers = None
    if ranks.world_size > 1:
        peers = Peers(dist.distributed_c10d._get_default_store(), ranks.rank, ranks.world_size, node_name())
    world = World(ranks, own_device, peers)
    try:
        yield world
    except BaseException as error:
        explained = world.explained(error)
        if explained is not error:
            raise explained from None
        raise
    if peers is not None:
        peers.close()
    # Without this barrier gloo sometimes aborts when one rank exits before another has finished.
    world.barrier()
    dist.destroy_process_group()
    torch.set_num_threads(threads)


def _meet(ranks: Ranks, timeout_s: float) -> dist.Store:
    """The key-value store, once all ranks have connected to it. Raises InputError when rank 0's port is taken or unreachable."""
    address = f"MASTER_ADDR={ranks.master_addr} and MASTER_PORT={ranks.master_port}"
    _check_address(ranks)
    try:
        rendezvous = dist.rendezvous(
            "env://", rank=ranks.rank, world_size=ranks.world_size, timeout=timedelta(seconds=timeout_s)
        )
        return next(rendezvous)[0]
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            raise InputError(
                f"port {ranks.master_port} of {node_name()} is taken by another program, perhaps another run. Choose another: "
                "deepspeed --master_port PORT, torchrun --master-port PORT, or MASTER_PORT=PORT before srun"
            ) from None
        raise InputError(f"rank {ranks.rank} cannot reach rank 0 at {address}: {first_line(error)}") from None
    except dist.DistStoreError as error:
        raise InputError(
            f"not all of {ranks.world_size} ranks connected within {timeout_s:.0f} s to {address}: {first_line(error)}"
        ) from None


def _check_address(ranks: Ranks) -> None:
    """Raises InputError when the name of rank 0's machine cannot be resolved here. Without this check, ranks would wait half an
    hour for the rendezvous."""
    for seconds_left in range(_NAME_S, -1, -1):  # a cluster's name servers may fail for a moment
        try:
            socket.getaddrinfo(ranks.master_addr, ranks.master_port)
            return
        except OSError as error:
            if seconds_left == 0:
                raise InputError(
                    f"rank {ranks.rank} on {node_name()} cannot resolve MASTER_ADDR={ranks.master_addr}, the machine "
                    f"of rank 0 ({error.strerror}). Set MASTER_ADDR to a name or an IP address that all nodes know"
                ) from None
            time.sleep(1)


def _device(ranks: Ranks) -> torch.device:
    if not device.uses_cuda():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    # With srun --gpus-per-task each task sees only its own GPU, as number 0.
    index = ranks.local_rank if ranks.local_rank < visible else 0
    if ranks.local_rank >= visible > 1:
        raise InputError(
            f"LOCAL_RANK={ranks.local_rank}, but only {visible} GPUs are visible on this node. Start at most {visible} processes "
            "per node"
        )
    return device.use_gpu(index)


def _threads(ranks: Ranks) -> int:
    """The number of threads of this rank: its part of the machine's cores, or OMP_NUM_THREADS. More threads than cores would
    make all ranks several times slower."""
    cores = max(1, len(os.sched_getaffinity(0)) // ranks.local_world_size)
    return max(1, _whole(os.environ, "OMP_NUM_THREADS", default=cores))


def end_with_parent(number: int) -> None:
    """Asks the kernel to send this process a signal when its parent process ends in any way."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def free_port() -> int:
    """The number of a TCP port of this machine on which no process listens at the moment.

    It is below the ports that the kernel gives to outgoing connections, one of which could take it before its listener starts
    seconds later. Where that range begins too low (net.ipv4.ip_local_port_range), it is one of them all the same.
    """
    try:
        end = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        end = 0
    ports = range(_FIRST_FREE_PORT, end)
    for port in (*(secrets.choice(ports) for _ in range(100 if len(ports) > 1000 else 0)), 0):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return probe.getsockname()[1]
    raise OSError(errno.EADDRINUSE, "this machine has no free TCP port")
