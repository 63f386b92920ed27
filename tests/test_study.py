"""Studies: grids become cells, cells become commands that continue after a kill, and results become one table."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT, start, tiny_config_file, write_token_shards
from PIL import Image

from rear_scale.config import CONFIG_DIR, InputError, load, to_yaml
from rear_scale.evaluate.result import ClassifierScores, ImageScores, Result, SamplesRecord, SetScores
from rear_scale.scaling import study, study_summary
from rear_scale.scaling.guidance import around
from rear_scale.scaling.study_collect import collect
from rear_scale.scaling.study_figures import Curve, Gap, loss_at
from rear_scale.scaling.study_file import read_study
from rear_scale.scaling.study_grid import Cell, expand, identity, varied
from rear_scale.scaling.study_plan import dry_run
from rear_scale.scaling.study_run import Runner
from rear_scale.scaling.study_summary import write_summary

NAMES = sorted(path.stem for path in (CONFIG_DIR / "study").glob("*.yaml"))
SCALES = [
    (name, scale)
    for name in NAMES
    for scale in yaml.safe_load((CONFIG_DIR / f"study/{name}.yaml").read_text()).get("scales", {})
]

# Stands before `launchers/NAME.py`: notes the command, makes what it would make, and fails or kills where the folder says so.
FAKE = """
import json, os, shutil, signal, sys
from pathlib import Path

here, words = Path(__file__).parent, sys.argv[1:]
values = dict(word.split("=", 1) for word in words if "=" in word)
name = Path(words[0]).stem
run = Path(values["run.dir"] if name == "train" else words[words.index("--checkpoint") + 1])
with open(here / "ran", "a") as file:
    file.write(f"{name} {run.name}\\n")
if (here / f"fail-{run.name}").exists():
    sys.exit(2)
if (here / f"kill-{run.name}").exists():
    (here / f"kill-{run.name}").unlink()
    os.kill(os.getppid(), signal.SIGKILL)
def write_distance(out, scale, power):
    scores = json.loads((here / "result.json").read_text())
    scores["images"]["samples"]["frechet_distance"]["validation"] = (scale - 5) ** 2 + (power - 1.5) ** 2
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(scores))


if "--sweep" in words:
    scales, powers = (words[at + 1].partition("=")[2].split(",") for at, word in enumerate(words) if word == "--sweep")
    for scale in scales:
        for power in powers:
            write_distance(run / f"result_guidance.scale={scale}_guidance.power={power}.json", float(scale), float(power))
elif "sample.guidance.power" in values:
    scale, power = (float(values[f"sample.guidance.{key}"]) for key in ("scale", "power"))
    write_distance(Path(words[words.index("--out") + 1]), scale, power)
