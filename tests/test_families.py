"""Every family of configs trains on two processes, at a size for tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import CODEBOOK_DIM, CODEBOOK_SIZE, NUM_CLASSES, NUM_TOKENS, run_ranks

from rear_scale import config
from rear_scale.train.loop import Hooks, train
from rear_scale.train.setup import check_data
from rear_scale.world import World

# One of each architecture, objective, form and conditioning.
FAMILIES = (
    "rear_b.yaml",
    "ar_b.yaml",
    "rar_b.yaml",
    "rear_titok_b64.yaml",
    "rear_alitok_b.yaml",
    "rar_alitok_b.yaml",
    "official/rear_b.yaml",
    "ablation/rear_table3_tied.yaml",
    "ablation/rear_table3_en5_de15.yaml",
    "ablation/rear_table4_eps_0_25.yaml",
    "ablation/rar_table3_spiral_out.yaml",
    "ablation/rar_table2_400_400.yaml",
)
DEPTH, WIDTH, STEPS = 2, 32, 20


def small(name: str, folder: Path, tokens: Path) -> config.ExperimentConfig:
    """A config with its own objective, taps scaled to the depth, on the tiny set."""
    heads = config.load(name).objective.heads
    taps = [
        f"objective.heads.{end}_tap={min(tap, at)}"
        for end, tap, at in (("encode", heads.encode_tap, 1), ("decode", heads.decode_tap, DEPTH))
        if tap is not None
    ]
    values = {
        "model": {"depth": DEPTH, "width": WIDTH, "num_heads": 2, "mlp_width": 64, "num_classes": NUM_CLASSES},
        "tokenizer": {
            "num_tokens": NUM_TOKENS,
            "codebook_size": CODEBOOK_SIZE,
            "codebook_dim": CODEBOOK_DIM,
            "grid": "[4,4]",
            "prefix_tokens": 0,
        },  # fmt: skip
        "data": {"train": tokens, "val": "null", "cache_dir": folder / "cache"},
        "objective.heads": {"hidden": 32},
        "train": {"total_steps": STEPS, "global_batch_size": 24, "micro_batch_size": 6, "precision": "fp32"},
        "optim": {"lr": 5e-3, "warmup_steps": 3},
        "run": {"name": "small", "dir": folder / name.replace("/", "_")},
        "checkpoint": {"every_steps": STEPS},
    }
    overrides = [f"{section}.{field}={value}" for section, fields in values.items() for field, value in fields.items()]
    return config.load(name, [*overrides, *taps, "train.log_every=1", "strategy=ddp"])


def train_all(world: World, folder: Path, tokens: Path) -> None:
    for name in FAMILIES:
        cfg = small(name, folder, tokens)
        data = check_data(cfg, world.ranks)
        train(cfg, data.plan, world, *data.open(world), Hooks())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Path:
    folder = tmp_path_factory.mktemp("families")
    run_ranks(2, train_all, folder, tokens)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_a_few_steps_lower_the_loss(name: str, runs: Path) -> None:
    lines = (runs / name.replace("/", "_") / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss_ar"] for line in lines]
    assert len(losses) == STEPS
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
