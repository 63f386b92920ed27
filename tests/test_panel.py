"""Panels of two methods: their commands, results that are there already, and verdicts."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny_config_file, write_checkpoint

from rear_scale.config import InputError, load, to_yaml
from rear_scale.evaluate.result import read_result
from rear_scale.run.stages import StageFolder
from rear_scale.scaling import panel
from rear_scale.scaling.panel import Panel, as_text, main, measures

CTR, DISTANCE = 0.4, 18.0


def _result(ctr: float, distance: float, sampling: int, *, images: int = 100) -> dict:
    """The JSON of an evaluation with a classifier and token predictions."""
    tokens = {"ctr": ctr, "perplexity": 6.0, "sequences": 360, "draws": 0}
    noisy = {**tokens, "ctr": ctr - 0.05, "perplexity": 9.0, "draws": 16}
    of_set = {"count": images, "class_accuracy": 0.9, "frechet_distance": {"validation": distance}}
    return {
        "images": {"features": "a layer", "samples": of_set, "references": {}},
        "tokens": {"val_clean": tokens, "val_noisy": noisy},
        "checkpoint": {"path": "x", "step": 3, "sha256": ["0"]},
        "samples": {"path": "generated", "identity": "i", "images": images, "size": [24, 24], "preprocessing": "as stored",
                    "uint8_rounding": "truncate"},
        "sample": {"seed": sampling},
        "dtype": "fp32",
        "evaluate": {"replace_rate": 0.1, "replace_draws": 16},
        "config": {},
        "seconds": 1.0,
        "provenance": {},
    }  # fmt: skip


@pytest.fixture
def runs(tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three runs of each of two methods, each scored with two sampling seeds; the second has the higher ratio alone."""
    monkeypatch.chdir(tmp_path)
    config = to_yaml(load(str(tiny_config_file(tmp_path, tokens))))
    generator = np.random.default_rng(0)
    for method, gain in (("ar", 0.0), ("rear", 0.1)):
        for seed in range(3):
            run = tmp_path / f"runs/{method}_seed{seed}"
            write_checkpoint(run, 3)
            (run / "config.yaml").write_text(config)
            ctr, distance = CTR + gain + generator.normal(0, 0.002), DISTANCE + generator.normal(0, 1.0)
            for sampling, name in enumerate(("result.json", "result_seed=1.json")):
                scores = _result(ctr, distance + generator.normal(0, 0.3), sampling)
                (run / name).write_text(json.dumps(scores))
    return tmp_path