elif name == "train":
    (run / "checkpoints/latest").mkdir(parents=True)
    (run / "status.json").write_text(json.dumps({"state": "done", "step": 12, "reason": ""}))
    lines = [{"step": step, "images_seen": 12 * step, "loss_ar": 3 / step, "step_time_s": 0.1, "images_per_s": 120.0,
              "images_per_s_per_gpu": 120.0} for step in (4, 8, 12)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
    (run / "starts.jsonl").write_text(json.dumps({"commit": "abc", "world_size": 1, "device": "cpu", "host": "here"}) + "\\n")
else:
    out = Path(words[words.index("--out") + 1]) if "--out" in words else run / "result.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(here / ("unguided.json" if "sample.guidance.scale=1.0" in words else "result.json"), out)
"""


def write_result(path: Path, perplexity: float, distance: float, scale: float) -> None:
    """A result of validation tokens and a classifier's distance, of samples with a scale of guidance."""
    scores = SetScores(
        10, {"class_accuracy": 0.9}, {"frechet_distance": {"validation": distance, "training": distance / 2}}
    )
    tokens = {
        "val_clean": {"ctr": 0.4, "perplexity": perplexity},
        "val_noisy": {"ctr": 0.3, "perplexity": 2 * perplexity},
    }
    result = Result(
        images=ImageScores(classifier=ClassifierScores("a layer", scores, {})),
        tokens=tokens,
        checkpoint=None,
        samples=SamplesRecord("generated", "", 10, [16, 16], "", "truncate"),
        sample={"guidance": {"schedule": "constant", "scale": scale, "power": 1.0}},
        dtype="fp32",
        evaluate={"reference": {"validation": "a", "training": "b"}},
        config=None,
        seconds=1.0,
        provenance={},
    )
    path.write_text(json.dumps(result.to_json()))


def study_file(folder: Path, tokens: Path, **fields: Any) -> Path:
    """A study of the tiny config, whose commands the fake program stands for."""
    base = tiny_config_file(folder, tokens)
    (folder / "fake.py").write_text(FAKE)
    write_result(folder / "result.json", 5.0, 20.0, scale=2.0)
    write_result(folder / "unguided.json", 5.0, 30.0, scale=1.0)
    values = {
        "title": "a study",
        "base": str(base),
        "start": f"python {folder / 'fake.py'}",
        "overrides": ["strategy=single"],
        "grids": {"main": ["objective=ar,rear", "run.seed=range(2)"]},
        "commands": ["train", "evaluate"],
        **fields,
    }
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def runner_of(path: Path, *more: str, scale: str | None = None) -> Runner:
    found = read_study(str(path), scale)
    return Runner(found, expand(found, more), tuple(found.start.split()))


def names(cells: list[Cell]) -> list[str]:
    return [cell.name for cell in cells]


def ran(folder: Path) -> list[str]:
    """The commands since the last call."""
    log = folder / "ran"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


def test_grids_become_cells_in_hydras_sweep_syntax(here: Path, tokens: Path) -> None:
    choices = {
        "size": {"small": ["model.width=32"], "large": ["model.width=64", "model.depth=3"]},
        "row": {"a": [], "b": {"config": "demo.yaml", "overrides": ["strategy=single"]}, "c": None},
    }
    grids = {
        "main": ["objective=ar,rear", "size=glob(*)", "run.seed=range(2)"],
        "length": ["objective=rear", "size=small", "run.seed=0", "train.total_steps=choice(6,12)"],
        "rows": ["row=glob(*)"],
    }
    path = study_file(here, tokens, choices=choices, grids=grids)
    cells = expand(read_study(str(path)))
    by_name = {cell.name: cell for cell in cells}
    assert names(cells) == [
        *(
            f"{objective}-{size}-seed{seed}"
            for objective in ("ar", "rear")
            for size in ("small", "large")
            for seed in (0, 1)
        ),
        "rear-small-seed0-total_steps6",
        "b",
    ]  # 12 steps and row a are cells of the main grid
    assert by_name["rear-small-seed0"].grids == ("main", "length", "rows")
    large = by_name["rear-large-seed1"]
    assert (large.cfg.model.width, large.cfg.model.depth, large.cfg.run.seed) == (64, 3, 1)
    assert large.overrides == ("strategy=single", "objective=rear", "model.width=64", "model.depth=3", "run.seed=1")
    assert by_name["ar-small-seed0"].cfg.objective.heads.encode_tap is None
    assert by_name["b"].cfg.model.depth == 4
    columns = varied(cells)
    assert columns["train.total_steps"][8:] == [6, 600]
    assert [*columns][:3] == ["objective", "size", "row"]
    # The user's words replace those of a grid, and are added to the others.
    more = expand(read_study(str(path)), ["run.seed=5", "optim.lr=1e-3,2e-3"])
    assert {cell.cfg.run.seed for cell in more} == {5}
    assert len({identity(cell.cfg) for cell in more}) == len(more) == 2 * (4 + 1 + 1)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"grids": {"main": ["run.seed=interval(0,1)"]}}, "Write the values out: run.seed=A,B,C"),
        ({"grids": {"main": ["run.seed"]}}, "is not a word of a grid"),
        ({"grids": {"main": ["run.seed=0,1", "run.seed=2"]}}, "has run.seed twice"),
        ({"grids": {"main": ["model.depht=1,2"]}}, r"model.depht.*did you mean model.depth"),
        ({"grids": {"main": ["size=big"]}, "choices": {"size": {"small": []}}}, "size=big is not one of small"),
        ({"grids": {"main": ["run.seed=glob(*)"]}}, r"glob\(\) is for choices and groups"),
        ({"grids": {}}, "has no cells"),
        ({"grid": {}}, "grid is not a field of a study; did you mean grids?"),
        ({"commands": ["trian"]}, "trian, which is not one of .*did you mean train?"),
        ({"overrides": "a=b"}, "overrides is not a list of texts"),
        ({"base": "{size}.yaml"}, "needs the word size="),
        ({"machine": {"name": "x"}}, "machine has the fields name, not name, gflops_per_s"),
    ],
)
def test_a_study_that_cannot_be_read_is_one_line(
    here: Path, tokens: Path, fields: dict[str, Any], expected: str
) -> None:
    with pytest.raises(InputError, match=expected) as error:
        expand(read_study(str(study_file(here, tokens, **fields))))
    assert "\n" not in str(error.value)


