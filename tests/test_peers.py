"""Ranks that end, as those that are left see it."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers import ROOT

from rear_scale import peers as module
from rear_scale.config import InputError
from rear_scale.peers import LostRanks, Peers
from rear_scale.world import Ranks, free_port, joined

BROKEN = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5222")


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Peers]]:
    """Three ranks on two machines."""
    monkeypatch.setattr(module, "_BEAT_S", 0.05)
    store = dist.TCPStore("127.0.0.1", free_port(), None, True)
    three = [Peers(store, rank, 3, f"node{rank // 2}") for rank in range(3)]
    yield three
    for peers in three:
        peers.close()


@pytest.mark.parametrize(
    "error",
    [
        BROKEN,
        RuntimeError("[Rank 0] NCCL watchdog: unhandled system error"),
        dist.DistNetworkError("failed to recv, got 0 bytes"),
        dist.DistBackendError("remote process exited"),
        RuntimeError("Socket Timeout"),
    ],
)
def test_the_rank_that_raised_is_named_with_its_error(ranks: list[Peers], error: RuntimeError) -> None:
    own = FloatingPointError("step 6:\nthe loss is not finite")
    assert ranks[2].explained(own) is own
    for rank, first in ((0, True), (1, False)):
        found = ranks[rank].explained(error)
        assert isinstance(found, LostRanks)
        assert str(found) == (
            "rank 2 on node1 has ended: FloatingPointError: step 6: the loss is not finite. The other ranks end, too"
        )
        assert found.first is first  # one line from each machine
        assert ranks[rank].explained(found) is found


def test_a_rank_without_a_heartbeat_is_named(ranks: list[Peers]) -> None:
    ranks[1].close()
    found = ranks[0].explained(BROKEN)
    assert str(found).startswith("rank 1 on node0 ended without giving a reason (no heartbeat): killed, out of memory")
    # The error of one that has found out is not taken for the cause.
    assert "rank 1 on node0" in str(ranks[2].explained(BROKEN))


def test_errors_of_their_own_stay_as_they_are(ranks: list[Peers]) -> None:
    # All are there: the network alone has failed, and its error is all that is known.
    for error in (BROKEN, ValueError("Connection closed by peer"), RuntimeError("shapes differ"), SystemExit(75)):
        assert ranks[0].explained(error) is error
    assert isinstance(ranks[1].explained(BROKEN), LostRanks)


def test_the_end_of_the_store_is_the_end_of_rank_0(ranks: list[Peers]) -> None:
    class Gone:
        def __getattr__(self, name: str) -> Callable:
            raise dist.DistNetworkError("Broken pipe")

    ranks[2].store = Gone()
    found = ranks[2].explained(BROKEN)
    assert str(found).startswith("rank 0 on node0 or its launcher has ended, and with it the key-value store")


def test_a_port_that_is_taken_is_named_with_a_way_out() -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        ranks = Ranks(0, 0, 2, 2, "127.0.0.1", port, "environment")
        with (
            pytest.raises(InputError, match=rf"^port {port} of .* is taken .*deepspeed --master_port PORT"),
            joined(ranks),
        ):
            pass
    with (
        pytest.raises(
            InputError, match=r"^rank 1 cannot reach rank 0|^not all of 2 ranks connected within 1 s to MASTER_ADDR"
        ),
        joined(Ranks(1, 1, 2, 2, "127.0.0.1", free_port(), "environment"), timeout_s=1),
    ):
        pass


def test_a_slurm_job_takes_a_port_that_is_free(tmp_path: Path) -> None:
    script = (ROOT / "launchers/slurm/common.sh").read_text()
    function = script[script.index("free_port() {") : script.index("export MASTER_PORT")]

    def chosen(job: int) -> int:
        command = f"set -euo pipefail\nSLURM_JOB_ID={job}\n{function}\nfree_port"
        return int(subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout)

    ports = {chosen(job) for job in (1, 2, 1234, 98_765_432)}
    assert len(ports) == 4
    assert 10_000 <= min(ports) < max(ports) < 16_000
    with socket.socket() as one:
        one.bind(("127.0.0.1", chosen(1234)))
        one.listen()
        taken = one.getsockname()[1]
        assert chosen(1234) == taken + 1
