"""A model of billions of weights under FSDP2 on 512 ranks, of which one is here and none has memory."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from counting import Collectives
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from rear_scale import config
from rear_scale.config import ExperimentConfig
from rear_scale.model import build_model
from rear_scale.model.memory import memory_per_rank
from rear_scale.model.recompute import prepare_blocks
from rear_scale.parallel.communication import traffic_per_update
from rear_scale.parallel.fsdp import wrap

RANKS = 512
SEVEN_BILLION = [
    "strategy=fsdp2", "train.micro_batch_size=4", "train.global_batch_size=2048",
    "train.activation_checkpointing=full", "model.dropout=0", "model.attn_dropout=0",
]  # fmt: skip


@pytest.fixture
def fake_world():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield
    dist.destroy_process_group()


def rehearse(cfg: ExperimentConfig) -> tuple[dict[str, int], Collectives]:
    """Local bytes after one update, and what it sent."""
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("shard",))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build_model(cfg)
        prepare_blocks(model, cfg)
        wrap(model, mesh, cfg.train.precision, True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        B, N = cfg.train.micro_batch_size, cfg.tokenizer.num_tokens
        with Collectives() as sent:
            output = model(torch.zeros(B, N, dtype=torch.long), torch.zeros(B, dtype=torch.long), None)
            sum(value.float().mean() for value in output.values()).backward()
            gradients = sum(weight.grad.to_local().nbytes for weight in model.parameters())
            optimizer.step()
        held = {
            "weights": sum(weight.to_local().nbytes for weight in model.parameters()),
            "gradients": gradients,
            "optimizer": sum(
                state[kind].to_local().nbytes
                for state in optimizer.state.values()
                for kind in ("exp_avg", "exp_avg_sq")
            ),
        }
    return held, sent


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("depth", [3, pytest.param(40, marks=pytest.mark.long)])
def test_seven_billion_parameters_step_on_512_fake_ranks(fake_world: None, depth: int) -> None:
    """The whole depth takes two minutes; each block is like the others."""
    cfg = config.load("rear_7b.yaml", [*SEVEN_BILLION, f"model.depth={depth}"])
    held, sent = rehearse(cfg)
    predicted, expected = memory_per_rank(cfg, RANKS, 1), traffic_per_update(cfg, RANKS, 1)
    print("per rank, MiB:", {name: round(value / 2**20, 1) for name, value in held.items()})
    print(
        "collectives:", dict(sent.calls), "GiB:", {kind: round(value / 2**30, 2) for kind, value in sent.bytes.items()}
    )
    for name, value in held.items():
        assert value == pytest.approx(getattr(predicted, name), rel=0.15), name
    for kind, payload in expected.payload.items():
        assert sent.calls[kind] == expected.calls[kind], kind
        assert sent.bytes[kind] == pytest.approx(payload, rel=0.01), kind