def test_a_scale_stands_in_the_place_of_the_full_study(here: Path, tokens: Path) -> None:
    scales = {"tiny": {"grids": {"main": ["size=a"]}, "choices": {"size": {"a": ["run.seed=3"]}}, "overrides": []}}
    path = study_file(here, tokens, scales=scales, overrides=["strategy=ddp"], choices={"size": {"b": []}})
    found = read_study(str(path), "tiny")
    assert (found.name, found.folder) == ("mine", Path("runs/study/mine_tiny"))
    (cell,) = expand(found)
    assert cell.overrides == ("run.seed=3",)
    with pytest.raises(InputError, match="--scale tinny is not a scale of .*; did you mean tiny?"):
        read_study(str(path), "tinny")


def test_a_study_of_64_cells_is_planned_in_seconds(here: Path, tokens: Path) -> None:
    """The limit is 20 seconds of a quiet machine; process time, because other tests run beside this one."""
    grids = {"main": ["objective=ar,rear", "model.depth=1,2,3,4", "train.total_steps=6,12", "run.seed=range(4)"]}
    runner = runner_of(study_file(here, tokens, grids=grids))
    started = time.process_time()
    text = dry_run(runner.study, runner.cells, [cell.name == "ar-depth1-total_steps6-seed0" for cell in runner.cells])
    assert time.process_time() - started < 10
    assert len(runner.cells) == 64
    lines = text.splitlines()
    assert "64 cells, each: train, evaluate" in lines[1]
    assert lines[4].endswith("done")
    assert sum(line.endswith("done") for line in lines) == 1
    images = 32 * 12 * 6 + 32 * 12 * 12
    assert f"training in all: {images:,} images" in text
    assert "law of parameters, images, different images (repeated_data): condition number" in text


def test_a_grid_that_tells_no_law_apart_is_warned_of(here: Path, tokens: Path) -> None:
    runner = runner_of(study_file(here, tokens, grids={"main": ["model.depth=1,2"]}))
    assert "warning: this grid does not tell the constants of the law apart" in dry_run(
        runner.study, runner.cells, [False] * 2
    )


def test_finished_cells_are_not_run_again_and_a_failed_one_stops_no_other(here: Path, tokens: Path) -> None:
    path = study_file(here, tokens)
    (here / "fail-ar-seed1").touch()
    runner = runner_of(path)
    cells = ["ar-seed0", "ar-seed1", "rear-seed0", "rear-seed1"]
    failed = runner.run()
    assert [*failed] == ["ar-seed1"]
    assert "'train ar-seed1' failed with exit code 2" in failed["ar-seed1"]
    assert ran(here) == [
        f"{command} {name}"
        for name in cells
        for command in ("train", "evaluate")
        if (command, name) != ("evaluate", "ar-seed1")
    ]
    states = {row["cell"]: row["state"] for row in collect(runner).rows}
    assert states["ar-seed1"].startswith("failed: ")
    assert [states[name] for name in cells if name != "ar-seed1"] == ["done"] * 3
    (here / "fail-ar-seed1").unlink()
    assert runner.run() == {}
    assert ran(here) == ["train ar-seed1", "evaluate ar-seed1"]
    assert runner.run() == {}
    assert ran(here) == []
    # The words in front of a command are not a part of what was done.
    assert Runner(runner.study, runner.cells, ("torchrun",)).run() == {}
    assert ran(here) == []
    # A result that is lost is made again, and nothing else.
    (runner.run_folder(runner.cells[0]) / "result.json").unlink()
    assert runner.run() == {}
    assert ran(here) == ["evaluate ar-seed0"]


