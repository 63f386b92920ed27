"""The code of docs/extending.md does what the page says. The metric is run by test_evaluate_seams.py."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from helpers import CODEBOOK_DIM, CODEBOOK_SIZE, NUM_TOKENS, ROOT, tiny_config
from snippets import module_of, snippets

from rear_scale.config import InputError, TokenizerConfig, derive, load
from rear_scale.config.schema import OPTIMIZERS
from rear_scale.model import build_model
from rear_scale.objective import Objective, terms
from rear_scale.optim import groups
from rear_scale.parallel import facts

CPU = torch.device("cpu")


def test_loss_terms(tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terms, "_TERMS", dict(terms._TERMS))
    for number in range(2):
        module_of("## A loss term", number)
    settings = ("objective.terms.z_loss.weight=1e-4", "objective.terms.two_ahead={weight: 0.5, tap: 2}")
    cfg = tiny_config(tmp_path, tokens, "model.dropout=0", "model.attn_dropout=0", *settings)
    model = build_model(cfg)
    model.init_weights(0)
    codebook = torch.randn(CODEBOOK_SIZE, CODEBOOK_DIM, generator=torch.Generator().manual_seed(0))
    objective = Objective(cfg, derive(cfg, 1, 100), codebook, CPU)
    ids = torch.arange(3)
    batch = objective.micro_batch(torch.arange(3 * NUM_TOKENS).view(3, -1) % CODEBOOK_SIZE, ids, ids, ids)
    task = objective.task(batch, 1)
    loss, statistics = objective.loss(model(task.context, batch.classes, batch.class_index, task.order), task)
    found = dict(zip(objective.names, statistics.tolist(), strict=True))
    # Both predict almost uniformly at first: the normalizer is log K, and so is a cross-entropy.
    assert found["loss_z_loss"] == pytest.approx(math.log(CODEBOOK_SIZE) ** 2, rel=0.05)
    assert found["loss_two_ahead"] == pytest.approx(math.log(CODEBOOK_SIZE), rel=0.05)
    parts = sum(found[f"loss_{name}"] for name in ("ar", "encode", "decode"))
    expected = parts + 1e-4 * found["loss_z_loss"] + 0.5 * found["loss_two_ahead"]
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert model.get_parameter("term_heads.two_ahead.weight").grad.abs().sum() > 0


def test_optimizer(tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "_registered", dict(groups._registered))
    monkeypatch.setitem(OPTIMIZERS, "sgd_for_matrices", "rear_scale.optim.sgd_for_matrices")
    module_of("## An optimizer")
    cfg = tiny_config(tmp_path, tokens, "optim.name=sgd_for_matrices")
    model = build_model(cfg)
    rules = groups.rules_of(model, cfg)
    optimizer = groups.make_optimizer(model, rules, cfg.optim, CPU)
    for weight in model.parameters():
        weight.data.fill_(1.0)
        weight.grad = torch.ones_like(weight)
    groups.set_rates(optimizer, 1e-3)
    optimizer.step()
    for name, weight in model.named_parameters():
        is_matrix = name.startswith("blocks.") and weight.ndim == 2
        assert set(optimizer.state[weight]) >= ({"momentum_buffer"} if is_matrix else {"exp_avg", "exp_avg_sq"}), name
        rate, decay = (20e-3, cfg.optim.weight_decay) if is_matrix else (1e-3, 0.0)
        if is_matrix or rules[name].weight_decay == 0:
            assert torch.allclose(weight, torch.full_like(weight, 1 - rate * (1 + decay))), name


def test_script_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "_ROWS", dict(facts._ROWS))
    monkeypatch.delitem(sys.modules, "own_strategy", raising=False)
    started: list[str] = []
    monkeypatch.setattr("runpy.run_path", lambda path, run_name: started.append(path))
    monkeypatch.setattr(sys, "argv", ["my_rear_scale.py", "train", "--config", "rear_b.yaml", "strategy=ddp_fp16"])
    module_of("# Extending")
    assert started == [str(ROOT / "launchers/train.py")]
    assert load("rear_b.yaml", ["strategy=ddp_fp16"]).strategy.name == "ddp_fp16"


def test_strategy() -> None:
    """The page shows the file that test_own_strategy.py trains with."""
    file = (ROOT / "tests/own_strategy.py").read_text().split('"""\n\n', 1)[1]
    assert snippets("## A strategy") == [file]


def test_tokenizer(tmp_path: Path) -> None:
    [code] = snippets("## A tokenizer")
    assert len(code.splitlines()) < 60
    Tiles = module_of("## A tokenizer").Tiles
    Tiles.untrained(TokenizerConfig("tiles", None, 24, 36, 16, 2)).save(str(tmp_path / "tiles.safetensors"))
    tokenizer = Tiles.from_file(str(tmp_path / "tiles.safetensors"))
    greys = torch.linspace(0, 1, 16)[:, None, None, None].expand(16, 3, 24, 24)
    ids = tokenizer.encode(greys)
    assert torch.equal(ids, torch.arange(16)[:, None].expand(16, 36))
    assert torch.allclose(tokenizer.decode(ids), greys, atol=1e-6)
    with pytest.raises(InputError, match=r"tiles.safetensors, made by"):
        Tiles.from_file(str(tmp_path / "none"))
