from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import run_ranks

from rear_scale import world
from rear_scale.config import InputError
from rear_scale.world import World, discover, free_port, joined, locked, slurm_nodes


def test_without_a_launcher_it_is_a_world_of_one() -> None:
    ranks = discover({})
    assert (ranks.rank, ranks.world_size, ranks.launcher) == (0, 1, "single")


def test_torchrun_and_deepspeed_variables_are_read() -> None:
    common = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
    torchrun = discover({**common, "LOCAL_WORLD_SIZE": "2"})
    deepspeed = discover({**common, "LOCAL_SIZE": "2", "CROSS_RANK": "1"})
    assert torchrun == deepspeed
    assert (torchrun.rank, torchrun.local_rank, torchrun.world_size, torchrun.local_world_size) == (3, 1, 4, 2)
    assert (torchrun.master_addr, torchrun.master_port) == ("node0", 29_500)


SRUN = {
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "12",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "12",
    "SLURM_STEP_TASKS_PER_NODE": "8,4",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_NODELIST": "gpu07",
}


def test_srun_variables_are_read() -> None:
    ranks = discover(SRUN)
    assert (ranks.rank, ranks.local_rank, ranks.world_size, ranks.local_world_size) == (9, 1, 12, 4)
    assert ranks.master_addr == "gpu07"
    others = {discover({**SRUN, "SLURM_PROCID": str(rank)}).master_port for rank in range(12)}
    assert others == {ranks.master_port}
    # Below the ports that a machine hands out itself, with room for those beside it.
    ports = {discover({**SRUN, "SLURM_JOB_ID": str(job)}).master_port for job in range(0, 100_000, 7)}
    assert 10_000 <= min(ports) < max(ports) < 15_984
    assert discover({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "6(x2)"}).local_world_size == 6


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("node01", "node01"),
        ("127.0.0.1,127.0.0.2", "127.0.0.1 127.0.0.2"),
        ("node[01-03]", "node01 node02 node03"),
        ("a[3,7-8],b01", "a3 a7 a8 b01"),
        ("gpu-[1-2]-[01-03]", "gpu-1-01 gpu-1-02 gpu-1-03 gpu-2-01 gpu-2-02 gpu-2-03"),
        ("n[9-11].cluster.org,login", "n9.cluster.org n10.cluster.org n11.cluster.org login"),
        ("r[1,3]n[098-100]-ib", "r1n098-ib r1n099-ib r1n100-ib r3n098-ib r3n099-ib r3n100-ib"),
        ("[1-2]x", "1x 2x"),
        ("cn-[0001,0005],cn-x", "cn-0001 cn-0005 cn-x"),
    ],
)
def test_a_list_of_nodes_is_expanded_without_slurm(monkeypatch: pytest.MonkeyPatch, nodes: str, expected: str) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert slurm_nodes({"SLURM_STEP_NODELIST": nodes, "SLURM_JOB_NODELIST": "others"}) == expected.split()
    assert discover({**SRUN, "SLURM_STEP_NODELIST": nodes}).master_addr == expected.split()[0]


@pytest.mark.parametrize(
    "nodes", ["", ",", "a,,b[", "node[1-", "node]1[", "node[a-b]", "node[3-1]", "n[1-999999999]", "n[0-299][0-299]", "n[]",
              "n[1-2-3]", "n[[1-2]]", "n[１-２]"],
)  # fmt: skip
def test_a_list_of_nodes_that_is_none_is_named(nodes: str) -> None:
    with pytest.raises(InputError, match=r"SLURM_(STEP|JOB)_NODELIST=.* is not a list of nodes .*Set MASTER_ADDR"):
        slurm_nodes({"SLURM_STEP_NODELIST": nodes})