@pytest.mark.long  # two starts; the test before shows the same in one process
def test_a_killed_study_continues_with_the_same_command(here: Path, tokens: Path) -> None:
    """As a process of its own, whose third cell kills it; and a failing cell gives exit code 1."""
    words = ("python", ROOT / "launchers/study.py", "--config", study_file(here, tokens))
    (here / "kill-rear-seed0").touch()
    with start(*words, cwd=here, stderr=subprocess.PIPE, text=True) as process:
        process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert ran(here) == [
        "train ar-seed0",
        "evaluate ar-seed0",
        "train ar-seed1",
        "evaluate ar-seed1",
        "train rear-seed0",
    ]
    (here / "fail-rear-seed1").touch()
    shutil.rmtree(here / "runs/study/mine/rear-seed0", ignore_errors=True)  # the fake does not resume
    with start(*words, cwd=here, stderr=subprocess.PIPE, text=True) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert ran(here) == ["train rear-seed0", "evaluate rear-seed0", "train rear-seed1"]
    assert "failed: rear-seed1: the stage 'train rear-seed1' failed with exit code 2" in err
    assert "[1/4] train ar-seed0: finished before" in err
    with open(here / "runs/study/mine/study.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"].partition(":")[0] for row in rows] == ["done", "done", "done", "failed"]


def test_rows_have_what_the_runs_have(here: Path, tokens: Path) -> None:
    path = study_file(here, tokens, commands=["train", "evaluate", "unguided"])
    runner = runner_of(path)
    assert runner.run() == {}
    collected = collect(runner)
    rows = list(csv.DictReader(collected.text().splitlines()))
    assert [*rows[0]] == [
        "cell", "objective", "run.seed", "parameters", "images", "unique_images", "flops", "gpu_hours",
        "loss", "loss_noisy", "ctr", "ctr_noisy", "perplexity", "perplexity_noisy", "fid", "fid_guided",
        "class_accuracy_guided", "classifier_frechet_distance_guided", "classifier_frechet_distance_guided/training",
        "class_accuracy", "classifier_frechet_distance", "classifier_frechet_distance/training",
        "commit", "config_sha256", "run", "state",
    ]  # fmt: skip
    row = rows[3]
    assert (row["cell"], row["objective"], row["run.seed"], row["state"]) == ("rear-seed1", "rear", "1", "done")
    assert float(row["loss"]) == pytest.approx(math.log(5))
    assert float(row["loss_noisy"]) == pytest.approx(math.log(10))
    assert (row["classifier_frechet_distance"], row["classifier_frechet_distance_guided"], row["fid"]) == (
        "30.0",
        "20.0",
        "",
    )
    assert (row["images"], row["unique_images"], row["gpu_hours"]) == ("144", "100", "")
    assert row["config_sha256"] == identity(runner.cells[3].cfg)


