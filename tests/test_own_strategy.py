"""A strategy from a file outside of the package: all that it takes is that this file is imported."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
from helpers import TIMES, metrics, run_ranks, tiny_config, tiny_config_file

from rear_scale import config
from rear_scale.config import InputError
from rear_scale.parallel import facts
from rear_scale.parallel.communication import traffic_per_update
from rear_scale.scaling import output
from rear_scale.scaling.command import make_plan
from rear_scale.train import dry_run, setup
from rear_scale.train.loop import Hooks, train
from rear_scale.world import World, discover

OWN = "strategy=ddp_fp16"


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Registered for one test: others expect the rows of the package alone."""
    monkeypatch.setattr(facts, "_ROWS", dict(facts._ROWS))
    monkeypatch.delitem(sys.modules, "own_strategy", raising=False)
    return importlib.import_module("own_strategy")


def _train(world: World, folder: Path, tokens: Path) -> None:
    """Four steps at once, four steps in two starts, and four of ddp."""
    importlib.import_module("own_strategy")
    for name, overrides in (
        ("unbroken", [OWN]),
        ("resumed", [OWN, "train.stop_at_step=2"]),
        ("resumed", [OWN]),
        ("ddp", ["strategy=ddp"]),
    ):
        (folder / name).mkdir(exist_ok=True)
        cfg = tiny_config(folder / name, tokens, *overrides, "train.total_steps=4", "checkpoint.every_steps=2")
        data = setup.check_data(cfg, world.ranks)
        train(cfg, data.plan, world, *data.open(world), Hooks())


def test_a_strategy_in_a_file_of_its_own_trains_and_resumes(tmp_path: Path, tokens: Path) -> None:
    run_ranks(2, _train, tmp_path, tokens)
    unbroken, resumed, ddp = (
        [{key: value for key, value in line.items() if key not in TIMES} for line in metrics(tmp_path / name / "run")]
        for name in ("unbroken", "resumed", "ddp")
    )
    assert len(unbroken) == 4
    assert unbroken == resumed
    # Gradients in 16 bits are rounded, so this is another engine than ddp, and close to it.
    assert [line["loss"] for line in unbroken] != [line["loss"] for line in ddp]
    assert [line["loss"] for line in unbroken] == pytest.approx([line["loss"] for line in ddp], rel=1e-3)


def test_a_strategy_in_a_file_of_its_own_is_planned_and_checked(
    tmp_path: Path, tokens: Path, own: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [OWN, "cluster.gpus=8"]
    plan = make_plan("rear_b.yaml", config.load("rear_b.yaml", overrides), overrides)
    assert plan.best.name == "ddp_fp16"
    assert f" {OWN} " in plan.command
    assert "ddp_fp16" in output.as_text(plan)
    plain, ours = (
        traffic_per_update(config.load("rear_b.yaml", [f"strategy={name}"]), 8, 1) for name in ("ddp", "ddp_fp16")
    )
    assert ours.calls == plain.calls
    assert ours.bytes == plain.bytes // 2
    dry_run.show(config.load(str(tiny_config_file(tmp_path, tokens)), [OWN, "cluster.gpus=2"]), discover({}))
    assert "ranks: 2, strategy ddp_fp16, fp32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["strategy.cpu_offload=true"], "is offered by zero1, zero2 and zero3, not by strategy=ddp_fp16"),
        (["train.precision=bf16", "train.fp8=true"], "is not offered with strategy=ddp_fp16: its engine has not been"),
        ([], "strategy=ddp_fp16 needs at least 2 ranks, but 1 were started"),
    ],
)
def test_what_its_row_does_not_offer_is_refused(
    tmp_path: Path, tokens: Path, own: ModuleType, overrides: list[str], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        setup.check_data(tiny_config(tmp_path, tokens, "strategy.name=ddp_fp16", *overrides), discover({}))


def test_an_unknown_strategy_is_not_registered_by_accident(own: ModuleType) -> None:
    with pytest.raises(ValueError, match="strategy=ddp_fp16 is registered already, with other facts"):
        facts.register(facts.Facts(name="ddp_fp16", engine="x:Y", formulas="x", title="another"))
