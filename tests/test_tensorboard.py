"""TensorBoard: the same guard as wandb has, its package, and what is written."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from helpers import metrics, run_alone, tiny_config
from made_run import write_sheet
from test_train import run
from test_wandb import never_waits

from rear_scale.config import ExperimentConfig, InputError, from_file, load, to_dict
from rear_scale.run import sink as sink_module
from rear_scale.run import sinks
from rear_scale.run.folder import RunFolder
from rear_scale.run.tensorboard import FOLDER, check_tensorboard


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A torch.utils.tensorboard without the package. What was written is in `entries`; functions may be replaced."""
    entries: list[tuple[Any, ...]] = []
    writer = SimpleNamespace(
        entries=entries,
        add_scalar=lambda name, value, step: entries.append((name, value, step)),
        add_image=lambda name, pixels, step, dataformats: entries.append((name, pixels.shape, step)),
        close=lambda: entries.append(("closed",)),
    )

    def opened(folder: str, **settings: Any) -> SimpleNamespace:
        entries.append((Path(folder).name, settings["purge_step"]))
        return writer

    writer.open = opened
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda folder, **settings: writer.open(folder, **settings)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return writer


def enabled(folder: Path) -> ExperimentConfig:
    cfg = ExperimentConfig()
    cfg.tensorboard.mode, cfg.run.dir = "enabled", str(folder)
    return cfg


def test_metrics_sheets_and_scores_are_written_under_their_names(written: SimpleNamespace, tmp_path: Path) -> None:
    write_sheet(tmp_path / "grids/step_00000004.png")
    (opened,) = sinks.open_sinks(enabled(tmp_path), RunFolder(tmp_path))
    sinks.show_images_on([opened])
    sinks.log_image(4, "samples", tmp_path / "grids/step_00000004.png")
    sinks.show_images_on([])
    opened.log({"step": 5, "loss": 2.5, "mfu": None, "slowest_host": "a", "slowest_rank": 1})
    opened.finish(exit_code=0)
    assert written.entries == [
        (FOLDER, 5), ("samples", (48, 96, 3), 4), ("loss", 2.5, 5), ("slowest_rank", 1, 5), ("closed",),
    ]  # fmt: skip
    written.entries.clear()
    sinks.log_summary(enabled(tmp_path), RunFolder(tmp_path), {"fid/adm": 1.95}, 100)
    assert written.entries == [(FOLDER, None), ("scores/fid/adm", 1.95, 100), ("closed",)]


def raising(*arguments: object, **named: object) -> None:
    raise OSError(28, "No space left on device")


def hanging(*arguments: object, **named: object) -> None:
    threading.Event().wait()


@pytest.mark.parametrize(("part", "fault"), [("open", raising), ("add_scalar", hanging), ("close", raising)])
def test_a_writer_that_fails_or_hangs_costs_a_line(
    written: SimpleNamespace,
    part: str,
    fault: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    setattr(written, part, fault)
    (opened,) = sinks.open_sinks(enabled(tmp_path), RunFolder(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Condition, "wait", never_waits(threading.Condition.wait))
        for step in range(3):
            opened.log({"step": step, "loss": 1.0})
    monkeypatch.setattr(sink_module, "_FINISH_S", 0.5 if fault is hanging else 300)
    opened.finish(exit_code=0)
    said = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("tensorboard: ") and "continues without tensorboard" in line for line in said) == 1


def test_a_run_is_done_whatever_becomes_of_its_events(
    written: SimpleNamespace, tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written.close = raising
    run_alone(run, tiny_config(tmp_path, tokens, "strategy=single", "train.total_steps=2", "tensorboard.mode=enabled"))
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "done"
    losses = [(line["loss"], line["step"]) for line in metrics(tmp_path / "run")]
    assert [entry[1:] for entry in written.entries if entry[0] == "loss"] == losses
    assert "tensorboard: end: OSError: [Errno 28] No space left" in capsys.readouterr().err


def test_a_package_that_is_missing_or_hidden_is_named_before_the_ranks_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "tensorboard", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(
        InputError, match=r"tensorboard, which is not installed\. Install it: pip install 'tensorboard.*disabled$"
    ):
        sinks.check_sinks(enabled(tmp_path), 0)
    (tmp_path / "tensorboard").mkdir()
    sys.path_importer_cache.clear()
    with pytest.raises(InputError, match=f"which is hidden by {tmp_path}/tensorboard, or not installed"):
        check_tensorboard(enabled(tmp_path))
    check_tensorboard(ExperimentConfig())


def test_a_config_that_comes_with_weights_writes_no_events() -> None:
    values = to_dict(load("demo.yaml", ["tensorboard.mode=enabled"]))
    assert from_file(values, "FILE").tensorboard.mode == "disabled"
    assert from_file(values, "FILE", ["tensorboard.mode=enabled"]).tensorboard.mode == "enabled"


def test_tensorboard_reads_what_is_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is an optional extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_sheet(tmp_path / "sheet.png")
    for steps in ((1, 2, 3, 4), (3, 4, 5)):  # the second start continues after step 2
        (opened,) = sinks.open_sinks(enabled(tmp_path), RunFolder(tmp_path))
        for step in steps:
            opened.log({"step": step, "loss": float(10 * len(steps) + step)})
        opened.image(steps[-1], "samples", tmp_path / "sheet.png")
        opened.finish(exit_code=0)
        assert opened.problem is None
        time.sleep(1.1)  # event files are named by the second
    sinks.log_summary(enabled(tmp_path), RunFolder(tmp_path), {"fid/adm": 1.95}, 5)
    events = EventAccumulator(str(tmp_path / FOLDER))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 41),
        (2, 42),
        (3, 33),
        (4, 34),
        (5, 35),
    ]
    assert [(event.step, event.width, event.height) for event in events.Images("samples")] == [(5, 96, 48)]
    assert events.Scalars("scores/fid/adm")[0].value == pytest.approx(1.95)
