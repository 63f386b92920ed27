"""Faults of nodes, each planted on one of three, and whether that one is named."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from helpers import run_ranks, tiny_config, write_token_shards

from rear_scale.config import ExperimentConfig, InputError
from rear_scale.config.devices import device_named
from rear_scale.train import preflight
from rear_scale.train.preflight import Report
from rear_scale.world import Ranks, World


def ranks_of(rank: int) -> Ranks:
    """Three nodes with one rank each."""
    return Ranks(rank, 0, 3, 1, None, None, "slurm")


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[ExperimentConfig]:
    """What each node sees: the same config, of shards that it has for itself so that a test may damage them."""
    tokens = write_token_shards(tmp_path / "tokens", 40)
    monkeypatch.setattr(preflight, "_VISIBLE_S", 0.0)
    monkeypatch.setattr(preflight, "_ANSWER_S", 0.2)
    monkeypatch.setenv("SLURM_STEP_NODELIST", "n0,n1,n2")
    monkeypatch.setattr(preflight, "slurm_nodes", lambda: ["n0", "n1", "n2"])
    return [tiny_config(tmp_path, tokens, "train.micro_batch_size=4") for _ in range(3)]


def found(configs: list[ExperimentConfig], monkeypatch: pytest.MonkeyPatch, silent: int | None = None) -> dict:
    """What rank 0 says of the nodes, whose ranks look one after the other."""
    store = dist.HashStore()
    for rank, cfg in enumerate(configs):
        if rank != silent:
            monkeypatch.setenv("SLURMD_NODENAME", f"n{rank}")
            store.set(f"report/{rank}", json.dumps(asdict(preflight._own_report(cfg, ranks_of(rank)))))
    return preflight._judge(configs[0], ranks_of(0), *preflight._collect(store, ranks_of(0)))


def test_good_nodes_are_all_fit_and_leave_nothing_behind(
    nodes: list[ExperimentConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found(nodes, monkeypatch) == {}
    assert not Path(nodes[0].run.dir).exists()


def test_a_node_without_the_shards_is_named(nodes: list[ExperimentConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    nodes[1].data.train = "/nowhere"
    bad = found(nodes, monkeypatch)
    assert list(bad) == ["n1"]
    assert bad["n1"][0].startswith("not found: /nowhere/index.json")


def test_a_node_with_other_shards_is_named(
    tmp_path: Path, nodes: list[ExperimentConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes[2].data.train = str(write_token_shards(tmp_path / "older", 40, seed=5))
    bad = found(nodes, monkeypatch)
    assert list(bad) == ["n2"]
    assert "it has other shards than most nodes" in bad["n2"][0]


def test_a_node_with_a_part_of_a_shard_is_named(
    tmp_path: Path, nodes: list[ExperimentConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(nodes[0].data.train, copy)
    tar = copy / "shard-000000.tar"
    size = tar.stat().st_size
    os.truncate(tar, size - 512)
    nodes[0].data.train = str(copy)
    assert found(nodes, monkeypatch) == {"n0": [f"{tar} has {size - 512:,} bytes instead of {size:,}"]}


def test_a_node_that_cannot_write_is_named(nodes: list[ExperimentConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    write_text = Path.write_text

    def refuse(path: Path, text: str) -> int:
        if os.environ["SLURMD_NODENAME"] == "n1":
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return write_text(path, text)

    monkeypatch.setattr(Path, "write_text", refuse)
    bad = found(nodes, monkeypatch)
    assert bad == {"n1": [f"run.dir={nodes[0].run.dir} cannot be written to: Read-only file system"]}


def test_a_node_whose_run_folder_is_its_own_is_named(
    tmp_path: Path, nodes: list[ExperimentConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes[2].run.dir = str(tmp_path / "local disk")
    bad = found(nodes, monkeypatch)
    assert bad == {"n2": [f"its files in run.dir={nodes[0].run.dir} are not visible on n0"]}


def test_a_node_that_says_nothing_is_named(nodes: list[ExperimentConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    bad = found(nodes, monkeypatch, silent=1)
    assert bad == {"n1": ["rank 1 did not answer within 0 s"]}


def test_what_all_find_wrong_is_wrong_input_and_no_node_is_blamed(nodes: list[ExperimentConfig]) -> None:
    nodes[0].data.train = "/nowhere"
    with pytest.raises(InputError, match="not found: /nowhere/index.json"):
        preflight.check(nodes[0], Ranks(0, 0, 1, 1, None, None, "single"))


def test_shards_that_all_nodes_lack_are_wrong_input_too() -> None:
    """Only the first rank of a node looks at its files."""
    missing = [f"shard-{index:06d}.tar is not there" for index in range(5)]
    reports = [Report(rank, f"n{rank // 2}", faults=[] if rank % 2 else missing) for rank in range(4)]
    assert preflight._wrong_input(reports) == "; ".join(missing[:3]) + "; and 2 more"
    reports[2].faults = missing[:1]
    assert preflight._wrong_input(reports) == ""
    for report in reports:
        report.faults = []
    assert preflight._wrong_input(reports) == ""


def test_a_gpu_in_use_is_a_fault_of_its_node_even_if_there_is_only_one() -> None:
    assert preflight._wrong_input([Report(0, "n0", faults=["GPU 0 has 10.0 of 80.0 GiB free"])]) == ""


def test_nodes_with_folders_of_their_own_are_waited_for_once(
    nodes: list[ExperimentConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: sum(waits), sleep=waits.append)
    monkeypatch.setattr(preflight, "time", clock)
    monkeypatch.setattr(preflight, "_VISIBLE_S", 30.0)
    reports = [Report(rank, f"n{rank}", token="nobody has written this") for rank in range(20)]
    assert len(preflight._judge(nodes[0], ranks_of(0), reports, [])) == 20
    assert 30 < sum(waits) < 60


def test_a_node_that_holds_the_others_back_is_named() -> None:
    good = {"within": 200.0, "between": 40.0, "all": 30.0}
    rates = {f"n{index}": dict(good) for index in range(5)}
    assert preflight._slow(rates, "cuda") == {}
    rates["n3"]["between"] = 15.0
    assert preflight._slow(rates, "cuda") == {"n3": ["all-reduce with its neighbours: 15.00 GB/s, 40.00 on the others"]}
    rates["n3"] = {**good, "within": 90.0}
    assert preflight._slow(rates, "cuda") == {
        "n3": ["all-reduce among its own ranks: 90.00 GB/s, 200.00 on the others"]
    }
    assert preflight._slow(rates, "cpu") == {}
    # Of two nodes neither is the usual one; both on a network that cannot be meant.
    two = {name: {**good, "between": 0.1} for name in ("n0", "n1")}
    assert list(preflight._slow(two, "cuda")) == ["n0", "n1"]


@pytest.mark.parametrize(
    ("name", "gib", "within", "between", "unfit"),
    [
        ("NVIDIA H100 80GB HBM3", 79.1, 45.0, 40.0, "among its own ranks: 45.000 GB/s, expected 110 or more"),  # PCIe 5
        ("NVIDIA A100-SXM4-80GB", 79.2, 20.0, 20.0, "among its own ranks: 20.000 GB/s, expected 75 or more"),  # PCIe 4
        ("NVIDIA A100-SXM4-40GB", 39.4, 180.0, 2.5, "with its neighbours: 2.500 GB/s, expected 4 or more"),  # Ethernet
        ("NVIDIA H200", 139.8, 300.0, 45.0, None),
        ("NVIDIA H100 PCIe", 79.1, 45.0, 8.0, None),
        ("NVIDIA RTX 6000 Ada Generation", 47.4, 15.0, 8.0, None),
    ],
)
def test_what_all_reduce_must_reach_is_in_the_gpus_row(
    name: str, gib: float, within: float, between: float, unfit: str | None
) -> None:
    """All nodes alike, so that none is far below the others."""
    rates = {node: {"within": within, "between": between, "all": between} for node in ("n0", "n1")}
    found = preflight._slow(rates, "cuda", device_named(name, gib))
    assert found == ({} if unfit is None else {node: [f"all-reduce {unfit}"] for node in rates})


def measured(world: World, ranks_of_node: int) -> dict:
    os.environ["SLURMD_NODENAME"] = f"n{world.rank // ranks_of_node}"
    return preflight._measure(world, dist.HashStore())


def test_bandwidth_is_taken_in_nodes_and_between_all_neighbours() -> None:
    three = run_ranks(3, measured, 1)
    assert three[0] == three[1] == three[2]
    assert list(three[0]) == ["n0", "n1", "n2"]
    for rates in three[0].values():
        assert rates["within"] == 0
        assert rates["between"] > 0 < rates["all"]
    (one, _) = run_ranks(2, measured, 2)
    assert one["n0"]["between"] == 0 < one["n0"]["within"]