def test_runs_of_others_are_found_by_their_config(here: Path, tokens: Path) -> None:
    runner = runner_of(study_file(here, tokens))
    other = here / "elsewhere/deep/rear_of_somebody"
    other.mkdir(parents=True)
    # Another name, place and micro-batch, and a copy of the data; the same training.
    copy = shutil.copytree(tokens, here / "copy")
    given = [
        *runner.cells[2].overrides,
        "run.name=x",
        f"run.dir={other}",
        f"data.train={copy}",
        "train.micro_batch_size=3",
    ]
    (other / "config.yaml").write_text(to_yaml(load(runner.cells[2].config, given)))
    (other / "starts.jsonl").write_text(json.dumps({"commit": "abc"}) + "\n")
    (other / "status.json").write_text(json.dumps({"state": "done", "step": 12, "reason": ""}))
    write_result(other / "result.json", 4.0, 10.0, scale=1.0)
    rows = {row["cell"]: row for row in collect(runner, [here / "elsewhere"]).rows}
    assert (rows["rear-seed0"]["run"], rows["rear-seed0"]["commit"]) == (
        "elsewhere/deep/rear_of_somebody" and str(other),
        "abc",
    )
    assert (rows["rear-seed0"]["state"], rows["rear-seed0"]["perplexity"]) == ("done", 4.0)
    assert [rows[name]["state"] for name in ("ar-seed0", "ar-seed1", "rear-seed1")] == ["missing"] * 3
    # Another learning rate, or other data, is another run.
    for text in ("optim.lr=1e-4", f"data.train={write_token_shards(here / 'others', 50)}"):
        (other / "config.yaml").write_text(to_yaml(load(runner.cells[2].config, [*given, text])))
        assert {row["state"] for row in collect(runner, [here / "elsewhere"]).rows} == {"missing"}
    with pytest.raises(InputError, match="--runs nowhere is not a folder"):
        collect(runner, [Path("nowhere")])


def test_cells_that_differ_in_sampling_alone_are_trained_once(here: Path, tokens: Path) -> None:
    runner = runner_of(study_file(here, tokens, grids={"main": ["sample.guidance.scale=1.5,2.5"]}))
    # A task of a job array that needs the weights of another one's cell makes them, if nobody has.
    assert replace(runner, only="scale2.5").run() == {}
    assert ran(here) == ["train scale1.5", "evaluate scale1.5"]
    assert runner.run() == {}
    assert ran(here) == ["evaluate scale1.5"]
    line = runner.stages_of(runner.cells[1])[0].line
    assert line.endswith("--out runs/study/mine/scale2.5/result.json sample.guidance.scale=2.5")
    assert [row["state"] for row in collect(runner).rows] == ["done", "done"]