def test_results_of_runs_that_are_there_are_compared(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["runs/ar_seed*", "runs/rear_seed*", "--samplings", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("rear against ar; training seeds: 3 of ar, 3 of rear")
    found = {one["measure"]: one for one in json.loads((runs / "runs/panel_ar_rear/panel.json").read_text())}
    verdicts = {name: one["difference"]["verdict"] for name, one in found.items()}
    assert verdicts["ctr"] == verdicts["ctr_noisy"] == "larger"
    assert verdicts["classifier_frechet_distance/validation"] == verdicts["perplexity"] == "not distinguishable"
    assert {*found} == {
        "ctr",
        "ctr_noisy",
        "perplexity",
        "perplexity_noisy",
        "class_accuracy",
        "classifier_frechet_distance/validation",
    }
    # A ratio does not depend on sampling: one score of each training seed.
    assert [len(row) for row in found["ctr"]["methods"]["ar"]["scores"]] == [1, 1, 1]
    assert found["ctr"]["methods"]["ar"]["sampling_sd"] is None
    assert 0 < found["classifier_frechet_distance/validation"]["methods"]["ar"]["sampling_sd"] < 1
    rows = list(csv.DictReader((runs / "runs/panel_ar_rear/panel.csv").open()))
    assert sum(row["measure"] == "classifier_frechet_distance/validation" for row in rows) == 2 * 3 * 2
    assert any("not distinguishable; " in line and "seeds each" in line for line in lines)


def test_missing_results_of_runs_are_scored_once(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = runs / "runs/rear_seed1/result_seed=1.json"
    text = lost.read_text()
    lost.unlink()
    made = runs / "out/results/rear_1_sampling1.json"
    ran: list[str] = []

    def run(self: StageFolder, stage: panel.Stage, place: str = "") -> None:
        ran.append(stage.line)
        made.parent.mkdir(parents=True, exist_ok=True)
        made.write_text(text)

    monkeypatch.setattr(StageFolder, "run", run)
    main(["runs/ar_seed*", "runs/rear_seed*", "--out", "out", "--processes", "1"])
    assert ran == [
        "python launchers/evaluate.py --checkpoint runs/rear_seed1 --out out/results/rear_1_sampling1.json sample.seed=1"
    ]


def test_the_commands_of_configs_are_those_that_anybody_types(
    runs: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config_file(runs, tokens)
    other = runs / "other.yaml"
    other.write_text(config.read_text())
    words = [
        str(config),
        str(other),
        "--seeds",
        "2",
        "--out",
        "out",
        "--dry-run",
        "train.total_steps=3",
        "--processes",
        "2",
    ]
    main(words)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 2 * 3
    train = f"torchrun --nproc-per-node 2 launchers/train.py --config {config} train.total_steps=3 run.name=tiny_seed1"
    assert lines[3] == f"{train} run.dir=out/tiny_seed1 run.seed=1"
    score = "torchrun --nproc-per-node 2 launchers/evaluate.py --checkpoint out/tiny_seed1 --out out/results"
    assert lines[4:6] == [f"{score}/tiny_seed1_sampling{seed}.json sample.seed={seed}" for seed in range(2)]
    assert not (runs / "out").exists()
    # Another setting trains again, and with it everything is scored again.
    stages = [_stages(config, steps) for steps in (3, 4)]
    assert all(one.key != two.key for one, two in zip(*stages, strict=True))


def _stages(config: Path, steps: int) -> list[panel.Stage]:
    made = Panel(Path("out"), 1, 1, (f"train.total_steps={steps}",))
    (stages,) = made.lanes(made._method(str(config), "tiny", 1))
    return stages


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/ar_seed*", "runs/ar_seed*"], "are the same runs"),
        (["runs/ar_seed*", "runs/none*"], "no run folder is named runs/none"),
        (["runs/ar_seed*", "none.yaml"], "none.yaml: no such file"),
        (["runs/ar_seed*", "runs/rear_seed*", "--samplings", "0"], "--samplings=0 must be at least 1"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_run(runs: Path, words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("*", r"\*")):
        main(words)
    assert not [*runs.glob("runs/panel*")]


def test_results_that_do_not_compare_are_refused(runs: Path) -> None:
    path = runs / "runs/rear_seed2/result.json"
    values = json.loads(path.read_text())
    values["samples"]["images"] = 50
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match="do not compare: images is 100 in some and 50 in others"):
        main(["runs/ar_seed*", "runs/rear_seed*"])


def test_results_of_averages_and_of_other_sampling_are_not_taken(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder may hold results of --ema and --sweep beside or instead of its own."""
    panel_of = Panel(Path("out"), 2, 1, ())
    run = runs / "runs/rear_seed0"
    method = panel_of._method("runs/rear_seed*", "rear", 0)
    held = panel_of._held(method, run, 1)
    assert held == run / "result_seed=1.json"
    values = json.loads(held.read_text())
    for change in (
        {"sample": {"seed": 1, "guidance": {"schedule": "constant", "scale": 9.0, "power": 1.0}}},
        {"checkpoint": {**values["checkpoint"], "average": {"sigma_rel": 0.1}}},
        {"sample": None},
    ):
        held.write_text(json.dumps({**values, **change}))
        assert panel_of._held(method, run, 1) is None, change
    held.write_text(json.dumps(values))
    values["tokens"]["val_clean"]["perplexity"] = None
    held.write_text(json.dumps(values))
    main(["runs/ar_seed*", "runs/rear_seed*"])
    out, err = capsys.readouterr()
    assert "left out: perplexity, which is nan of runs/rear_seed0" in err
    assert "perplexity_noisy" in out
    assert "perplexity " not in out


def test_a_run_without_a_checkpoint_is_named(runs: Path) -> None:
    (runs / "runs/ar_seed7").mkdir()
    (runs / "runs/ar_seed7/config.yaml").write_text("run: {}\n")
    with pytest.raises(InputError, match="runs/ar_seed7 holds no checkpoint"):
        main(["runs/ar_seed*", "runs/rear_seed*"])


def test_measures_of_a_result(runs: Path) -> None:
    found = measures(read_result(runs / "runs/ar_seed0/result.json"))
    assert [*found][:4] == ["ctr", "ctr_noisy", "perplexity", "perplexity_noisy"]
    assert found["class_accuracy"] == 0.9
    assert as_text([]) == "the results share no measure"