def test_plain_python_in_a_batch_script_is_one_process() -> None:
    batch = {name: value for name, value in SRUN.items() if "STEP" not in name}
    assert discover(batch).world_size == 1
    assert discover({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}).world_size == 1


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"RANK": "4", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK=4 is not below WORLD_SIZE=4"),
        ({"RANK": "abc", "WORLD_SIZE": "4"}, "RANK=abc is not a whole number"),
        ({"RANK": "", "WORLD_SIZE": "4"}, "RANK= is not a whole number"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "x"},
            "MASTER_PORT=x is not a whole number",
        ),
        ({**SRUN, "SLURM_PROCID": "one"}, "SLURM_PROCID=one is not a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "needs MASTER_ADDR and MASTER_PORT"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "many"}, "is not a list such as"),
    ],
)
def test_contradictions_are_named(env: dict[str, str], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        discover(env)


def test_an_empty_number_of_threads_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = discover({})
    for text in ("", "3"):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        with joined(alone):
            assert torch.get_num_threads() == (int(text) if text else len(os.sched_getaffinity(0)))
    monkeypatch.setenv("OMP_NUM_THREADS", "all")
    with pytest.raises(InputError, match="OMP_NUM_THREADS=all is not a whole number"), joined(alone):
        pass


@pytest.mark.parametrize("same_for_any_world", [True, False])
def test_float64_work_beside_a_gpu_has_one_thread_where_results_must_be_the_same(
    monkeypatch: pytest.MonkeyPatch, same_for_any_world: bool
) -> None:
    """A GPU machine without its GPU: what joins the ranks does nothing here."""
    monkeypatch.setattr(world, "_device", lambda ranks: torch.device("cuda", 0))
    monkeypatch.setattr(world.device, "describe", lambda place: "a GPU")
    for name in ("init_process_group", "barrier", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda **options: None)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with joined(discover({}), same_for_any_world=same_for_any_world):
        assert torch.get_num_threads() == (1 if same_for_any_world else 2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def _collectives(world: World) -> tuple:
    gathered = world.gather({"rank": world.rank})
    return (
        world.sum([world.rank + 0.1, 1]).tolist(),
        gathered,
        world.from_main(f"from {world.rank}"),
        torch.get_num_threads(),
    )


def test_three_ranks_sum_gather_and_hear_rank_0() -> None:
    for total, gathered, heard, threads in run_ranks(3, _collectives):
        assert total == pytest.approx([3.3, 3.0], abs=1e-15)
        assert gathered == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert heard == "from 0"
        assert threads == 1


def test_a_lock_is_held_by_one_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new/folder/.lock"
    with locked(path, "mine"):
        with pytest.raises(InputError, match="theirs"), locked(path, "theirs"):
            pass
        assert path.exists()
    assert not path.exists()
    with locked(path, "mine"), contextlib.suppress(KeyError), locked(tmp_path / "other", "x"):
        raise KeyError
    assert not list(tmp_path.rglob("*lock")) + list(tmp_path.glob("other"))


def _of_rank_0(world: World, error: Exception | None) -> object:
    def job() -> str:
        assert world.is_main
        if error is not None:
            raise error
        return "result"

    try:
        return world.on_main(job)
    except (InputError, OSError) as raised:
        return f"{type(raised).__name__}: {raised}"


def test_a_job_of_rank_0_ends_alike_on_all_ranks() -> None:
    assert run_ranks(2, _of_rank_0, None) == ["result"] * 2
    assert run_ranks(2, _of_rank_0, InputError("no")) == ["InputError: no"] * 2


def _refused(world: World, lock: Path) -> str:
    try:
        with world.alone(lock, "in use"):
            return "entered"
    except (InputError, OSError) as error:
        return f"{type(error).__name__}: {error}"


def test_what_stops_rank_0_stops_all_ranks_with_the_same_words(tmp_path: Path) -> None:
    with locked(tmp_path / ".lock", "never said"):
        assert run_ranks(2, _refused, tmp_path / ".lock") == ["InputError: in use"] * 2
    (tmp_path / "file").write_text("")
    (error, same) = run_ranks(2, _refused, tmp_path / "file/.lock")
    assert error == same
    assert str(tmp_path / "file") in error
    assert run_ranks(2, _refused, tmp_path / ".lock") == ["entered"] * 2


def test_a_free_port_is_none_that_a_connection_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    port = free_port()
    assert not first <= port <= last
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
        listener.listen()
        chosen = iter([port, port, port + 1])
        monkeypatch.setattr(world.secrets, "choice", lambda ports: next(chosen, port + 2))
        assert free_port() != port


def test_a_machine_without_an_address_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "_NAME_S", 0)
    with pytest.raises(
        InputError, match=r"rank 1 .* cannot resolve MASTER_ADDR=node01\.invalid, .* Set MASTER_ADDR to a name"
    ):
        world._meet(world.Ranks(1, 1, 2, 2, "node01.invalid", 29_500, "slurm"), 1)