def test_the_summary_has_gaps_laws_and_figures(here: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of runs whose losses follow a known law, with a gap of 0.1 between AR and reAR in each seed."""
    monkeypatch.setattr(study_summary, "_DRAWS", 5)
    words = ["objective=ar,rear", "model.depth=1,2,3,4,5", "run.seed=range(2)"]
    runner = runner_of(study_file(here, tokens, grids={"main": words}))
    collected = collect(runner)
    for row in collected.rows:
        loss = 1 + 50 / math.sqrt(row["parameters"]) + 0.1 * (row["objective"] == "ar") + 0.001 * row["run.seed"]
        row |= {"state": "done", "loss": loss, "images": 144, "unique_images": 100, "flops": 1e6 * row["parameters"]}
        row |= {"class_accuracy": 1 / loss, "commit": "abc"}
        run = Path(row["run"])
        run.mkdir(parents=True)
        lines = [{"step": step, "images_seen": 12 * step, "loss_ar": loss + 1 / step} for step in range(1, 13)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "starts.jsonl").write_text(json.dumps({"world_size": 2, "device": "a CPU", "host": "here"}) + "\n")
    text = write_summary(runner, collected, "python launchers/study.py --config mine.yaml").read_text()
    assert "- command: `python launchers/study.py --config mine.yaml`" in text
    assert "- commit: abc\n- ranks and machine: 2 x a CPU (here)" in text
    gaps = re.findall(r"^\| loss \| (\d) \| [\d,]+ \| 2 \| 0\.1 \| 0\.1 to 0\.1 \|$", text, re.MULTILINE)
    assert gaps == list("12345")
    laws = re.findall(
        r"^\| (ar|rear) \| loss \| E = ([\d.]+), A = ([\d.]+), a = ([\d.]+) \|.*: 2 of 2 inside \|$", text, re.MULTILINE
    )
    assert [objective for objective, *_ in laws] == ["ar", "rear"]
    assert [float(value) for value in laws[1][1:]] == pytest.approx([1, 50, 0.5], rel=0.1)
    for name in ("loss_curves", "scores_by_size", "gap", "isoflop"):
        assert f"({name}.png)" in text
        assert Image.open(here / f"runs/study/mine/{name}.png").size[0] > 500


def test_a_profile_reads_the_curves_at_equal_compute() -> None:
    curve = Curve("a", 10, 2.0, [10, 100, 1000], [3.0, 2.0, 1.0])
    assert loss_at(curve, 2 * math.sqrt(10 * 100)) == pytest.approx(2.5)
    assert loss_at(curve, 19) is loss_at(curve, 2001) is None
    assert loss_at(curve, 20) == 3.0
    assert Gap("", 1, 1.0, [1.0]).half_width is None
    # Student's t of two degrees of freedom: 2.920 x 1 / sqrt(3)
    assert Gap("", 1, 1.0, [1.0, 2.0, 3.0]).half_width == pytest.approx(1.6859, abs=1e-4)


def test_a_search_for_guidance_refines_around_its_best_and_confirms_it(
    here: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = {
        "scale": [2, 4, 8],
        "power": [1, 2],
        "images": 10,
        "rounds": 2,
        "confirm": 20,
        "score": "classifier_frechet_distance",
    }
    path = str(study_file(here, tokens, guidance=space))
    run = here / "somebody"
    study.main(["--config", path, "--checkpoint", str(run)])
    out = capsys.readouterr().out
    assert "sample.guidance.schedule=power_cosine sample.guidance.scale=5 sample.guidance.power=1.5" in out
    assert "classifier_frechet_distance on 20 samples: 0.0000" in out
    assert ran(here) == ["evaluate somebody"] * 4
    with open(run / "guidance/guidance.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["scale"], row["power"]) for row in rows[:6]} == {(s, p) for s in "248" for p in "12"}
    assert (rows[-1]["scale"], rows[-1]["power"], rows[-1]["images"], float(rows[-1]["score"])) == (
        "5",
        "1.5",
        "20",
        0.0,
    )
    study.main(["--config", path, "--checkpoint", str(run)])
    assert ran(here) == []
    assert around(4.0, [4.0, 8.0]) == [2.0, 4.0, 6.0]
    assert around(8.0, [4.0, 8.0]) == [6.0, 8.0, 10.0]
    refused: tuple[tuple[dict[str, Any], list[str], str], ...] = (
        ({"guidance": space}, [], "Name it: --checkpoint RUN"),
        ({"guidance": {**space, "scale": [0]}}, ["--checkpoint", "x"], "guidance.scale="),
        ({"guidance": {"scale": [1]}}, ["--checkpoint", "x"], "guidance needs scale"),
        ({}, ["--checkpoint", "x"], "does not have. Leave it out"),
    )
    for fields, words, expected in refused:
        with pytest.raises(InputError, match=expected):
            study.main(["--config", str(study_file(here, tokens, **fields)), *words])


def test_unfinished_cells_are_submitted_as_one_job_array(
    here: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = study_file(here, tokens, grids={"main": ["run.seed=range(3)"]})
    program = here / "bin/sbatch"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {here}/submitted\necho Submitted batch job 7\n')
    program.chmod(0o755)
    words = ["--config", str(path), "run.seed=range(3)"]
    monkeypatch.setenv("PATH", str(here / "nowhere"))
    with pytest.raises(InputError, match="needs the program sbatch.*type: sbatch --array=0-2"):
        study.main([*words, "--slurm"])
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    study.main([*words, "--slurm", "--nodes", "2"])
    runner = runner_of(path)
    # A task of the array runs one cell, started in its own way, and a later submission has the others alone.
    study.main([*words, "--cell", "1", "--start", f"python {here / 'fake.py'}"])
    assert ran(here) == ["train seed1", "evaluate seed1"]
    study.main([*words, "--slurm"])
    assert runner.run() == {}
    with pytest.raises(InputError, match="all 3 cells are done"):
        study.main([*words, "--slurm"])
    end = f"launchers/slurm/study.sbatch --config {path} run.seed=range(3)"
    assert (here / "submitted").read_text().splitlines() == [
        f"--array=0-2 --nodes 2 {end}",
        f"--array=0,2 --nodes 1 {end}",
    ]


@pytest.mark.long
def test_two_real_cells_go_on_after_a_kill_and_end_as_undisturbed_ones(here: Path, tokens: Path) -> None:
    """The launchers themselves, on the tiny set: killed in the middle of the second cell's training."""
    fields: dict[str, Any] = {
        "start": "python",
        "commands": ["train"],
        "overrides": ["strategy=single", f"data.val={tokens}", "train.val_every=4", "train.total_steps=40"],
        "grids": {"main": ["objective=ar,rear"]},
    }
    rows = {}
    for name in ("undisturbed", "killed"):
        folder = here / name
        folder.mkdir()
        words = ("python", ROOT / "launchers/study.py", "--config", study_file(folder, tokens, **fields))
        if name == "killed":
            with start(*words, cwd=folder, fresh=True, stderr=subprocess.DEVNULL) as process:
                log, deadline = folder / "runs/study/mine/rear/metrics.jsonl", time.monotonic() + 200
                while not (log.exists() and len(log.read_text().splitlines()) >= 6):
                    assert process.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
                process.kill()
        with start(*words, cwd=folder, fresh=True, stderr=subprocess.PIPE, text=True) as process:
            _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        with open(folder / "runs/study/mine/study.csv", newline="") as file:
            rows[name] = list(csv.DictReader(file))
        assert "Gap between AR and reAR" in (folder / "runs/study/mine/study.md").read_text()
        assert (folder / "runs/study/mine/loss_curves.png").is_file()
    assert [row["state"] for row in rows["killed"]] == ["done", "done"]
    assert all(float(row["loss"]) > 0 for row in rows["killed"])
    assert rows["killed"] == rows["undisturbed"]


@pytest.mark.long
def test_rows_of_the_tables_are_those_of_the_papers(here: Path) -> None:
    """At the full scale, each row trains what its config in configs/ablation/ says."""
    for name, prefix in (
        ("table3", "rear_table3"),
        ("table4", "rear_table4"),
        ("table5", "rear_table5"),
        ("rar_table3", "rar_table3"),
    ):
        cells = expand(read_study(f"study/{name}.yaml"))
        own = {cell.words["row"]: cell for cell in cells}
        files = {path.stem.removeprefix(f"{prefix}_") for path in (CONFIG_DIR / "ablation").glob(f"{prefix}_*.yaml")}
        assert files == {row for row in own if not row.endswith("_noise")}
        for row in files:
            given = [text for text in own[row].overrides if not text.startswith("run.seed")]
            assert identity(own[row].cfg) == identity(load(f"ablation/{prefix}_{row}.yaml", given))
    assert len(expand(read_study("study/rar_table2.yaml"))) == 15
    shared = expand(read_study("study/table1.yaml"))
    runner = Runner(read_study("study/table1.yaml"), shared, ("python",))
    by_row = {cell.words["row"]: cell for cell in shared}
    assert runner.trained_by(by_row["rear_l_is"]) is by_row["rear_l"]


@pytest.mark.long  # some 300 configs; tests/test_study.py reads a few of them in other tests
@pytest.mark.parametrize(("name", "scale"), [*((name, None) for name in NAMES), *SCALES])
def test_every_study_of_the_project_expands(name: str, scale: str | None) -> None:
    found = read_study(f"study/{name}.yaml", scale)
    if found.guidance is None:
        cells = expand(found)
        assert len({*names(cells)}) == len(cells)
        assert all(cell.config and (CONFIG_DIR / cell.config).is_file() for cell in cells)


def test_bad_command_lines_are_refused(here: Path, tokens: Path) -> None:
    path = str(study_file(here, tokens))
    for words, expected in (
        ([], "--config is missing"),
        (["--config", path, "--cell", "9"], "--cell 9 is not a cell of .* Use 0 to 3"),
        (["--config", path, "--slurm", "--nodes", "0"], "--nodes=0 must be at least 1"),
        (["--config", "study/nothing.yaml"], "no such file"),
    ):
        with pytest.raises(InputError, match=expected):
            study.main(words)
